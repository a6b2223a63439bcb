"""What a fusion holds: a base model with adapters in it, who weighs them, and what that has learned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loraflow.adapters import Adapter, AdapterBank
from loraflow.bases import BaseRecord
from loraflow.core.asking import Asking
from loraflow.core.attach import Attachment, Built
from loraflow.core.choice import Choice, Use
from loraflow.core.lanes import Gates, load_gates
from loraflow.core.names import check_adapter_names
from loraflow.endings import Endings
from loraflow.errors import LoraflowError, MethodError
from loraflow.methods import Method, get_method
from loraflow.prompts import PromptFormat


class _OfBase(nn.Module):
    """To `isinstance` what its base model is: transformers saves models of its own whole, and of others the tensors."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        base = self.__dict__.get("_modules", {}).get("base_model")
        return type(self) if base is None else type(base)

    def _get_name(self) -> str:
        return type(self).__name__


class FusionState(Asking, _OfBase):
    """A base model, ordered adapters, and the method that gives their fusion weights.

    Every attribute of the base (`config`, `device`, ...) is its own. Its `state_dict` holds what its own method has
    learned, never the base.

    Attributes:
        base_model: the transformers model that it wraps.
        tokenizer: the base's tokenizer, where there is one.
        prompt: how questions become prompts; saved with the fusion.
        endings: what ends an answer, where a call of `generate` says nothing else; saved with the fusion.
        attachment: the adapters in the model, for whoever works on that level.
        base_record: what tells the base from others.
        bank: what its adapters are all of, where it was made of one: calls that begin after the bank has changed use
            what is in it then, unless the fusion's own method has learned something with those of before.
        bank_changes: how often that had changed when its adapters were taken from it.
        training_record: what a fit of the fusion's own method did, as JSON values; None before.
    """

    # transformers' Trainer refuses a quantised model unless adapters are said to be loaded on it.
    _hf_peft_config_loaded = True
    # What is trained is whole in every process, however the base is stored: Trainer need not refuse to go on with it.
    is_distributed_loading_by_transformers = False
    main_input_name = "input_ids"

    base_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    endings: Endings
    attachment: Attachment
    base_record: BaseRecord
    training_record: dict[str, Any] | None
    bank: AdapterBank | None = None
    bank_changes: int = 0

    def __init__(
        self,
        attachment: Attachment,
        method: Method,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: PromptFormat,
        base_record: BaseRecord,
        endings: Endings | None = None,
    ) -> None:
        super().__init__()
        self.base_model = attachment.model
        self.tokenizer = tokenizer
        self.added_tokens = {}
        self.set_prompt(prompt)
        self.endings = endings or self.endings
        self.attachment = attachment
        self.base_record = base_record
        self.training_record = None
        self._choice = Choice(Use(method, {}, self.adapters))
        # What weighs where no call has put something else in its place, and how many calls run: one in another.
        self._installed = self._choice.own
        self._calls = 0
        self.set_method(method)
        self.train(self.base_model.training)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The fused adapters, in the order of the fusion weights."""
        return self.attachment.adapters

    @property
    def adapter_names(self) -> list[str]:
        """Their names, in order."""
        return [adapter.name for adapter in self.adapters]

    @property
    def method(self) -> Method:
        """What gives the fusion weights: the fusion's own method, or inside `using` that of the caller's block."""
        return self._choice.now.method

    @property
    def own_method(self) -> Method:
        """The fusion's own method, whose gates `state_dict` holds, also inside `using`."""
        return self._choice.own.method

    @property
    def gates(self) -> Gates:
        """The gates of `method`, by site: `model`, `layers.3`, or `layers.3.self_attn.q_proj`."""
        return dict(self._choice.now.gates)

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's defaults for `generate`."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.base_model.generation_config = value

    def __getattr__(self, name: str) -> Any:
        """Attributes that are not the fusion's own are the base model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def __getstate__(self) -> dict[str, Any]:
        # Calls that run are those of the original.
        return {**self.__dict__, "_calls": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # What another thread had put in place is no part of a copy.
        self._installed = self._choice.own
        if self.attachment.is_attached:
            self.attachment.install(self._installed.method, self._installed.gates)

    # Who weighs.

    def set_method(self, method: str | Method | Mapping[str, float]) -> None:
        """Use another method, adapter alone ("name"), or weights by adapter name, its gates as before any training.

        It is the fusion's own then, for everybody; inside a `using` block it is for that block alone.
        """
        with self.attachment.turn():
            self.attachment.check_attached()
            self._choice.change(self._replacement(method))
            if not self._choice.in_block:
                self.training_record = None
                self._register()
            self._install()

    @contextlib.contextmanager
    def using(self, method: str | Method | Mapping[str, float]) -> Iterator[Self]:
        """Use another method, one adapter, or the base ("base") inside a `with` block; learned gates are kept.

        It is for the thread that runs the block, or its asyncio task: other threads go on with what they use. As with
        every context variable (`contextvars`), tasks that are started inside the block inherit it, and so does
        `asyncio.to_thread`; a new thread and `run_in_executor` do not. What is saved is the fusion's own all the time.

        Yields:
            The fusion itself.
        """
        with self.attachment.turn():
            self.attachment.check_attached()
            self._follow_bank()
            use = self._choice.fresh(method, self.attachment)
        try:
            with self._choice.block(use):
                self._install()
                yield self
        finally:
            self._install()

    def _replacement(self, method: str | Method | Mapping[str, float]) -> Use:
        """Another method in place of the caller's, of the adapters that the bank has by now; or all stays as it is."""
        alone = not self._choice.in_block
        # The method before may be one that cannot go on: then this is the way out.
        with contextlib.suppress(LoraflowError) if alone else contextlib.nullcontext():
            self._follow_bank()
        own, adapters, changes = self._choice.own, self.adapters, self.bank_changes
        try:
            if alone:
                self._follow_bank(replaced=True)
            use = self._choice.fresh(method, self.attachment)
            self.attachment.ready(use.method, use.gates)
        except BaseException:
            if self.adapters is not adapters:
                self._choice.own = Use(get_method("base", []), {}, self.adapters)
                self._swap_adapters(adapters)
            if self._choice.own is not own:
                self._choice.own, self.bank_changes = own, changes
                with contextlib.suppress(LoraflowError):
                    self._register()
            raise
        return use

    def _register(self) -> None:
        """Make the gates of the fusion's own method the model's modules; they are what is trained and moved."""
        own = self._choice.own
        self.attachment.install(own.method, own.gates)
        self._installed = own
        self.requires_grad_(False)
        for gate in own.gates.values():
            gate.requires_grad_(own.method.learns is not None)

    def _install(self) -> None:
        """Let weigh what the caller uses, where no call runs; calls do so themselves."""
        with self.attachment.turn():
            use = self._choice.now
            fits = self.attachment.is_attached and use.fits(self.adapters)
            if fits and not self._calls and use is not self._installed:
                self.attachment.use(use.method, use.gates)
                self._installed = use

    def at_work(self) -> contextlib.AbstractContextManager[None]:
        """The model's turn, with what the caller uses in place; the outer call's comes back after one inside it."""
        if torch.compiler.is_compiling():
            # Nothing is put in place while a graph is made, and `using` and `set_method` did so before.
            self.attachment.check_attached()
            return contextlib.nullcontext()
        return self._with_turn()

    @contextlib.contextmanager
    def _with_turn(self) -> Iterator[None]:
        with self.attachment.turn():
            self.attachment.check_attached()
            self._follow_bank()
            use = self._choice.now
            if self.bank is not None and use.method.learns is None and not use.fits(self.adapters):
                # Another thread, or a block inside, was the first to find that the bank has others.
                use = self._choice.fresh(use.method, self.attachment)
                self._choice.change(use)
            if not use.fits(self.adapters):
                raise LoraflowError(
                    f"The adapters were exchanged, and {use.method.name!r} is in use here for those before. Leave the "
                    "`using` block and enter it again."
                )
            before = self._installed
            in_place = before is use and not self._calls
            self._calls += 1
            try:
                with contextlib.nullcontext() if in_place else self.attachment.using(use.method, use.gates):
                    yield
            finally:
                self._calls -= 1
                if not in_place:
                    self._installed = before

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Held by whoever fits the fusion's own method: calls of other threads wait until the block ends.

        Raises:
            MethodError: if another method is in use.
        """
        with self.attachment.turn():
            if self._choice.in_block:
                raise MethodError(
                    f"What is fitted is the fusion's own method, {self.own_method.name!r}, and {self.method.name!r} is "
                    "in use here. Leave the `using` block, or choose with `set_method`."
                )
            yield

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """transformers', but layers below the first gate that learns keep nothing and are not computed again.

        For the sake of adapters in a frozen base, transformers lets all embeddings require a gradient, whose way back
        goes through every layer; gates see to their own layers.

        Args:
            args: transformers'.
            kwargs: transformers'.
        """
        self.base_model.gradient_checkpointing_enable(*args, **kwargs)
        self.base_model.disable_input_require_grads()

    def disable_adapter(self) -> contextlib.AbstractContextManager[Self]:
        """The base model alone inside a `with` block, as in PEFT."""
        return self.using("base")

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        with self.attachment.turn():
            # Where the model is moved, gates that are no part of it would stay behind.
            self._choice.forget_made()
            for gate in self._choice.gates_outside():
                gate._apply(*args, **kwargs)
            return super()._apply(*args, **kwargs)

    # What it learned.

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What the fusion's own method has learned: `site.parameter` to tensor, without base and adapters."""
        destination = kwargs.pop("destination", None)
        learned: dict[str, Tensor] = {} if destination is None else destination
        for site, gate in self._choice.own.gates.items():
            gate.state_dict(*args, destination=learned, prefix=f"{prefix}{site}.", **kwargs)
        return learned

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; all of it, whatever `strict` says: a gate left out would change the model."""
        with self.attachment.turn():
            own = self._choice.own
            load_gates(own.gates, state_dict, f"the method {own.method.name!r}", assign=assign)
        return nn.modules.module._IncompatibleKeys([], [])

    def num_learned_parameters(self) -> int:
        """Number of values that the method learns: parameters of its gates, or what those keep of samples."""
        gates = self._choice.own.gates.values()
        parameters = sum(parameter.numel() for gate in gates for parameter in gate.parameters())
        return parameters or sum(tensor.numel() for tensor in self.state_dict().values())

    # Its adapters.

    def exchange_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Take all adapters out and put others in, under the base's method; calls that wait for their turn go on.

        What the others bring is built first, beside those in the model, while calls go on; only the exchange itself has
        the model's turn. Where gates of the fusion's own method are in the base's modules, or its weights cannot be
        read while it runs (quantised, offloaded), all of it has. Where it fails the model is as it was, but for its
        method.
        """
        aside = not self._choice.own.gates and self.attachment.reads_aside
        built = self.attachment.build(adapters) if aside else None
        with self.attachment.turn():
            try:
                self._swap_adapters(adapters, built)
                self.bank = None
            finally:
                if self.attachment.is_attached:
                    self._choice.own = self._choice.fresh("base", self.attachment)
                    self._choice.change(self._choice.own)
                    self.training_record = None
                    self._register()
                    self._install()

    @contextlib.contextmanager
    def exchanged(self, adapters: Sequence[Adapter]) -> Iterator[Self]:
        """Have others in place of all adapters inside the block, at first as the base; then all is as it was."""
        with self.attachment.turn():
            before, bank, self.bank = self.adapters, self.bank, None
            try:
                self._swap_adapters(adapters)
                try:
                    with self.using("base"):
                        yield self
                finally:
                    self._swap_adapters(before)
            finally:
                self.bank = bank

    def _follow_bank(self, *, replaced: bool = False) -> None:
        """Have the adapters that the bank has by now, unless a call runs: that keeps those that it began with.

        A fusion whose own method learns keeps its adapters, unless that is `replaced`. Where it fails, the next call
        tries again.

        Raises:
            MethodError: if the fusion's own method, which is to go on, names an adapter that is no longer there.
        """
        own = self._choice.own.method
        if self.bank is None or self._calls or self.bank.changes == self.bank_changes:
            return
        if own.learns is not None and not replaced:
            return
        changes, adapters = self.bank.changes, self.bank.stored()
        names = [adapter.name for adapter in adapters]
        check_adapter_names(names)
        if not replaced:
            get_method(own, names)
        self._choice.own = Use(get_method("base", []), {}, self.adapters)
        try:
            self._swap_adapters(adapters)
            if not replaced:
                self._choice.own = self._choice.fresh(own, self.attachment)
                self._register()
            self.bank_changes = changes
        except BaseException:
            # Without gates nobody answers by it: every call comes here first, until this succeeds.
            self._choice.own = Use(own, {}, self.adapters)
            raise

    def _swap_adapters(self, adapters: Sequence[Adapter], built: Built | None = None) -> None:
        """Take all adapters out and put others in; where that fails, the same ones again."""
        before = self.attachment
        before.detach()
        try:
            self.attachment = before.again(built or before.build(adapters))
        except BaseException:
            self.attachment = before.again(before.build(before.adapters))
            raise
        finally:
            self._choice.forget_made()
            if self.attachment.is_attached:
                self._register()
                self._install()

    def unload(self) -> PreTrainedModel:
        """Take adapters and gates out and return the base model, bit for bit as it was; this object is empty then."""
        with self.attachment.turn():
            self.attachment.detach()
            self._choice.own = Use(get_method("base", []), {}, self.adapters)
            self._choice.change(self._choice.own)
            self.training_record = None
            return self.base_model

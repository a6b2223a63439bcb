"""A fusion at work: a base model with adapters in it, and the method that weighs them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loraflow.adapters import Adapter
from loraflow.bases import BaseRecord
from loraflow.core.asking import Asking
from loraflow.core.attach import Attachment
from loraflow.core.batch import (
    RowMethod,
    RowWeights,
    lanes_of_rows,
    lanes_of_weights,
    prompt_mask,
    read_weights,
    refuse_prompts,
    weigh_prompts,
)
from loraflow.core.lanes import Gates
from loraflow.endings import Endings
from loraflow.errors import FusionError, LoraflowError, MethodError
from loraflow.methods import Method, QueryMethod, get_method
from loraflow.prompts import PromptFormat
from loraflow.visual.tokens import token_texts
from loraflow.visual.trace import Trace

_KEPT = 16
"""How many methods' gates are kept at once beside those in use."""


class Fusion(Asking, nn.Module):
    """A base model, ordered adapters, and the method that gives their fusion weights.

    It is used as the base model is: `forward`, `generate`, and every attribute of the base (`config`, `device`, ...)
    are its own. Its `state_dict` holds what is learned, never the base.

    Attributes:
        base_model: the transformers model that it wraps.
        tokenizer: the base's tokenizer, where there is one.
        prompt: how questions become prompts; saved with the fusion.
        endings: what ends an answer, where a call of `generate` says nothing else; saved with the fusion.
        method: what gives the fusion weights.
        attachment: the adapters in the model, for whoever works on that level.
        base_record: what tells the base from others.
        training_record: what a fit did, as JSON values; None before.
    """

    # transformers' Trainer refuses a quantised model unless adapters are said to be loaded on it.
    _hf_peft_config_loaded = True
    main_input_name = "input_ids"

    base_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    endings: Endings
    method: Method
    attachment: Attachment
    base_record: BaseRecord
    training_record: dict[str, Any] | None

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
        self.method = method
        # Owned by the decoder layers that they serve; a dict, so that they are not registered twice.
        self._gates: Gates = {}
        # Of methods that learn nothing, by name and parameters: Arrow's directions, say, take a while to find.
        self._made: dict[str, Gates] = {}
        # Gates of methods that come back when a `using` block ends, the outermost first.
        self._aside: list[Gates] = []
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
    def gates(self) -> Gates:
        """The gates of the fusion's own method, by site: `model`, `layers.3`, or `layers.3.self_attn.q_proj`."""
        return dict(self._gates)

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

    # Answering.

    def forward(
        self,
        *args: Any,
        methods: Sequence[RowMethod] | None = None,
        fusion_weights: RowWeights | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, with the fused adapters in it.

        Args:
            args: the base's.
            methods: who weighs each row, where rows differ, as for `generate`.
            fusion_weights: weights of each row instead.
            kwargs: the base's.

        Raises:
            MethodError: if a method weighs whole prompts: a bare forward does not say what the prompt is.
        """
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        rows = None if inputs is None else len(inputs)
        with self.attachment.turn():
            self.attachment.check_attached()
            if methods is None and fusion_weights is None:
                return self.base_model(*args, **kwargs)
            lanes = lanes_of_rows(self.attachment, methods, fusion_weights, rows, self._gates_of, refuse_prompts)
            with self.attachment.weighing(lanes):
                return self.base_model(*args, **kwargs)

    def generate(
        self,
        inputs: Int[Tensor, "batch seq"] | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        methods: Sequence[RowMethod] | None = None,
        fusion_weights: RowWeights | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, with everything that it takes; the cache is on.

        Answers end at the fusion's `endings`; a call's own `eos_token_id` or `stop_strings` take the place of those.

        Methods that look at the whole prompt weigh each request once, before generation; beams and returned sequences
        carry their request's weights along.

        Args:
            inputs: the prompts' token ids; `input_ids=` is the same.
            generation_config: how to generate; by default, the base's.
            args: transformers'.
            methods: who weighs each request, where requests differ: a method's name, an adapter's name, weights by
                adapter name, a method object, or None for the fusion's own method.
            fusion_weights: weights of each request instead, for all layers or for each.
            kwargs: transformers'.

        Raises:
            MethodError: if the method reads the prompt, and there are no token ids.
        """
        # `find_decoder_layers` checked that it can.
        generate = cast(Any, self.base_model).generate
        kwargs, generation_config = self.endings.options(
            kwargs, generation_config, self.generation_config, self.tokenizer
        )
        given = (inputs, generation_config, *args)
        ids = next((v for v in (inputs, kwargs.get("input_ids"), kwargs.get("inputs")) if v is not None), None)
        rows = next((len(v) for v in (ids, kwargs.get("inputs_embeds")) if v is not None), None)

        def weigh(method: QueryMethod, gates: Gates, requests: list[int]) -> Tensor:
            if ids is None:
                raise MethodError(f"The method {method.name!r} reads the prompt, and `input_ids` is missing.")
            mask = prompt_mask(ids, {**kwargs, "generation_config": generation_config}, self.generation_config)
            return self._weigh(method, gates, ids[requests], None if mask is None else mask[requests])

        with self.attachment.turn():
            self.attachment.check_attached()
            if methods is None and fusion_weights is None:
                if not isinstance(self.method, QueryMethod):
                    return generate(*given, **kwargs)
                methods = [None] * (rows or 1)
            lanes = lanes_of_rows(self.attachment, methods, fusion_weights, rows, self._gates_of, weigh)
            with self.attachment.weighing(lanes):
                return generate(*given, **kwargs)

    # Who weighs.

    def set_method(self, method: str | Method | Mapping[str, float]) -> None:
        """Use another method, adapter alone ("name"), or weights by adapter name, its gates as before any training."""
        with self.attachment.turn():
            self.attachment.check_attached()
            chosen = get_method(method, self.adapter_names)
            self._gates = self.attachment.make_gates(chosen) if chosen.learns else self._gates_of(chosen)[1]
            self.method = chosen
            self.training_record = None
            self.attachment.install(self.method, self._gates)
            self.requires_grad_(False)
            for gate in self._gates.values():
                gate.requires_grad_(self.method.learns is not None)

    @contextlib.contextmanager
    def using(self, method: str | Method | Mapping[str, float]) -> Iterator[Fusion]:
        """Use another method, one adapter, or the base ("base") inside a `with` block; learned gates are kept."""
        with self._method_kept():
            self.set_method(method)
            yield self

    @contextlib.contextmanager
    def _method_kept(self) -> Iterator[None]:
        with self.attachment.turn():
            mine = (self.method, self._gates, self.training_record)
            self._aside.append(self._gates)
        try:
            yield
        finally:
            with self.attachment.turn():
                self._aside.pop()
                self.method, self._gates, self.training_record = mine
                self.attachment.install(self.method, self._gates)

    def disable_adapter(self) -> contextlib.AbstractContextManager[Fusion]:
        """The base model alone inside a `with` block, as in PEFT."""
        return self.using("base")

    def weigh(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        method: str | Method | None = None,
    ) -> Float[Tensor, "batch layers adapters"]:
        """The weights that a query-level method gives prompts, each by itself; constant while they are answered.

        Args:
            input_ids: the prompts.
            attention_mask: 1 at real tokens, 0 at padding on either side.
            method: the method; by default the fusion's own.

        Raises:
            MethodError: if the method does not weigh whole prompts.
        """
        with self.attachment.turn():
            self.attachment.check_attached()
            chosen, gates = self._gates_of(method)
            if not isinstance(chosen, QueryMethod):
                raise MethodError(
                    f"The method {chosen.name!r} does not weigh whole prompts. `trace` shows the weights that it gives."
                )
            return self._weigh(chosen, gates, input_ids, attention_mask)

    @torch.no_grad()
    def _weigh(self, method: QueryMethod, gates: Gates, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        with self.attachment.turn(), self.evaluating():
            return weigh_prompts(self.attachment, method, gates.get("model"), input_ids, attention_mask, self.tokenizer)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside the block; afterwards each module is in the mode it was in."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _gates_of(self, method: RowMethod) -> tuple[Method, Gates]:
        """A method and its gates.

        Raises:
            MethodError: if it would learn, and is not the fusion's own.
        """
        if method is None or (self.method.learns and method in (self.method, self.method.name)):
            return self.method, self._gates
        chosen = get_method(method, self.adapter_names)
        if chosen.learns:
            raise MethodError(
                f"The method {chosen.name!r} must be fitted first, and what is fitted here is {self.method.name!r} "
                f"with {self.method.parameters()}. Beside it, use methods that learn nothing."
            )
        if chosen.level == "task":
            # Cheap to make, and requests may each have other weights.
            return chosen, self.attachment.make_gates(chosen)
        key = json.dumps([chosen.name, chosen.parameters()], sort_keys=True)
        if key not in self._made:
            while len(self._made) >= _KEPT:
                del self._made[next(iter(self._made))]
            self._made[key] = self.attachment.make_gates(chosen)
        return chosen, self._made[key]

    def _apply(self, *args: Any, **kwargs: Any) -> Fusion:
        # Where the model is moved, gates that are no part of it now would stay behind.
        self._made.clear()
        for gate in (gate for gates in self._aside for gate in gates.values()):
            gate._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    # What it weighed.

    @torch.no_grad()
    def trace(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        *,
        prompt_length: int = 0,
        **kwargs: Any,
    ) -> Trace:
        """The fusion weights at every position of a text, computed in one forward.

        Args:
            input_ids: the text: a prompt, or a prompt and the answer that `generate` returned.
            attention_mask: 1 at real tokens, 0 at padding on either side.
            prompt_length: how many positions are the prompt's; pictures show the rest as generated. Methods that weigh
                whole prompts read these, or all where it is 0.
            kwargs: anything else for the base model's forward.

        Returns:
            The weights, which show themselves in a notebook.

        Raises:
            LoraflowError: if the base alone is in use, which has no fusion weights.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self.attachment.turn(), self.evaluating():
            self.attachment.check_attached()
            method, lanes = self.method, None
            if not self._gates:
                raise LoraflowError("The method in use is 'base', which has no fusion weights. Trace another method.")
            if isinstance(method, QueryMethod):
                prompt = slice(0, prompt_length or None)
                weights = self._weigh(method, self._gates, input_ids[:, prompt], mask[:, prompt])
                lanes = lanes_of_weights(self.attachment, weights, len(input_ids))
            layer_weights, module_weights = read_weights(self.attachment, input_ids, mask, lanes, **kwargs)
        return Trace(
            weights=layer_weights,
            adapters=tuple(self.adapter_names),
            tokens=[
                list(map(str, row)) if self.tokenizer is None else token_texts(self.tokenizer, row)
                for row in input_ids.tolist()
            ],
            input_ids=input_ids.cpu(),
            attention_mask=mask.cpu(),
            prompt_length=prompt_length,
            module_weights=module_weights,
            method=method.name,
            level=method.level,
            place=method.place,
        )

    # What it learned.

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What the method has learned: `site.parameter` to tensor, without base and adapters."""
        destination = kwargs.pop("destination", None)
        learned: dict[str, Tensor] = {} if destination is None else destination
        for site, gate in self._gates.items():
            gate.state_dict(*args, destination=learned, prefix=f"{prefix}{site}.", **kwargs)
        return learned

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; all of it, whatever `strict` says, for a gate left out would change the model.

        Raises:
            FusionError: if keys are missing, unknown, or of another shape.
        """
        mine = self.state_dict()
        wrong = sorted(mine.keys() ^ state_dict.keys())
        wrong += sorted(k for k in mine.keys() & state_dict.keys() if mine[k].shape != state_dict[k].shape)
        if wrong:
            raise FusionError(
                f"The learned tensors do not match the method {self.method.name!r}: '{wrong[0]}' is missing, unknown "
                f"or of another shape ({len(wrong)} such). Use the fusion's own method and adapters."
            )
        for site, gate in self._gates.items():
            mine_of_gate = {name: state_dict[f"{site}.{name}"] for name in gate.state_dict()}
            gate.load_state_dict(mine_of_gate, strict=True, assign=assign)
        return nn.modules.module._IncompatibleKeys([], [])

    def num_learned_parameters(self) -> int:
        """Number of values that the method learns, those of `state_dict`."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    # Its adapters.

    def exchange_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Take all adapters out and put others in, under the base's method; calls that wait for their turn go on.

        Where that fails the model is as it was, but for its method.
        """
        with self.attachment.turn():
            before = self.attachment
            before.detach()
            try:
                self.attachment = before.again(adapters)
            except BaseException:
                self.attachment = before.again(before.adapters)
                raise
            finally:
                self._made.clear()
                self.set_method("base")

    @contextlib.contextmanager
    def exchanged(self, adapters: Sequence[Adapter]) -> Iterator[Fusion]:
        """Have others in place of all adapters inside the block, at first as the base; then all is as it was."""
        with self.attachment.turn(), self._method_kept():
            before = self.adapters
            try:
                self.exchange_adapters(adapters)
                yield self
            finally:
                self.exchange_adapters(before)

    def unload(self) -> PreTrainedModel:
        """Take adapters and gates out and return the base model, bit for bit as it was; this object is empty then."""
        self.attachment.detach()
        self.method, self._gates, self.training_record = get_method("base", []), {}, None
        return self.base_model

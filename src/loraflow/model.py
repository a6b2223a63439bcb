"""`FusedModel`: a transformers model with several LoRA adapters fused into it, used as any other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import HfApi
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loraflow import __version__
from loraflow.adapters import Adapter, AdapterSource, load_adapter
from loraflow.answers import pad_prompts, require_tokenizer
from loraflow.bases import BaseOptions, load_base, load_tokenizer
from loraflow.core.architecture import find_decoder_layers
from loraflow.core.attach import Attachment, attach, check_unfused
from loraflow.core.batch import (
    RowMethod,
    WeighPrompts,
    lanes_of_methods,
    lanes_of_weights,
    prompt_mask,
    weigh_prompts,
)
from loraflow.core.layers import Gates, Lanes
from loraflow.errors import AdapterError, FusionError, LoraflowError, MethodError
from loraflow.methods import Method, QueryMethod, get_method, make_method, method_names
from loraflow.prompts import Message, PromptFormat
from loraflow.saved.card import model_card
from loraflow.saved.storage import (
    AdapterRecord,
    BaseRecord,
    FusionConfig,
    MethodRecord,
    base_record,
    check_base,
    copy_adapter,
    fetch_fusion,
    read_fusion,
    recorded_copies,
    relative_source,
    resolve_source,
    tensors_digest,
    write_fusion,
)
from loraflow.visual.tokens import token_texts
from loraflow.visual.trace import Trace

if TYPE_CHECKING:
    from transformers.generation.utils import GenerativePreTrainedModel

    from loraflow.training import FitConfig, FitResult


class FusedModel(nn.Module):
    """A base model, ordered adapters, and the method that gives their fusion weights.

    Make one with `from_adapters` or `from_pretrained`. It is used as the base model is: `forward`, `generate`, and
    every attribute of the base (`config`, `device`, ...) are its own; transformers' `Trainer` and `pipeline` and
    lm-eval's `HFLM` take it as they take any model. Its `state_dict` holds what is learned, never the base.

    Attributes:
        base_model: the transformers model that it wraps.
        tokenizer: the base's tokenizer, where there is one.
        prompt: how questions become prompts; saved with the fusion.
        training_record: what `fit` did, as JSON values; None before.
    """

    # transformers' Trainer refuses a quantised model unless adapters are said to be loaded on it.
    _hf_peft_config_loaded = True
    main_input_name = "input_ids"

    base_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    prompt: PromptFormat
    training_record: dict[str, Any] | None

    def __init__(
        self,
        attachment: Attachment,
        method: Method,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: PromptFormat,
        base: BaseRecord,
    ) -> None:
        super().__init__()
        self.base_model = attachment.model
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.training_record = None
        self._attachment = attachment
        self._base = base
        self.method = method
        # Owned by the decoder layers that they serve; a dict, so that they are not registered twice.
        self._gates: Gates = {}
        # Of methods that learn nothing, by name and parameters: Arrow's directions, say, take a while to find.
        self._made: dict[str, Gates] = {}
        self.set_method(method)
        self.train(self.base_model.training)
        self.__class__ = _class_for(type(self), type(self.base_model))
        _announce_to_pipelines()

    @classmethod
    def from_adapters(
        cls,
        base: str | Path | PreTrainedModel,
        adapters: Mapping[str, str | Path | AdapterSource | Adapter],
        method: str | Method = "lora-flow",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt: PromptFormat | None = None,
        options: BaseOptions | None = None,
    ) -> FusedModel:
        """Fuse adapters into a base model.

        Args:
            base: Hub id, path, or a loaded transformers model (which is changed in place until `unload`).
            adapters: where each adapter is, by the name it gets; their order is that of the fusion weights. A
                directory, `user/repo` or `user/repo/subfolder`, each Hub id optionally `@revision`.
            method: a method's name, an adapter's name (that one alone), or a method object.
            tokenizer: by default the base's, where `base` is an id or path.
            prompt: how questions become prompts; by default the tokenizer's chat template, if it has one.
            options: precision, placement and quantisation of a base given by id or path.

        Returns:
            The fused model; in evaluation mode, unless a loaded base is not.

        Raises:
            AdapterError: if an adapter cannot be read, or does not fit the base.
            ArchitectureError: if the base is of a kind that cannot be fused.
            LoraflowError: if the adapters' names cannot be used.
            MethodError: if the method is unknown, or a parameter of it is wrong.
        """
        check_adapter_names(list(adapters))
        resolved = get_method(method, list(adapters))
        loaded = [_load(name, source) for name, source in adapters.items()]
        model, record, tokenizer = _open_base(base, tokenizer, options)
        return cls._attached(model, loaded, resolved, tokenizer, prompt or PromptFormat(), record)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        adapters: Mapping[str, str | Path | AdapterSource | Adapter] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        options: BaseOptions | None = None,
    ) -> FusedModel:
        """Load a fusion that `save_pretrained` or `loraflow fit` wrote.

        Args:
            path: its directory, or its Hub id.
            base: another place of the same base model, or the loaded model.
            adapters: other places of the same adapters, by name; those not named are taken from where they were.
            tokenizer: by default the base's.
            revision: revision of a fusion on the Hub.
            options: placement of the base; its precision and quantisation where they are to differ from those that
                the fusion was made with.

        Returns:
            The fused model, giving the logits it gave when it was saved.

        Raises:
            FusionError: if the base or an adapter is not the one that the fusion was made with.
        """
        directory = fetch_fusion(path, revision)
        config, tensors = read_fusion(directory)
        moved = dict(adapters or {})
        unknown = moved.keys() - {record.name for record in config.adapters}
        if unknown:
            raise FusionError(
                f"The fusion {path} has no adapter {sorted(unknown)[0]!r}; it has {[a.name for a in config.adapters]}."
            )
        sources = {
            a.name: moved.get(a.name, AdapterSource(resolve_source(a.path, directory), a.revision))
            for a in config.adapters
        }
        try:
            method = make_method(config.method.name, config.method.parameters)
            method.check(list(sources))
        except MethodError as error:
            raise FusionError(
                f"The fusion {path} was saved by loraflow {config.loraflow_version} with a method that this loraflow "
                f"{__version__} cannot make: {error} Update loraflow, or install the method's package."
            ) from error
        loaded = _load_recorded(sources, config)
        if base is None:
            base = resolve_source(config.base.path, directory)
            if not base:
                raise FusionError(f"The fusion {path} does not know where its base model is. Give it as `base`.")
        if not isinstance(base, nn.Module):
            options = _recorded_options(config.base, options, same_place=str(base) == config.base.path)
        loaded_base, record, tokenizer = _open_base(base, tokenizer, options)
        check_base(config.base, record)
        model = cls._attached(loaded_base, list(loaded.values()), method, tokenizer, config.prompt, record)
        try:
            model.load_state_dict(tensors)
        except FusionError:
            model.unload()
            raise
        model.training_record = config.training
        return model

    @classmethod
    def _attached(
        cls,
        model: PreTrainedModel,
        adapters: Sequence[Adapter],
        method: Method,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: PromptFormat,
        record: BaseRecord,
    ) -> FusedModel:
        """Attach to a base; one that fails half-way is given back as it was."""
        prompt = prompt if tokenizer is None else prompt.resolve(tokenizer)
        attachment = attach(model, find_decoder_layers(model), adapters)
        try:
            return cls(attachment, method, tokenizer, prompt, record)
        except BaseException:
            attachment.detach()
            raise

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The fused adapters, in the order of the fusion weights."""
        return self._attachment.adapters

    @property
    def adapter_names(self) -> list[str]:
        """Names of the fused adapters, in order."""
        return [adapter.name for adapter in self.adapters]

    @property
    def gates(self) -> Gates:
        """The gates of the model's own method, by site: `model`, `layers.3`, or `layers.3.self_attn.q_proj`."""
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

    def forward(
        self,
        *args: Any,
        methods: Sequence[RowMethod] | None = None,
        fusion_weights: Float[Tensor, "batch layers adapters"] | Float[Tensor, "batch adapters"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, with the fused adapters in it.

        Args:
            args: the base's.
            methods: who weighs each row, where rows differ: a method's name, an adapter's name, weights by adapter
                name, a method object, or None for the fusion's own method.
            fusion_weights: weights of each row instead, for all layers or for each.
            kwargs: the base's.

        Returns:
            What the base returns.

        Raises:
            MethodError: if a method weighs whole prompts: a bare forward does not say what the prompt is.
        """
        if methods is None and fusion_weights is None:
            with self._turn():
                return self.base_model(*args, **kwargs)
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        rows = None if inputs is None else len(inputs)
        with self._turn(), self._lanes(self._plan(methods, fusion_weights, rows, self._refuse_prompts)):
            return self.base_model(*args, **kwargs)

    def generate(
        self,
        inputs: Int[Tensor, "batch seq"] | None = None,
        *args: Any,
        methods: Sequence[RowMethod] | None = None,
        fusion_weights: Float[Tensor, "batch layers adapters"] | Float[Tensor, "batch adapters"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, with everything that it takes; the cache is on.

        Methods that look at the whole prompt weigh each request once, before generation; beams and returned sequences
        carry their request's weights along.

        Args:
            inputs: the prompts' token ids; `input_ids=` is the same.
            args: transformers'.
            methods: who weighs each request, where requests differ: a method's name, an adapter's name, weights by
                adapter name, a method object, or None for the fusion's own method.
            fusion_weights: weights of each request instead, for all layers or for each.
            kwargs: transformers'.

        Returns:
            What transformers returns.

        Raises:
            MethodError: if the method reads the prompt, and there are no token ids.
        """
        # `find_decoder_layers` checked that it can.
        generate = cast("GenerativePreTrainedModel", self.base_model).generate
        given = {} if inputs is None else {"inputs": inputs}
        ids = next((v for v in (inputs, kwargs.get("input_ids"), kwargs.get("inputs")) if v is not None), None)
        rows = next((len(v) for v in (ids, kwargs.get("inputs_embeds")) if v is not None), None)
        if methods is None and fusion_weights is None:
            if not isinstance(self.method, QueryMethod):
                with self._turn():
                    return generate(*args, **given, **kwargs)
            methods = [None] * (rows or 1)

        def weigh(method: QueryMethod, gates: Gates, requests: list[int]) -> Tensor:
            if ids is None:
                raise MethodError(f"The method {method.name!r} reads the prompt, and `input_ids` is missing.")
            mask = prompt_mask(ids, kwargs, self.generation_config)
            return self._weigh(method, gates, ids[requests], None if mask is None else mask[requests])

        with self._turn(), self._lanes(self._plan(methods, fusion_weights, rows, weigh)):
            return generate(*args, **given, **kwargs)

    def encode(self, questions: str | Sequence[str | Sequence[Message]]) -> dict[str, Int[Tensor, "batch seq"]]:
        """Questions as `generate`, `weigh` and `trace` take them, in the fusion's own prompt format.

        Args:
            questions: one text, or several; each a question, or a conversation of messages up to the user's turn.

        Returns:
            `input_ids` and `attention_mask`, padded on the left.
        """
        tokenizer = require_tokenizer(self.tokenizer)
        several = [questions] if isinstance(questions, str) else questions
        turns = [[{"role": "user", "content": q}] if isinstance(q, str) else q for q in several]
        return pad_prompts([self.prompt.prompt_ids(tokenizer, turn) for turn in turns], tokenizer, self.device)

    def weigh(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        method: str | Method | None = None,
    ) -> Float[Tensor, "batch layers adapters"]:
        """The weights that a query-level method gives prompts, each by itself.

        Args:
            input_ids: the prompts.
            attention_mask: 1 at real tokens, 0 at padding on either side.
            method: the method; by default the fusion's own.

        Returns:
            One weight for each prompt, layer and adapter; constant while the prompt is answered.

        Raises:
            MethodError: if the method does not weigh whole prompts.
        """
        chosen, gates = self._gates_of(method)
        if not isinstance(chosen, QueryMethod):
            raise MethodError(
                f"The method {chosen.name!r} does not weigh whole prompts. `trace` shows the weights that it gives."
            )
        return self._weigh(chosen, gates, input_ids, attention_mask)

    @torch.no_grad()
    def _weigh(self, method: QueryMethod, gates: Gates, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        with self._turn(), self._evaluating():
            return weigh_prompts(
                self._attachment, method, gates.get("model"), input_ids, attention_mask, self.tokenizer
            )

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        # A compiled forward is traced once, and cannot hold a lock.
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._attachment.stream.turn

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
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
            return chosen, self._attachment.make_gates(chosen)
        key = json.dumps([chosen.name, chosen.parameters()], sort_keys=True)
        if key not in self._made:
            self._made[key] = self._attachment.make_gates(chosen)
        return chosen, self._made[key]

    def _apply(self, *args: Any, **kwargs: Any) -> FusedModel:
        # Gates that are kept for later would stay behind where the model is moved.
        self._made.clear()
        return super()._apply(*args, **kwargs)

    def _plan(
        self,
        methods: Sequence[RowMethod] | None,
        fusion_weights: Tensor | None,
        rows: int | None,
        weigh: WeighPrompts,
    ) -> Lanes:
        """Which rows are weighed how.

        Raises:
            LoraflowError: if there are not as many methods, or weights, as rows.
        """
        self._attachment.check_attached()
        if fusion_weights is not None:
            if methods is not None:
                raise LoraflowError("`methods` and `fusion_weights` exclude each other. Give one of them.")
            return lanes_of_weights(self._attachment, fusion_weights, rows)
        assert methods is not None
        if isinstance(methods, str | Method | Mapping) or rows not in (None, len(methods)):
            count = "one" if isinstance(methods, str | Method | Mapping) else len(methods)
            wanted = "each row" if rows is None else f"each of the {rows} rows"
            raise LoraflowError(f"`methods` names {count}, and must name one for {wanted}. For one method use `using`.")
        # Rows often share a method; each is looked up and made once.
        keys = [json.dumps(dict(m)) if isinstance(m, Mapping) else m if isinstance(m, str) else id(m) for m in methods]
        found = {key: self._gates_of(method) for key, method in dict(zip(keys, methods, strict=True)).items()}
        return lanes_of_methods(self._attachment, [found[key] for key in keys], weigh)

    def _refuse_prompts(self, method: QueryMethod, gates: Gates, rows: list[int]) -> Tensor:
        raise MethodError(
            f"The method {method.name!r} weighs a whole prompt before it is answered, and a bare forward does not say "
            "what the prompt is. Call `generate`, or give `fusion_weights=model.weigh(prompt_ids)`."
        )

    @contextlib.contextmanager
    def _lanes(self, lanes: Lanes) -> Iterator[None]:
        stream = self._attachment.stream
        before = stream.lanes
        stream.lanes = lanes
        try:
            yield
        finally:
            stream.lanes, stream.embeddings = before, None

    def set_method(self, method: str | Method | Mapping[str, float]) -> None:
        """Use another method from now on, its gates as before any training.

        Args:
            method: a method's name, an adapter's name (that one alone), weights by adapter name, or a method object.
        """
        self._attachment.check_attached()
        chosen = get_method(method, self.adapter_names)
        self._gates = self._attachment.make_gates(chosen) if chosen.learns else self._gates_of(chosen)[1]
        self.method = chosen
        self.training_record = None
        self._attachment.install(self.method, self._gates)
        self.requires_grad_(False)
        for gate in self._gates.values():
            gate.requires_grad_(self.method.learns is not None)

    @contextlib.contextmanager
    def using(self, method: str | Method | Mapping[str, float]) -> Iterator[FusedModel]:
        """Use another method, one adapter, or the base ("base") inside a `with` block; learned gates are kept."""
        self._attachment.check_attached()
        mine = (self.method, self._gates, self.training_record)
        try:
            self.set_method(method)
            yield self
        finally:
            self.method, self._gates, self.training_record = mine
            self._attachment.install(self.method, self._gates)

    def disable_adapter(self) -> contextlib.AbstractContextManager[FusedModel]:
        """The base model alone inside a `with` block, as in PEFT."""
        return self.using("base")

    def fit(
        self,
        examples: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
        *,
        dev: Sequence[Mapping[str, Any]] | None = None,
        config: FitConfig | None = None,
    ) -> FitResult:
        """Learn what the method learns from examples; base and adapters stay as they are.

        Args:
            examples: each `{"prompt": ..., "completion": ...}` or `{"messages": [...]}`; 200 are enough. Methods that
                learn from the adapters' own data want such examples of each adapter, by its name.
            dev: examples on which the best checkpoint is chosen; without them, the last one is kept.
            config: the recipe; by default the method's own.

        Returns:
            Losses, time, and which examples were cut.
        """
        from loraflow.training import fit

        return fit(self, examples, dev=dev, config=config)

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
        if not self._gates:
            raise LoraflowError("The method in use is 'base', which has no fusion weights. Trace another method.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self._turn(), self._evaluating(), self._recording() as recorded:
            positions = _positions(self.base_model, mask)
            forward = functools.partial(self.base_model, use_cache=False, **positions, **kwargs)
            if isinstance(self.method, QueryMethod):
                prompt = slice(0, prompt_length or None)
                weights = self._weigh(self.method, self._gates, input_ids[:, prompt], mask[:, prompt])
                with self._lanes(lanes_of_weights(self._attachment, weights, len(input_ids))):
                    forward(input_ids=input_ids, attention_mask=mask)
            else:
                forward(input_ids=input_ids, attention_mask=mask)
        none = torch.zeros(*input_ids.shape, len(self.adapters))
        per_layer = [torch.stack(list(w.values())).mean(dim=0).cpu() if w else none for w in recorded]
        module_weights = {
            f"layers.{index}.{name}": w.cpu()
            for index, found in enumerate(recorded)
            for name, w in found.items()
            if name
        }
        return Trace(
            weights=torch.stack(per_layer, dim=2),
            adapters=tuple(self.adapter_names),
            tokens=[self._token_texts(row) for row in input_ids.tolist()],
            input_ids=input_ids.cpu(),
            attention_mask=mask.cpu(),
            prompt_length=prompt_length,
            module_weights=module_weights,
            method=self.method.name,
            level=self.method.level,
            place=self.method.place,
        )

    @contextlib.contextmanager
    def _recording(self) -> Iterator[list[dict[str, Tensor]]]:
        fusions = self._attachment.fusions
        recorded: list[dict[str, Tensor]] = [{} for _ in fusions]
        try:
            for fusion, weights in zip(fusions, recorded, strict=True):
                fusion.recorded = weights
            yield recorded
        finally:
            for fusion in fusions:
                fusion.recorded = None

    def _token_texts(self, ids: list[int]) -> list[str]:
        if self.tokenizer is None:
            return [str(token_id) for token_id in ids]
        return token_texts(self.tokenizer, ids)

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

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are learned, of how many."""
        learned, total = self.num_learned_parameters(), sum(p.numel() for p in self.parameters())
        print(f"trainable params: {learned:,} || all params: {total:,} || trainable%: {100 * learned / total:.4f}")

    def save_pretrained(self, directory: str | Path, *, copy_adapters: bool = False) -> None:
        """Write `fusion_config.json`, `fusion.safetensors` and a model card.

        Args:
            directory: where to; an older fusion there is replaced only by a complete new one.
            copy_adapters: copy local adapters into the directory, so that it can be moved elsewhere as it is.

        Raises:
            FusionError: if the directory is a file.
        """
        self._save(Path(directory).expanduser(), copy_adapters=copy_adapters, publish=False)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Save to a Hub repository, local adapters included, and return its address."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as directory:
            self._save(Path(directory), copy_adapters=True, publish=True)
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Upload loraflow fusion")
            )

    def _save(self, directory: Path, *, copy_adapters: bool, publish: bool) -> None:
        if directory.is_file():
            raise FusionError(f"{directory} is a file. Give a directory.")
        directory.mkdir(parents=True, exist_ok=True)
        old_copies = recorded_copies(directory)
        config = self._config(directory, copy_adapters)
        if publish and config.base.path.startswith("."):
            # A path of this machine means nothing elsewhere; whoever loads the fusion is asked for the base.
            config.base.path = ""
        write_fusion(directory, config, self.state_dict(), model_card(config, self.num_learned_parameters()))
        for copy in old_copies - recorded_copies(directory):
            shutil.rmtree(copy, ignore_errors=True)

    def _exchange_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Take all adapters out and put others in, under the base's method; calls that wait for their turn go on.

        Where that fails the model is as it was, but for its method.
        """
        with self._turn():
            before = self._attachment
            before.detach()
            try:
                self._attachment = before.again(adapters)
            except BaseException:
                self._attachment = before.again(before.adapters)
                raise
            finally:
                self._made.clear()
                self.set_method("base")

    def unload(self) -> PreTrainedModel:
        """Take adapters and gates out and return the base model, bit for bit as it was; this object is empty then."""
        self._attachment.detach()
        self._gates = {}
        return self.base_model

    def _config(self, directory: Path, copy_adapters: bool) -> FusionConfig:
        base = self._base.model_copy(update={"path": relative_source(self._base.path, directory)})
        records = []
        for adapter in self.adapters:
            path = adapter.source.path
            if adapter.source.is_local:
                if copy_adapters:
                    path = str(copy_adapter(adapter, directory))
                path = relative_source(path, directory)
            records.append(
                AdapterRecord(name=adapter.name, path=path, revision=adapter.source.revision, digest=adapter.digest)
            )
        return FusionConfig(
            loraflow_version=__version__,
            base=base,
            adapters=records,
            method=MethodRecord(name=self.method.name, parameters=self.method.parameters()),
            prompt=self.prompt,
            training=self.training_record,
            weights_digest=tensors_digest(self.state_dict()),
        )


_classes: dict[tuple[type, type], type[FusedModel]] = {}


def _class_for(cls: type[FusedModel], base_class: type[PreTrainedModel]) -> type[FusedModel]:
    """The class with the base's signature on `forward`: the Trainer reads from it which columns a model takes."""
    if (cls, base_class) not in _classes:
        _classes[cls, base_class] = _with_forward_of(cls, base_class)
    return _classes[cls, base_class]


def _with_forward_of(cls: type[FusedModel], base_class: type[PreTrainedModel]) -> type[FusedModel]:
    def forward(self: FusedModel, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    forward.__doc__ = cls.forward.__doc__
    forward.__signature__ = inspect.signature(base_class.forward)  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__})


def check_adapter_names(names: Sequence[str]) -> None:
    """Check that adapters can be called so.

    Raises:
        LoraflowError: if there is none, or a name is a path, or means something else.
    """
    if not names:
        raise LoraflowError("No adapters were given. Give at least one, by name.")
    reserved = ("best", *method_names())
    for name in names:
        if name in reserved or not name.strip() or "/" in name or name.startswith("."):
            raise LoraflowError(
                f"The adapter name {name!r} cannot be used: it must be no path, and none of {', '.join(reserved)}. "
                "Rename it."
            )


def _load(name: str, source: str | Path | AdapterSource | Adapter) -> Adapter:
    return dataclasses.replace(source, name=name) if isinstance(source, Adapter) else load_adapter(name, source)


def _load_recorded(sources: Mapping[str, Any], config: FusionConfig) -> dict[str, Adapter]:
    loaded = {}
    for record in config.adapters:
        source = sources[record.name]
        try:
            adapter = _load(record.name, source)
        except AdapterError as error:
            raise FusionError(
                f"The fusion's adapter {record.name!r} cannot be read from where it was: {error} Say where it is now: "
                f'`adapters={{"{record.name}": ...}}`, or --lora-modules {record.name}=...'
            ) from error
        if adapter.digest != record.digest:
            raise FusionError(
                f"Adapter {record.name!r} ({adapter.source.path}) is not the one that the fusion was made with: its "
                f"weights or scaling have the digest {adapter.digest[:19]}..., not {record.digest[:19]}... "
                "Restore it, or fit again."
            )
        loaded[record.name] = adapter
    return loaded


def _open_base(
    base: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: BaseOptions | None
) -> tuple[PreTrainedModel, BaseRecord, PreTrainedTokenizerBase | None]:
    """The base model as it is before anything is attached, what tells it from others, and its tokenizer."""
    if isinstance(base, nn.Module):
        if options is not None:
            raise LoraflowError("`options` say how a base is loaded, but `base` is a loaded model. Leave them out.")
        check_unfused(base)
        find_decoder_layers(base)
        return base, base_record(base), tokenizer
    options = options or BaseOptions()
    model = load_base(base, options)
    find_decoder_layers(model)
    return model, base_record(model), tokenizer or _tokenizer_if_any(base, options)


def _recorded_options(record: BaseRecord, options: BaseOptions | None, *, same_place: bool) -> BaseOptions:
    """Options with what they leave open as it was when the fusion was made."""
    options = options or BaseOptions()
    return dataclasses.replace(
        options,
        revision=options.revision or (record.revision if same_place else None),
        dtype=record.dtype if options.dtype == "auto" else options.dtype,
        quantization=record.quantization if options.quantization is None else options.quantization,
    )


def _tokenizer_if_any(base: str | Path, options: BaseOptions) -> PreTrainedTokenizerBase | None:
    # A base without tokenizer files is whole for callers that bring token ids; text needs `tokenizer=`, and says so.
    try:
        return load_tokenizer(base, options)
    except (OSError, ValueError):
        return None


def _positions(model: nn.Module, mask: Int[Tensor, "batch seq"]) -> dict[str, Tensor]:
    """Positions that count real tokens only, as `generate` gives them; a bare forward counts padding too."""
    if bool(mask.all()) or "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}


def _announce_to_pipelines() -> None:
    """Let `transformers.pipeline` know the class, as it knows PEFT's: it reports unknown ones as unsupported."""
    from transformers.pipelines import base

    names = getattr(base, "SUPPORTED_PEFT_TASKS", {}).get("text-generation", [])
    if FusedModel.__name__ not in names:
        names.append(FusedModel.__name__)

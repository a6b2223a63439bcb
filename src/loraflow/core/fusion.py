"""A fusion at work: a base model with adapters in it, and the method that weighs them."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig

from loraflow.core.batch import (
    RowMethod,
    RowWeights,
    WeighPrompts,
    beside_tokens,
    lanes_of_methods,
    lanes_of_rows,
    prompt_mask,
    read_weights,
    refuse_prompts,
    weigh_prompts,
)
from loraflow.core.head import call_with_labels
from loraflow.core.lanes import Gates, constant_weights_of
from loraflow.core.readings import readings
from loraflow.core.state import FusionState
from loraflow.errors import LoraflowError, MethodError
from loraflow.methods import Method, QueryMethod
from loraflow.methods.base import AddsUpdate
from loraflow.visual.tokens import token_texts
from loraflow.visual.trace import Trace

PromptMask = Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"]
"""Which tokens of a batch are of prompts."""

_INSTEAD = "Call `generate`, which takes several prompts at once, or let `loraflow serve` answer many requests."


class _AsBase:
    """A fusion to a forward that was written for models of transformers', in which `base_model` is what has no head."""

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fusion, name)

    def __reduce__(self) -> tuple[type[_AsBase], tuple[Fusion]]:
        return _AsBase, (self._fusion,)

    def base_model(self, *args: Any, **kwargs: Any) -> Any:
        """The base without its head, with the fused adapters in it."""
        with self._fusion.at_work():
            return self._fusion.base_model.base_model(*args, **kwargs)


class Fusion(FusionState):
    """A fusion that answers, used as its base model is: `forward` and `generate` take what the base's own take.

    Threads may share it: calls take turns, and what a thread has chosen with `using` is that thread's alone. A turn is
    a call's, not a training step's: with gradient checkpointing, a training loop of your own beside other threads holds
    `attachment.turn()` for each step. `fit` holds it all the time.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Bind a forward that is put on the model, as trainers do, to what it takes for a model of transformers'."""
        if name == "forward" and getattr(value, "__self__", None) is self:
            value = types.MethodType(value.__func__, _AsBase(self))
        super().__setattr__(name, value)

    # Answering.

    def forward(
        self,
        *args: Any,
        methods: Sequence[RowMethod] | None = None,
        fusion_weights: RowWeights | None = None,
        prompt_mask: PromptMask | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, with the fused adapters in it.

        With `labels`, the head and the loss see the positions only that predict one (`core/head.py`); the logits of all
        of them are computed when something is done with them.

        Args:
            args: the base's.
            methods: who weighs each row, where rows differ, as for `generate`.
            fusion_weights: weights of each row instead.
            prompt_mask: 1 at the tokens of each row's prompt, 0 elsewhere, for methods that read prompts.
            kwargs: the base's.

        Raises:
            MethodError: if a method reads whole prompts, and nothing says what they are.
        """
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        rows = None if inputs is None else len(inputs)
        with self.at_work():
            if methods is None and fusion_weights is None:
                if prompt_mask is None or not self.method.reads_prompt:
                    return self._forward(args, kwargs)
                methods = [None] * (rows or 1)
            weigh = refuse_prompts if prompt_mask is None else self._reader(inputs, prompt_mask, beside_tokens(kwargs))
            lanes = lanes_of_rows(self.attachment, methods, fusion_weights, rows, self._gates_of, weigh)
            with self.attachment.weighing(lanes):
                return self._forward(args, kwargs)

    def _forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        model = self.attachment.model
        return call_with_labels(model, model, args, kwargs, self.attachment.turn)

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
            fusion_weights: weights of each request instead, for all layers or for each; outputs are mixed by them, or
                parameters where a method that weighs whole prompts is in use and does so (`weigh` gives its weights).
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

        with self.at_work():
            if methods is None and fusion_weights is None:
                if not self.method.reads_prompt:
                    return generate(*given, **kwargs)
                methods = [None] * (rows or 1)
            options = {**kwargs, "generation_config": generation_config}
            mask = None if ids is None else prompt_mask(ids, options, self.generation_config)
            weigh = self._reader(ids, mask, beside_tokens(kwargs))
            lanes = lanes_of_rows(self.attachment, methods, fusion_weights, rows, self._gates_of, weigh)
            with self.attachment.weighing(lanes):
                return generate(*given, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching of many prompts, under the method in use; other threads wait till it ends.

        Args:
            args: transformers'.
            kwargs: transformers'.

        Raises:
            LoraflowError: if requests are to have methods of their own, or the cache is to be kept for later calls.
            MethodError: if the method weighs whole prompts.
        """
        for name in ("methods", "fusion_weights"):
            if kwargs.get(name) is not None:
                raise LoraflowError(f"`generate_batch` has one method for all requests, and no `{name}`. {_INSTEAD}")
        if kwargs.get("persistent_manager"):
            raise LoraflowError(
                "`persistent_manager` would keep a cache for later calls, in which the keys and values are of the "
                "weights of this one. Leave it out."
            )
        with self._batching():
            return cast(Any, self.base_model).generate_batch(*args, **kwargs)

    @contextlib.contextmanager
    def continuous_batching_context_manager(self, **kwargs: Any) -> Iterator[Any]:
        """transformers' manager of a continuous batch, for the method in use; other threads wait till the block ends.

        Args:
            kwargs: transformers'.

        Yields:
            The manager.
        """
        with self._batching(), cast(Any, self.base_model).continuous_batching_context_manager(**kwargs) as manager:
            yield manager

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a manager that would outlive the model's turn.

        Args:
            args: transformers'.
            kwargs: transformers'.

        Raises:
            LoraflowError: always.
        """
        raise LoraflowError(
            "A manager of continuous batching runs in a thread of its own, beside other calls that weigh otherwise. "
            "Open it for a while with `with model.continuous_batching_context_manager() as manager:`, or call "
            "`generate_batch`."
        )

    @contextlib.contextmanager
    def _batching(self) -> Iterator[None]:
        """The turn for a batch whose steps another thread runs, none of which says what the prompts are."""
        with self.at_work():
            if self.method.reads_prompt:
                raise MethodError(
                    f"The method {self.method.name!r} weighs each prompt before it is answered, and a step of "
                    f"continuous batching does not say what the prompts are. {_INSTEAD}"
                )
            if self.gates and self.attachment.keeps:
                raise LoraflowError(
                    f"Linears of {type(self.base_model).__name__} read all cached positions, whose weights continuous "
                    "batching has no place for. Call `generate`, which takes several prompts at once."
                )
            yield

    def weigh(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        method: str | Method | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch layers adapters"]:
        """The weights that a query-level method gives prompts, each by itself; constant while they are answered.

        Args:
            input_ids: the prompts.
            attention_mask: 1 at real tokens, 0 at padding on either side.
            method: the method; by default the fusion's own.
            kwargs: what the base takes beside tokens, such as the images of one prompt.

        Raises:
            MethodError: if the method does not weigh whole prompts, or cannot read what is beside their tokens.
        """
        with self.at_work():
            chosen, gates = self._gates_of(method)
            if not isinstance(chosen, QueryMethod):
                raise MethodError(
                    f"The method {chosen.name!r} does not weigh whole prompts. `trace` shows the weights that it gives."
                )
            return self._weigh(chosen, gates, input_ids, attention_mask, beside_tokens(kwargs))

    def _reader(self, ids: Tensor | None, mask: Tensor | None, beside: Mapping[str, Tensor]) -> WeighPrompts:
        """What reads the prompts of rows, where a method does; their padding is masked."""

        def weigh(method: Method, gates: Gates, requests: list[int]) -> Tensor:
            if ids is None or ids.is_floating_point():
                raise MethodError(f"The method {method.name!r} reads the prompt, and `input_ids` is missing.")
            return self._weigh(method, gates, ids[requests], None if mask is None else mask[requests], beside)

        return weigh

    @torch.no_grad()
    def _weigh(
        self,
        method: Method,
        gates: Gates,
        ids: Tensor,
        mask: Tensor | None,
        beside: Mapping[str, Tensor],
    ) -> Tensor:
        gate = gates.get("model")
        with self.attachment.turn(), self.evaluating():
            return weigh_prompts(self.attachment, method, gate, ids, mask, self.tokenizer, beside=beside)

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
        return self._choice.gates_of(method, self.attachment)

    # What it weighed.

    @torch.no_grad()
    def trace(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        *,
        prompt_length: int = 0,
        prompt_mask: PromptMask | None = None,
        **kwargs: Any,
    ) -> Trace:
        """The fusion weights at every position of a text, computed in one forward.

        Args:
            input_ids: the text: a prompt, or a prompt and the answer that `generate` returned.
            attention_mask: 1 at real tokens, 0 at padding on either side.
            prompt_length: how many positions are the prompt's; pictures show the rest as generated. Methods that weigh
                whole prompts read these, or all where it is 0.
            prompt_mask: 1 at the tokens of each row's prompt, where rows differ, for methods that read them.
            kwargs: anything else for the base model's forward.

        Returns:
            The weights, which show themselves in a notebook.

        Raises:
            LoraflowError: if the base alone is in use, which has no fusion weights.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self.at_work(), self.evaluating():
            method, gates, lanes = self.method, self.gates, None
            if not gates:
                raise LoraflowError("The method in use is 'base', which has no fusion weights. Trace another method.")
            if method.reads_prompt:
                read = mask.clone() if prompt_mask is None else mask * prompt_mask
                read[:, prompt_length or read.shape[1] :] = 0
                weigh = self._reader(input_ids, read, beside_tokens(kwargs))
                lanes = lanes_of_methods(self.attachment, [(method, gates)] * len(input_ids), weigh)
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
            readings=self._readings(gates) if method.adds and method.level == "task" else {},
        )

    def _readings(self, gates: Gates) -> dict[str, Float[Tensor, "writers readers"]]:
        """Who reads whom in each linear whose gate adds an update of its own."""
        sites, found = self.attachment.sites["module"], {}
        for name, gate in gates.items():
            (updates,) = sites[name].updates.values()
            weights = constant_weights_of(gate, sites[name].features)
            found[name] = readings(updates, weights, cast(AddsUpdate, gate).factors())
        return found

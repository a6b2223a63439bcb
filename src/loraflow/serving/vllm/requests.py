"""Requests with fusion weights of their own, followed as they come and go, into a `RequestTable`.

On vLLM's V1 model runner a logits processor is told how the requests of a batch come, go and move; this one changes no
logits, but notes each request's weights by place in the batch. On V2 the model's own state is told of requests
(`model_state`), by a slot that they keep; the processor only refuses wrong weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from loraflow.core.swap import swap_class
from loraflow.errors import LoraflowError
from loraflow.saved.fusion import SavedFusion
from loraflow.serving.vllm import LOAD_FORMAT
from loraflow.serving.vllm.request_table import RequestTable
from loraflow.serving.vllm.request_weights import KEY, check_request, fusion_of, processor_name
from loraflow.serving.vllm.seam import (
    BatchUpdate,
    LogitsProcessor,
    LogitsProcessorV2,
    MoveDirectionality,
    request_starts,
)

# By the identity of the engine's configuration, which is kept alive here: a logits processor is made before the model.
_TABLES: dict[int, tuple[Any, RequestTable]] = {}


class RequestWeights(LogitsProcessor, LogitsProcessorV2):
    """Follows the requests of a batch. Its subclasses, one for each fusion, are what `processor_name` names.

    It is a processor of both model runners, since vLLM loads it by its name before it says which one runs.

    Attributes:
        fusion: the fusion.
        adapters: names of its adapters, in order.
        layers: number of decoder layers.
        required: whether every request must bring weights.

    Raises:
        LoraflowError: if the base is loaded without a fusion.
    """

    fusion: ClassVar[str]
    adapters: ClassVar[tuple[str, ...]]
    layers: ClassVar[int]
    required: ClassVar[bool]

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        if vllm_config.load_config.load_format != LOAD_FORMAT:
            raise LoraflowError(
                "Requests bring fusion weights, and the base is loaded without a fusion. Add --load-format "
                f"{LOAD_FORMAT}."
            )
        self._config = vllm_config

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose weights are missing or wrong, before it is queued."""
        check_request(sampling_params.extra_args, cls.adapters, cls.layers, required=cls.required)

    def is_argmax_invariant(self) -> bool:
        """It changes no logits."""
        return True

    def apply(self, logits: Tensor, *_: Any) -> Tensor:
        """Give the logits as they are."""
        return logits

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Say that a request's logits stay (V2); the model's state notes its weights."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that leave, come and move (V1); vLLM calls this before each forward."""
        if batch_update is None:
            return
        _, table = _TABLES[id(self._config)]
        for place in batch_update.removed:
            table.put(place, None)
        for place, params, _, _ in batch_update.added:
            table.put(place, (params.extra_args or {}).get(KEY))
        for source, target, direction in batch_update.moved:
            if direction == MoveDirectionality.SWAP:
                table.swap(source, target)
            else:
                table.move(source, target)


class RequestingModel(nn.Module):
    """Mixed into the class of a model of vLLM: notes which tokens are whose before its forward (V1)."""

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        starts = request_starts()
        if starts is not None:
            table: Any = self.loraflow_requests
            table.locate(starts, positions.shape[-1])
        return super().forward(input_ids, positions, *args, **kwargs)


def install_table(model: nn.Module, table: RequestTable, vllm_config: Any) -> None:
    """Let a model find the weights of its requests in a table, and whoever hears of the requests fill it."""
    model.loraflow_requests = table
    if vllm_config.use_v2_model_runner:
        # Late: V2 is for GPUs, and what it imports need not be there elsewhere.
        from loraflow.serving.vllm.model_state import StatefulModel

        swap_class(model, StatefulModel)
        return
    swap_class(model, RequestingModel)
    _TABLES[id(vllm_config)] = (vllm_config, table)


def requested_fusion(processors: Sequence[Any] | None) -> str | None:
    """The fusion whose requests bring weights, by the logits processors that vLLM was given; None where none does."""
    for processor in processors or ():
        if isinstance(processor, str):
            found = fusion_of(processor)
        else:
            found = getattr(processor, "fusion", None) if issubclass(processor, RequestWeights) else None
        if found is not None:
            return found
    return None


@functools.lru_cache
def _processor(fusion: str) -> type[RequestWeights]:
    saved = SavedFusion.open(fusion)
    members = {
        "fusion": fusion,
        "adapters": tuple(saved.adapter_names),
        "layers": saved.config.base.num_hidden_layers,
        "required": saved.method.level == "query",
        "__module__": __name__,
        "__doc__": RequestWeights.__doc__,
    }
    return type(processor_name(fusion).partition(":")[2], (RequestWeights,), members)


def __getattr__(name: str) -> Any:
    """The classes that `processor_name` names."""
    fusion = fusion_of(f"{__name__}:{name}")
    if fusion is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _processor(fusion)

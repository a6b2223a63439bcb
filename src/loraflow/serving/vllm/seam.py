"""All that the plug-in takes from vLLM and reads off its objects: no other file of loraflow imports vLLM.

Another version of vLLM may have moved a class, or call a setting otherwise: it is here that this is seen and mended.
What was tried with which versions is in docs/vllm.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from loraflow.errors import ArchitectureError, LoraflowError
from loraflow.serving.vllm.request_weights import SCHEDULER
from loraflow.serving.vllm.settings import EngineSettings
from loraflow.serving.vllm.shards import Heads, Part, Rank, attention_parts, even_parts

if TYPE_CHECKING:
    # Late: what computes needs PEFT, and vLLM reads this file in each of its processes.
    from loraflow.serving.vllm.delta import FusedDelta, Gather

__all__ = [
    "AsyncScheduler",
    "BaseModelLoader",
    "BatchUpdate",
    "LinearBase",
    "LinearMethodBase",
    "LoadConfig",
    "LogitsProcessor",
    "LogitsProcessorV2",
    "ModelConfig",
    "MoveDirectionality",
    "Request",
    "Scheduler",
    "VllmConfig",
    "columns_of",
    "default_model_state",
    "engine_settings",
    "gather_of",
    "get_model_loader",
    "init_logger",
    "packed_names",
    "parts_of",
    "register_model_loader",
    "request_starts",
    "set_update",
]


# ---- The engine -----------------------------------------------------------------------------------------------------


def engine_settings(config: Any) -> EngineSettings:
    """How an engine is set up, of what matters to a fusion."""
    model, parallel = config.model_config, config.parallel_config
    return EngineSettings(
        architecture=model.architecture,
        runner=model.runner_type,
        latent_attention=model.use_mla,
        sleep_mode=model.enable_sleep_mode,
        pipeline_parallel=parallel.pipeline_parallel_size,
        data_parallel=parallel.data_parallel_size,
        context_parallel=max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size),
        expert_parallel=parallel.enable_expert_parallel,
        micro_batches=parallel.use_ubatching,
        speculative=config.speculative_config is not None,
        kv_transfer=config.kv_transfer_config is not None,
        cache_dir=bool(config.compilation_config.cache_dir),
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        salted=_name_of(config.scheduler_config.scheduler_cls) == SCHEDULER,
        v2_runner=config.use_v2_model_runner,
    )


def _name_of(kind: Any) -> Any:
    """A class by its dotted name; vLLM takes either."""
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind


def request_starts() -> Tensor | None:
    """Where the tokens of each request of the running forward start; None where nobody's are computed (a warm-up).

    Raises:
        LoraflowError: if the attention does not tell.
    """
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return None
    first = next(iter(metadata.values())) if isinstance(metadata, dict) else metadata
    starts = getattr(first, "query_start_loc", None)
    if starts is None:
        raise LoraflowError(
            f"Attention of the kind {type(first).__name__} does not tell where requests start. Serve without "
            "weights of requests."
        )
    return starts


def default_model_state() -> type:
    """What keeps a model's state on the V2 runner."""
    # Late: V2 is for GPUs, and what it imports need not be there elsewhere.
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return DefaultModelState


# ---- The model ------------------------------------------------------------------------------------------------------


def packed_names(model: nn.Module) -> Mapping[str, Sequence[str]]:
    """The names in transformers of what each linear of a model packs, where it packs several."""
    return dict(getattr(model, "packed_modules_mapping", None) or {})


def parts_of(linear: LinearBase, name: str) -> list[Part]:
    """The linears that a linear of vLLM packs, as this rank computes them.

    Raises:
        ArchitectureError: if it is of a kind that is not known.
    """
    rank = Rank(linear.tp_rank, linear.tp_size)
    kind = type(linear)
    if kind is QKVParallelLinear:
        heads = Heads(linear.total_num_heads, linear.total_num_kv_heads, linear.head_size, linear.v_head_size)
        return attention_parts(heads, rank)
    if kind is MergedColumnParallelLinear:
        return even_parts(linear.output_sizes, rank)
    if kind is ColumnParallelLinear:
        return even_parts([linear.output_size], rank)
    if kind in (RowParallelLinear, ReplicatedLinear):
        return even_parts([linear.output_size], Rank())
    raise ArchitectureError(
        f"'{name}' is a {kind.__name__}, of which it is not known how it packs and splits its weights. Leave it out of "
        "`target_modules`."
    )


def columns_of(linear: LinearBase) -> slice:
    """The columns of the input that this rank reads."""
    if isinstance(linear, RowParallelLinear):
        return Rank(linear.tp_rank, linear.tp_size).share(linear.input_size)
    return slice(0, linear.input_size)


def gather_of(linear: LinearBase) -> Gather | None:
    """What makes a rank's input the whole one, where it is not."""
    return tensor_model_parallel_all_gather if isinstance(linear, RowParallelLinear) and linear.tp_size > 1 else None


def set_update(linear: Any, delta: FusedDelta, method: LinearMethodBase) -> None:
    """Let a linear compute by another method, which adds the adapters' updates."""
    linear.loraflow = delta
    linear.quant_method = method
    # Some layers would hand over activations that are quantised already, which the adapters cannot read.
    linear.requires_unquantized_input = True

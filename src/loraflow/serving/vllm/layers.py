"""vLLM's own layers, told to fuse: their classes and linear methods are exchanged, nothing in vLLM is patched."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from loraflow.core.swap import swap_class
from loraflow.errors import ArchitectureError
from loraflow.serving.vllm.delta import FusedDelta, Gather, LayerWeights
from loraflow.serving.vllm.shards import Heads, Part, Rank, attention_parts, even_parts


class FusedMethod(LinearMethodBase):
    """A linear's own method, quantised or not, and the adapters' updates after it.

    They are added before a row-parallel linear sums its ranks, so that the ranks' parts of them are summed too.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        """What vLLM asks of the linear's own method.

        Raises:
            AttributeError: if that has no such attribute.
        """
        if name == "inner":
            # A copy asks for it before it has it.
            raise AttributeError(name)
        return getattr(self.inner, name)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the linear's own method."""
        self.inner.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As the linear's own method."""
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear's own output, and the updates."""
        delta: Any = layer.loraflow
        return delta(x, self.inner.apply(layer, x, bias))


class FusedVllmLayer(nn.Module):
    """Mixed into the class of a decoder layer of vLLM: computes the fusion weights before anything else in it."""

    loraflow: LayerWeights
    loraflow_inputs: dict[str, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, with its fusion weights in place."""
        guard = self.loraflow.shared.guard
        found: dict[str, Any] = {}
        for name, position in self.loraflow_inputs.items():
            value = args[position] if position < len(args) else kwargs.get(name)
            found[name] = value if value is None else guard(value)
            if position < len(args):
                args = (*args[:position], found[name], *args[position + 1 :])
            elif name in kwargs:
                kwargs[name] = found[name]
        self.loraflow.open(found["hidden_states"], found.get("residual"))
        output = super().forward(*args, **kwargs)
        self.loraflow.close()
        return output


def reads_stream(layer: nn.Module) -> bool:
    """Whether a module has the signature of a decoder layer."""
    return "hidden_states" in inspect.signature(type(layer).forward).parameters


def add_weights(layer: Any, weights: LayerWeights) -> None:
    """Let a decoder layer compute fusion weights."""
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    layer.loraflow = weights
    layer.loraflow_inputs = {name: names.index(name) for name in ("hidden_states", "residual") if name in names}
    swap_class(layer, FusedVllmLayer)


def add_update(linear: Any, delta: FusedDelta) -> None:
    """Let a linear add the adapters' updates."""
    linear.loraflow = delta
    linear.quant_method = FusedMethod(linear.quant_method)
    # Some layers would hand over activations that are quantised already, which the adapters cannot read.
    linear.requires_unquantized_input = True


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

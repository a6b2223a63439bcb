"""vLLM's own layers, told to fuse: their classes and linear methods are exchanged, nothing in vLLM is patched."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from loraflow.core.swap import swap_class
from loraflow.serving.vllm.delta import FusedDelta, LayerWeights
from loraflow.serving.vllm.seam import LinearMethodBase, set_update


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
    set_update(linear, delta, FusedMethod(linear.quant_method))

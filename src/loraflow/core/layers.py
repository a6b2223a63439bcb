"""Fused decoder layers: each calls its gates before anything else in it.

A decoder layer keeps its place, name and parameters. Its class is swapped for a subclass whose `forward` first opens
the layer's context, and a `LayerFusion` submodule owns what the fusion adds to it. The gate is called inside the
layer's own `forward`, so that gradient checkpointing recomputes it with the rest of the layer in every version of
transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from loraflow.core.context import LayerContext
from loraflow.core.group import InputGroup
from loraflow.core.lanes import Lanes, RowGate


class LayerFusion(nn.Module):
    """What a fusion adds to a decoder layer: gates, and the stacked adapters of its linears.

    Attributes:
        context: how weights come from the gates to the linears.
        groups: what is fused, by the input that it reads.
        gates: the gates that this layer owns.
    """

    context: LayerContext
    groups: nn.ModuleList
    gates: nn.ModuleDict

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        self.context = context
        self.groups = nn.ModuleList()
        self.gates = nn.ModuleDict()

    def set_dropout(self, probability: float) -> None:
        """Drop inputs of the adapters with this probability while training."""
        for group in self.groups:
            cast(InputGroup, group).dropout = probability

    def install(self, lanes: Lanes, owned: Mapping[str, nn.Module]) -> None:
        """Let a method weigh every row from now on; of its gates, by site, this layer owns these."""
        # nn.ModuleDict takes no dots.
        self.gates = nn.ModuleDict({site.replace(".", "/"): gate for site, gate in owned.items()})
        self.context.set_own(lanes)


class FusedDecoderLayer(nn.Module):
    """Mixed into a decoder layer's class: has its fusion weights in place while its own forward runs."""

    fusion: LayerFusion

    def __call__(self, *args, **kwargs):
        """Run the layer, inside gradient checkpointing where that is on."""
        context = self.fusion.context
        if context.lanes is context.own and not context.own.reads_embeddings and not self.training:
            return super().__call__(*args, **kwargs)
        hidden_states, args, kwargs = _take_stream(args, kwargs)
        if self._checkpoints_without_gradient(hidden_states) and self._learns():
            # Reentrant checkpointing gives no gradient to a segment none of whose inputs requires one.
            hidden_states = hidden_states.detach().requires_grad_()
        return super().__call__(hidden_states, *args, **kwargs, **context.carried(hidden_states))

    def forward(self, *args, fusion_embeddings: Tensor | None = None, fusion_lanes: Lanes | None = None, **kwargs):
        """The decoder layer's own forward, with its fusion weights in place."""
        context = self.fusion.context
        context.open(args[0] if args else kwargs["hidden_states"], fusion_embeddings, fusion_lanes)
        try:
            if not context.keeps:
                return super().forward(*args, **kwargs)
            with context.keeping((*args, *kwargs.values())):
                return super().forward(*args, **kwargs)
        finally:
            context.close()

    def _checkpoints_without_gradient(self, hidden_states: Tensor) -> bool:
        return (
            self.training
            and getattr(self, "gradient_checkpointing", False)
            and torch.is_grad_enabled()
            and not hidden_states.requires_grad
        )

    def _learns(self) -> bool:
        """Whether something in the layer does; below the first that does, nothing is to be kept for a backward."""
        gates = self.fusion.context.own_gates()
        parameters = (parameter for module in (self, *gates) for parameter in module.parameters())
        # Weights that a call was given are no parameters, and may want a gradient all the same.
        given = (gate.weights for gate in gates if isinstance(gate, RowGate))
        return any(tensor.requires_grad for tensor in itertools.chain(parameters, given))


def _take_stream(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], args, {key: value for key, value in kwargs.items() if key != "hidden_states"}

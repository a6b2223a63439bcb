"""Constant fusion weights: the base alone, one adapter, the average, or any given weights, also for each layer.

Cost: one low-rank pass, nothing learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.errors import MethodError
from loraflow.methods.base import Level, Method, Place, Site
from loraflow.methods.checks import check_weights


class ConstantGate(nn.Module):
    """The same fusion weights for every input."""

    weights: Float[Tensor, " adapters"]

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, " adapters"]:
        """The constant weights, to be broadcast over the batch and the sequence."""
        return self.weights

    def known_weights(self) -> Float[Tensor, " adapters"]:
        """The weights, before anything is read."""
        return self.weights


@dataclass(frozen=True)
class Base(Method):
    """The base model alone, bit for bit."""

    name: ClassVar[str] = "base"
    level: ClassVar[Level] = "task"
    place: ClassVar[Place] = "layer"

    def gate(self, site: Site) -> nn.Module | None:  # noqa: D102
        return None


@dataclass(frozen=True)
class Average(Method):
    """Every adapter with weight 1/k."""

    name: ClassVar[str] = "average"
    level: ClassVar[Level] = "task"
    place: ClassVar[Place] = "layer"

    def gate(self, site: Site) -> nn.Module:  # noqa: D102
        return ConstantGate([1 / len(site.adapters)] * len(site.adapters))


@dataclass(frozen=True)
class Static(Method):
    """Given weights, the same for every token and query.

    Attributes:
        weights: weight by adapter name, for all layers; or a list of such, one for each layer. Adapters that are not
            named get 0.
    """

    weights: Mapping[str, float] | Sequence[Mapping[str, float]] = field(default_factory=dict)

    name: ClassVar[str] = "static"
    level: ClassVar[Level] = "task"
    place: ClassVar[Place] = "layer"

    def gate(self, site: Site) -> nn.Module:
        """The constant weights of one layer.

        Raises:
            MethodError: if weights are given for another number of layers.
        """
        weights = self.weights
        if not isinstance(weights, Mapping):
            if len(weights) != site.layers:
                raise MethodError(f"`weights` is for {len(weights)} layers, but the base has {site.layers}.")
            weights = weights[site.layer]
        return ConstantGate([float(weights.get(name, 0.0)) for name in site.adapters])

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        if not self.weights:
            example = json.dumps(dict.fromkeys(adapters, 0.5))
            raise MethodError(
                f"`static` needs `weights`, by adapter name. Give them, as in `weights={example}`, "
                "or take 'base' or 'average'."
            )
        if isinstance(self.weights, Sequence) and not isinstance(self.weights, str):
            for layer in self.weights:
                check_weights(layer, adapters, "weights")
        else:
            check_weights(self.weights, adapters, "weights")

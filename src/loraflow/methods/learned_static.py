"""Constant weights learned by gradient: the fair control for "is a dynamic gate needed?".

$$w = a \\in \\mathbb{R}^k$$

one vector for the whole model, for each layer, or for each linear module, fitted on the same examples, from the same
start and with the same optimiser as LoRA-Flow's gates; what a gate does better than these is what looking at the input
is worth.

Cost: one low-rank pass and k values for each place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.methods._shared.fitted import FittedOnExamples
from loraflow.methods.base import Learning, Level, Method, Site, check_choice


class LearnedWeights(nn.Module):
    """Fusion weights that are parameters, the same for every input."""

    def __init__(self, adapters: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(adapters))

    def start_at(self, weights: Sequence[float]) -> None:
        """Forget what was learned and give these fusion weights."""
        with torch.no_grad():
            self.weights.copy_(torch.tensor(weights))

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, " adapters"]:
        """The weights, to be broadcast over the batch and the sequence."""
        return self.weights

    def known_weights(self) -> Float[Tensor, " adapters"]:
        """The weights, before anything is read."""
        return self.weights


@dataclass(frozen=True)
class LearnedStatic(FittedOnExamples, Method):
    """Constant weights, learned by gradient.

    Attributes:
        granularity: one vector for the model ("task"), for each layer ("layer"), or for each linear module ("module").
        start: where training starts, as for LoRA-Flow: "best", "average", an adapter's name, or weights by name.
    """

    granularity: Literal["task", "layer", "module"] = "task"
    start: str | Mapping[str, float] = "best"

    name: ClassVar[str] = "learned-static"
    level: ClassVar[Level] = "task"
    learns: ClassVar[Learning] = "gradient"
    # A gate's logits are sums over hundreds of inputs; a bare weight moves by the learning rate a step at most. Decay
    # would pull the weights to zero adapters.
    recipe: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-2, "weight_decay": 0.0}

    def __post_init__(self) -> None:
        check_choice(self.granularity, ("task", "layer", "module"), "granularity")

    def gate(self, site: Site) -> LearnedWeights:  # noqa: D102
        gate = LearnedWeights(len(site.adapters))
        gate.start_at(self.start_weights(site.adapters, best=None))
        return gate

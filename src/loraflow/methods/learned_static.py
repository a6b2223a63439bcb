r"""Constant weights learned by gradient: the fair control for "is a dynamic gate needed?".

$$w = a \in \mathbb{R}^k$$

one vector for the whole model, for each layer, or for each linear module, fitted on the same examples, from the same
start and with the same optimiser as LoRA-Flow's gates; what a gate does better than these is what looking at the input
is worth.

With `activation="softmax"`, $w = \mathrm{softmax}(a)$ over the adapters: at granularity "module" and from equal
weights, that is CAT of LoRA Soups ([Prabhakar et al. 2024](https://arxiv.org/abs/2410.13025)), which learns one scalar
for each linear and adapter, $y = W x + \sum_i \mathrm{softmax}(a)_i\, s_i B_i A_i x$.

Cost: one low-rank pass and k values for each place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.errors import MethodError
from loraflow.methods._shared.fitted import FittedOnExamples
from loraflow.methods.base import Learning, Level, Method, Site
from loraflow.methods.checks import check_choice

# What people write as weights that sum to 1.
_SUM_TOLERANCE = 1e-3


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
        return self.known_weights()

    def known_weights(self) -> Float[Tensor, " adapters"]:
        """The weights, before anything is read."""
        return self.weights


class SoftmaxWeights(LearnedWeights):
    """Positive fusion weights that sum to 1, and whose logits are the parameters."""

    def start_at(self, weights: Sequence[float]) -> None:
        """Forget what was learned and give these fusion weights, which `LearnedStatic.check` found to be possible."""
        super().start_at([math.log(weight) for weight in weights])

    def known_weights(self) -> Float[Tensor, " adapters"]:
        """The weights, before anything is read."""
        return self.weights.softmax(dim=0)


@dataclass(frozen=True)
class LearnedStatic(FittedOnExamples, Method):
    """Constant weights, learned by gradient.

    Attributes:
        granularity: one vector for the model ("task"), for each layer ("layer"), or for each linear module ("module").
        start: where training starts, as for LoRA-Flow: "best", "average", an adapter's name, or weights by name.
        activation: "none", or "softmax" for positive weights that sum to 1 (CAT). These start at "average", or at
            weights by name; no adapter alone is among them.
    """

    granularity: Literal["task", "layer", "module"] = "task"
    start: str | Mapping[str, float] = "best"
    activation: Literal["none", "softmax"] = "none"

    name: ClassVar[str] = "learned-static"
    level: ClassVar[Level] = "task"
    learns: ClassVar[Learning] = "gradient"

    def __post_init__(self) -> None:
        check_choice(self.granularity, ("task", "layer", "module"), "granularity")
        check_choice(self.activation, ("none", "softmax"), "activation")

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What differs from LoRA-Flow's recipe; that of the softmax is CAT's own.

        A gate's logits are sums over hundreds of inputs; a bare weight moves by the learning rate a step at most. Decay
        would pull the weights to zero adapters. CAT warms up for 100 steps over its 10,000 examples, which at this
        library's batch of 4 are this share of them.
        """
        if self.activation == "softmax":
            return {"learning_rate": 1e-4, "epochs": 1, "warmup": 0.04, "weight_decay": 0.0}
        return {"learning_rate": 1e-2, "weight_decay": 0.0}

    def check(self, adapters: Sequence[str]) -> None:
        """Check `start` against the adapters that are to be fused.

        Raises:
            MethodError: if it names an unknown adapter, or is nothing that a softmax gives.
        """
        super().check(adapters)
        if self.activation == "none" or self.start == "average":
            return
        weights = [] if isinstance(self.start, str) else self.start_weights(adapters, best=None)
        if not weights or min(weights) <= 0 or abs(sum(weights) - 1) > _SUM_TOLERANCE:
            raise MethodError(
                f"`start` (={self.start!r}) is nothing that `activation='softmax'` gives: weights above 0, of all "
                "adapters, that sum to 1. Give `start='average'`, or such weights by name."
            )

    def gate(self, site: Site) -> LearnedWeights:  # noqa: D102
        gate = (SoftmaxWeights if self.activation == "softmax" else LearnedWeights)(len(site.adapters))
        gate.start_at(self.start_weights(site.adapters, best=None))
        return gate

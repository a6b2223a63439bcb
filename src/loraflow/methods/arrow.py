r"""Arrow: each linear sends each token to the adapters whose main input direction it lies along.

$$w = \operatorname{softmax}\nolimits_{\text{top } k}\big(|x \cdot v_i| / \tau\big)$$

with $v_i$ the top right singular vector of $B_i A_i$, of length one. Ranks and targets may differ: an adapter that does
not target a linear is not asked there. A DoRA's direction is that of its $B A$.

Paper: Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
[arXiv 2405.11157](https://arxiv.org/abs/2405.11157). Cost: one low-rank pass and one product of k rows for each linear;
nothing learned, no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from loraflow.methods._shared.scores import linear_scores, main_input_direction, targets_of, top_k_softmax
from loraflow.methods.base import Level, Method, Place, Site, check_positive, check_top_k

_TOP_K = 3


class ArrowGate(nn.Module):
    """The gate of one linear.

    Attributes:
        prototypes: v, `[adapters, features]`; zero for adapters that do not target the linear.
        targets: which adapters do, `[adapters]`.
    """

    prototypes: Float[Tensor, "adapters features"]
    targets: Bool[Tensor, " adapters"]

    def __init__(self, site: Site, top_k: int, temperature: float) -> None:
        super().__init__()
        updates = site.updates[site.module or ""]
        prototypes = torch.zeros(len(updates), site.features)
        for position, update in enumerate(updates):
            if update is not None:
                prototypes[position] = main_input_direction(update)
        self.register_buffer("prototypes", prototypes, persistent=False)
        self.register_buffer("targets", targets_of(site), persistent=False)
        self.top_k = top_k
        self.temperature = temperature

    @property
    def most(self) -> int:
        """How many adapters have a weight at one position, at most."""
        return self.top_k

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """Fusion weights of each position."""
        return top_k_softmax(linear_scores(x, self.prototypes).abs(), self.top_k, self.temperature, self.targets)


@dataclass(frozen=True)
class Arrow(Method):
    """Arrow's routing.

    Attributes:
        top_k: adapters for each token and linear; None is the paper's 3, or all where there are fewer.
        temperature: divisor of the scores before the softmax.
    """

    top_k: int | None = None
    temperature: float = 1.0

    name: ClassVar[str] = "arrow"
    paper: ClassVar[str] = "2405.11157"
    level: ClassVar[Level] = "token"
    place: ClassVar[Place] = "module"

    def __post_init__(self) -> None:
        check_positive(self.temperature, "temperature")

    def gate(self, site: Site) -> ArrowGate:  # noqa: D102
        return ArrowGate(site, self.top_k or min(_TOP_K, len(site.adapters)), self.temperature)

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.top_k, adapters)

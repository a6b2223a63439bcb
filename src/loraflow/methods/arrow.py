r"""Arrow: each linear sends each token to the adapters whose main input direction it lies along.

$$w = \operatorname{softmax}\nolimits_{\text{top } k}\big(|x \cdot v_i| / \tau\big)$$

with $v_i$ the top right singular vector of $B_i A_i$, of length one. Ranks and targets may differ: an adapter that does
not target a linear, or adds nothing there, is not asked. A DoRA's direction is that of its $B A$.

$v_i$ lies in the row space of $A_i$, so $v_i = A_i^T c_i$ and the score is $|c_i \cdot u_i|$ with $u_i = A_i x$, which
the fused pass has anyway (`loraflow.methods._shared.scored`). It takes that or the product with all $v_i$, whichever
costs less: with few tokens that product is less work to start, and with many adapters it tells whose A need be read.

Paper: Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
[arXiv 2405.11157](https://arxiv.org/abs/2405.11157). Cost: one low-rank pass; nothing learned, no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loraflow.adapters import LoraModule
from loraflow.methods._shared.projections import Projection, right_singular
from loraflow.methods._shared.scored import RoutedGate
from loraflow.methods.base import Level, Method, Place, Site
from loraflow.methods.checks import check_positive, check_top_k

_TOP_K = 3


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

    def gate(self, site: Site) -> RoutedGate:  # noqa: D102
        top_k = self.top_k or min(_TOP_K, len(site.adapters))
        return RoutedGate(site, main_direction, top_k, "softmax", self.temperature)

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.top_k, adapters)


def main_direction(update: LoraModule) -> Projection:
    """The input that an update answers most strongly."""
    return right_singular(update).first(1)

r"""PHATGOOSE: each adapter learns on its own data which inputs it is for; a token goes to those that know it best.

While adapter i is trained, alone and on its own data, its output in each linear is multiplied by
$\sigma(v_i \cdot x)$, and only $v_i$ learns. Afterwards

$$w = \operatorname{softmax}\nolimits_{\text{top } k}\big(\bar v_i \cdot \bar x / \sqrt d\big)$$

with $\bar v$ and $\bar x$ standardised to mean 0 and variance 1 over the features.

Paper: Muqeeth et al. 2024, "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
[arXiv 2402.05859](https://arxiv.org/abs/2402.05859). Cost: one low-rank pass and one product of k rows for each linear;
d values for each adapter and linear, learned from each adapter's own data; no examples of the task at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from loraflow.methods._shared.scores import linear_scores, targets_of, top_k_softmax
from loraflow.methods.base import Learning, Level, Method, Place, Site
from loraflow.methods.checks import check_top_k

_TOP_K = 2
_EPSILON = 1e-6


class PhatgooseGate(nn.Module):
    """The gate of one linear.

    Attributes:
        vectors: v, `[adapters, features]`; zero before training.
        targets: which adapters target the linear, `[adapters]`.
        expert: while it learns, the position of the one adapter that is trained; None routes.
    """

    vectors: nn.Parameter
    targets: Bool[Tensor, " adapters"]
    expert: int | None

    def __init__(self, site: Site, top_k: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(len(site.adapters), site.features))
        self.register_buffer("targets", targets_of(site), persistent=False)
        self.top_k = top_k
        self.expert = None

    @property
    def most(self) -> int:
        """How many adapters have a weight at one position, at most."""
        return self.top_k

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """Fusion weights of each position."""
        if self.expert is not None:
            alone = torch.sigmoid(linear_scores(x, self.vectors[self.expert : self.expert + 1]))
            before = alone.new_zeros(*alone.shape[:-1], self.expert)
            after = alone.new_zeros(*alone.shape[:-1], len(self.vectors) - self.expert - 1)
            return torch.cat([before, alone, after], dim=-1)
        scores = linear_scores(_standardized(x.to(self.vectors.dtype)), _standardized(self.vectors))
        return top_k_softmax(scores / x.shape[-1] ** 0.5, self.top_k, 1.0, self.targets)


def _standardized(x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + _EPSILON**2).sqrt()


@dataclass(frozen=True)
class Phatgoose(Method):
    """PHATGOOSE's routing.

    Attributes:
        top_k: adapters for each token and linear; None is the paper's 2, or all where there are fewer.
    """

    top_k: int | None = None

    name: ClassVar[str] = "phatgoose"
    paper: ClassVar[str] = "2402.05859"
    level: ClassVar[Level] = "token"
    place: ClassVar[Place] = "module"
    learns: ClassVar[Learning] = "experts"
    # The paper trains for 100 steps. Decay would pull the other adapters' vectors to zero while one of them learns.
    recipe: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-3, "weight_decay": 0.0, "max_steps": 100}

    def gate(self, site: Site) -> PhatgooseGate:  # noqa: D102
        return PhatgooseGate(site, self.top_k or min(_TOP_K, len(site.adapters)))

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.top_k, adapters)

r"""LoRA-Hub: one weight for each adapter, found without gradients on a few examples.

$$\min_w \; L(w) + 0.05 \cdot \tfrac1k \sum_i |w_i|, \qquad
  y = W x + \Big(\sum_i w_i s_i B_i\Big) \Big(\sum_j w_j A_j\Big) x$$

with $L$ the loss on the examples' responses, minimised by Nevergrad's NGOpt from zero within $\pm 1.5$. The parameters
are mixed, not the outputs: the product has cross terms between adapters, and a pair at 0.5 and 0.5 is not their
average. Ranks may differ (the smaller one is padded with zeros, in the order of the ranks); each scaling is folded into
its B first. `mixes="outputs"` searches the same way without cross terms.

Paper: Huang et al. 2023, "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
[arXiv 2307.13269](https://arxiv.org/abs/2307.13269). Cost: one low-rank pass, k values; 40 evaluations to fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loraflow.methods._shared.mixed import check_mixable
from loraflow.methods.base import Learning, Level, Method, Mixing, Place, Site
from loraflow.methods.checks import check_choice, check_count, check_positive
from loraflow.methods.learned_static import LearnedWeights


@dataclass(frozen=True)
class LoraHub(Method):
    """LoRA-Hub's weights.

    Attributes:
        mixes: what is mixed, "parameters" (the paper) or "outputs".
        budget: evaluations of the loss.
        bound: the search keeps every weight within plus and minus this.
        regularization: factor of the mean absolute weight in the objective.
    """

    mixes: Mixing = "parameters"
    budget: int = 40
    bound: float = 1.5
    regularization: float = 0.05

    name: ClassVar[str] = "lorahub"
    paper: ClassVar[str] = "2307.13269"
    level: ClassVar[Level] = "task"
    place: ClassVar[Place] = "model"
    learns: ClassVar[Learning] = "search"

    def __post_init__(self) -> None:
        check_choice(self.mixes, ("parameters", "outputs"), "mixes")
        check_count(self.budget, "budget")
        check_positive(self.bound, "bound")
        if self.regularization != 0:
            check_positive(self.regularization, "regularization")

    @property
    def mixing(self) -> Mixing:  # noqa: D102
        return self.mixes

    def gate(self, site: Site) -> LearnedWeights:
        """The weights of the whole model, zero before the search.

        Raises:
            MethodError: if parameters are to be mixed and an adapter is a DoRA.
        """
        if self.mixes == "parameters":
            check_mixable(site, "LoRA-Hub", 'Set `mixes` to "outputs"')
        return LearnedWeights(len(site.adapters))

    def start_weights(self, adapters: Sequence[str], best: str | None) -> list[float]:  # noqa: D102
        return [0.0] * len(adapters)

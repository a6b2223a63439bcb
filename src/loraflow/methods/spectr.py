r"""SpectR: each linear sends each token to the adapters in whose input directions most of it lies.

$$s_i = \lVert V_i^T x \rVert \quad\text{or}\quad s_i = \lVert S_i V_i^T x \rVert, \qquad B_i A_i = U_i S_i V_i^T$$

of which the `top_k` largest are chosen, by default with equal weights. The first is the length of the part of x that
the adapter reads at all; the second, with the singular values, is $\lVert B_i A_i x \rVert$: norm-max's score without
the scaling. Both are had from $u_i = A_i x$, which the fused pass computes anyway: $\sqrt{u^T (A A^T)^{-1} u}$ where A
has full row rank and B full column rank, and $\sqrt{u^T B^T B u}$; other ranks by the singular values above a tolerance
(`loraflow.methods._shared.projections`). An adapter that does not target a linear, or adds nothing there, is not asked.
A DoRA is scored by its $B A$; matrices of experts are refused.

Paper: "SpectR: Dynamically Composing LM Experts with Spectral Routing" 2025,
[arXiv 2504.03454](https://arxiv.org/abs/2504.03454). Sources disagree whether its score has the singular values, so
that is an option; and its rule for the weights could not be verified: equal weights are ours, a softmax is an option.
The implementation that was seen mixes parameters, whose cross terms depend on the arbitrary signs of singular vectors;
here outputs are mixed. Cost: one low-rank pass with all A; nothing learned, no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loraflow.adapters import LoraModule
from loraflow.errors import MethodError
from loraflow.methods._shared.projections import Projection, output_length, right_singular
from loraflow.methods._shared.scored import WEIGHTINGS, RoutedGate, Weighting, linears_only
from loraflow.methods.base import Level, Method, Place, Site
from loraflow.methods.checks import check_choice, check_positive, check_top_k

_TOP_K = 4


@dataclass(frozen=True)
class SpectR(Method):
    """SpectR's routing.

    Attributes:
        top_k: adapters for each token and linear; None is the paper's 4, or all where there are fewer.
        singular_values: whether the score has the singular values.
        weighting: "equal" weights of those that are chosen, or a "softmax" of their scores.
        temperature: divisor of the scores before a softmax.
    """

    top_k: int | None = None
    singular_values: bool = False
    weighting: Weighting = "equal"
    temperature: float = 1.0

    name: ClassVar[str] = "spectr"
    paper: ClassVar[str] = "2504.03454"
    level: ClassVar[Level] = "token"
    place: ClassVar[Place] = "module"

    def __post_init__(self) -> None:
        if not isinstance(self.singular_values, bool):
            raise MethodError(f"`singular_values` (={self.singular_values!r}) must be true or false.")
        check_choice(self.weighting, WEIGHTINGS, "weighting")
        check_positive(self.temperature, "temperature")

    def gate(self, site: Site) -> RoutedGate:
        """The gate of one linear.

        Raises:
            MethodError: if it is the matrices of experts.
        """
        linears_only(site, self.name)
        project = _output_length if self.singular_values else right_singular
        top_k = self.top_k or min(_TOP_K, len(site.adapters))
        return RoutedGate(site, project, top_k, self.weighting, self.temperature)

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.top_k, adapters)


def _output_length(update: LoraModule) -> Projection:
    return output_length(update, 1.0)

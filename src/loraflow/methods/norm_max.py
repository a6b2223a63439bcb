r"""Norm-max: each linear sends each token to the adapters that would change its output most.

$$s_i = \lVert s_i B_i A_i x \rVert = |\alpha_i / r_i| \sqrt{u_i^T B_i^T B_i u_i}, \qquad u_i = A_i x$$

of which the `top_k` largest are chosen, the one with weight 1. The score is that of the adapter's own update, with its
scaling (rsLoRA's too), so an adapter that was trained for longer, or scaled up, is chosen more often everywhere: its
bare norm says nothing of what is usual for it. It is had from u, which the fused pass computes anyway. An adapter that
does not target a linear, or adds nothing there, is not asked. Of a DoRA or a `lora_bias`, the low-rank part is scored;
matrices of experts are refused.

The activation norm of SEQR's comparison ("SEQR", [arXiv 2509.18093](https://arxiv.org/abs/2509.18093)), without its
calibration. Cost: one low-rank pass with all A; nothing learned, no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loraflow.adapters import LoraModule
from loraflow.methods._shared.projections import Projection, output_length
from loraflow.methods._shared.scored import WEIGHTINGS, RoutedGate, Weighting, linears_only
from loraflow.methods.base import Level, Method, Place, Site
from loraflow.methods.checks import check_choice, check_count, check_positive, check_top_k


@dataclass(frozen=True)
class NormMax(Method):
    """Routing by the norm of each adapter's update.

    Attributes:
        top_k: adapters for each token and linear.
        weighting: "equal" weights of those that are chosen, or a "softmax" of their scores.
        temperature: divisor of the scores before a softmax.
    """

    top_k: int = 1
    weighting: Weighting = "equal"
    temperature: float = 1.0

    name: ClassVar[str] = "norm-max"
    paper: ClassVar[str] = "2509.18093"
    level: ClassVar[Level] = "token"
    place: ClassVar[Place] = "module"

    def __post_init__(self) -> None:
        check_count(self.top_k, "top_k")
        check_choice(self.weighting, WEIGHTINGS, "weighting")
        check_positive(self.temperature, "temperature")

    def gate(self, site: Site) -> RoutedGate:
        """The gate of one linear.

        Raises:
            MethodError: if it is the matrices of experts.
        """
        linears_only(site, self.name)
        return RoutedGate(site, update_length, self.top_k, self.weighting, self.temperature)

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.top_k, adapters)


def update_length(update: LoraModule) -> Projection:
    """What gives the norm of an update, with its scaling."""
    return output_length(update, update.scaling)

r"""LoRA on the Go: one pass of the base shows how strongly each adapter would answer the query.

With x the input of one linear (the query projection of the last layer) at the prompt's last token, and
$o_i = s_i B_i A_i x$, an adapter's score is $\lVert o_i \rVert_2$, or the inverse of the entropy of
$\operatorname{softmax}(o_i)$. The `top_k` best scores, divided by their sum, are the weights of all layers.

Paper: "LoRA on the Go: Instance-level Dynamic LoRA Selection and Merging", ACL 2026,
[arXiv 2511.07129](https://arxiv.org/abs/2511.07129). Two things are otherwise than in its code: x is what the linear
really reads (after the layer's norm), not the residual stream; and the pass is the base's own, not one with the
adapters of the request before. DoRA's magnitudes and LoRA biases are left out of $o_i$, which is the low-rank part
alone. Cost: one prompt pass, up to that linear; then one low-rank pass. Nothing learned, no
data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.adapters import LoraModule
from loraflow.errors import MethodError, did_you_mean
from loraflow.methods._shared.scores import largest_normalized
from loraflow.methods.base import Place, Query, QueryGate, ScoredMethod, Site
from loraflow.methods.checks import check_choice, check_top_k


class LogoProbe(QueryGate):
    """The linear that is probed, and each adapter's update of it."""

    def __init__(self, module: str, updates: Sequence[LoraModule]) -> None:
        super().__init__()
        self.module = module
        self.updates = updates


@dataclass(frozen=True)
class Logo(ScoredMethod):
    """LoGo's weights.

    Attributes:
        score: "norm" (the paper's default) or "entropy".
        top_k: how many adapters are kept; None keeps all (the paper keeps 20 of 260).
        module: name of the probed linear within the last layer; None is the query projection where all adapters target
            it, and the first linear that all do where not.
    """

    score: Literal["norm", "entropy"] = "norm"
    top_k: int | None = None
    module: str | None = None

    name: ClassVar[str] = "logo"
    paper: ClassVar[str] = "2511.07129"
    place: ClassVar[Place] = "model"

    def __post_init__(self) -> None:
        check_choice(self.score, ("norm", "entropy"), "score")

    def gate(self, site: Site) -> LogoProbe:
        """Find the linear to probe.

        Raises:
            MethodError: if there is none that all adapters target.
        """
        prefix = f"layers.{site.layers - 1}."
        shared = {
            name.removeprefix(prefix): [update for update in updates if update is not None]
            for name, updates in site.updates.items()
            if name.startswith(prefix) and all(update is not None and update.experts == 1 for update in updates)
        }
        if not shared:
            raise MethodError(
                "LoGo compares the adapters at one linear of the last layer, and there is none that all of them "
                "target. Leave the odd adapter out, or take another method."
            )
        module = self.module or next((name for name in shared if name.endswith("q_proj")), next(iter(shared)))
        if module not in shared:
            raise MethodError(
                f"`module` is not one that all adapters target: {module!r}. {did_you_mean(module, shared)}"
            )
        return LogoProbe(prefix + module, shared[module])

    @property
    def measure(self) -> str:  # noqa: D102
        return "norm of the update" if self.score == "norm" else "inverse entropy of the update, 1 / nats"

    def scores(self, query: Query, gate: Any) -> Float[Tensor, " adapters"]:  # noqa: D102
        x = query.module_input(gate.module)[-1].double().cpu()
        outputs = [u.scaling * (u.lora_B.double() @ (u.lora_A.double() @ x)) for u in gate.updates]
        score = torch.linalg.vector_norm if self.score == "norm" else _inverse_entropy
        return torch.stack([score(output) for output in outputs])

    def weights_of(self, scores: Float[Tensor, " adapters"]) -> Float[Tensor, " adapters"]:  # noqa: D102
        return largest_normalized(scores, self.top_k)

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.top_k, adapters)


def _inverse_entropy(output: Float[Tensor, " out_features"]) -> Float[Tensor, ""]:
    log_p = torch.log_softmax(output, dim=-1)
    return 1 / (-(log_p.exp() * log_p).sum()).clamp(min=torch.finfo(torch.float64).tiny ** 0.5)

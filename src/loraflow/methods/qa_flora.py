r"""qa-FLoRA: an adapter weighs the more in a layer, the further it moves the base model's distribution on the query.

For each layer l, with $h$ the output of layer l at the prompt's last token, the base alone and adapter j alone:

$$p = \operatorname{softmax}(W_{LM} h_{base}), \quad q_j = \operatorname{softmax}(W_{LM} h_j), \quad
  w_{l, j} = \frac{\operatorname{KL}(p \,\|\, q_j)}{\sum_i \operatorname{KL}(p \,\|\, q_i)}$$

a plain normalisation, no softmax. The weights are fixed while the answer is generated.

Paper: "qa-FLoRA", AAAI 2026, [arXiv 2512.11366](https://arxiv.org/abs/2512.11366); there is no public code. Not known
from the paper: whether the model's final norm comes before $W_{LM}$ (here it does unless `final_norm` is off: states of
inner layers have another scale, and at the last layer only so is p what the model says), and what 0 / 0 gives in layers
below the first adapted one (here `epsilon` is added to each distance, which tends to equal weights).
Cost: k + 1 passes of the prompt up to the last layer and the head at one token of each layer; then one low-rank pass.
Nothing learned, no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.methods.base import Place, Query, ScoredMethod
from loraflow.methods.checks import check_choice, check_positive

Distance = Literal["kl", "js", "cosine", "euclidean"]
_MEASURES: dict[str, str] = {
    "kl": "KL divergence, nats",
    "js": "Jensen-Shannon divergence, nats",
    "cosine": "cosine distance",
    "euclidean": "Euclidean distance",
}
# Values of float64 that the lens may hold at a time: 256 MiB.
_LENS_VALUES = 2**25


@dataclass(frozen=True)
class QaFlora(ScoredMethod):
    """qa-FLoRA's weights.

    Attributes:
        distance: "kl" (the paper) or "js" (Jensen-Shannon) between distributions, "cosine" or "euclidean" between
            hidden states.
        tokens: "last" (the paper), or the mean over "all" tokens of the prompt.
        final_norm: whether the model's final norm comes before its head.
        epsilon: added to every distance.
    """

    distance: Distance = "kl"
    tokens: Literal["last", "all"] = "last"
    final_norm: bool = True
    epsilon: float = 1e-8

    name: ClassVar[str] = "qa-flora"
    paper: ClassVar[str] = "2512.11366"
    place: ClassVar[Place] = "layer"

    def __post_init__(self) -> None:
        check_choice(self.distance, tuple(_MEASURES), "distance")
        check_choice(self.tokens, ("last", "all"), "tokens")
        check_positive(self.epsilon, "epsilon")

    @property
    def measure(self) -> str:  # noqa: D102
        return _MEASURES[self.distance]

    def scores(self, query: Query, gate: Any) -> Float[Tensor, "layers adapters"]:
        """How far each adapter moves each layer's output on the prompt."""

        def measure(base: Tensor, alone: Tensor) -> Tensor:
            if self.distance == "cosine":
                return (1 - torch.cosine_similarity(base.double(), alone.double(), dim=-1)).mean(dim=-1)
            if self.distance == "euclidean":
                return torch.linalg.vector_norm(base.double() - alone.double(), dim=-1).mean(dim=-1)
            return self._between_distributions(query, base, alone)

        return query.compare(measure, self.tokens).clamp(min=0)

    def weights_of(self, scores: Float[Tensor, "layers adapters"]) -> Float[Tensor, "layers adapters"]:  # noqa: D102
        distances = scores + self.epsilon
        return distances / distances.sum(dim=-1, keepdim=True)

    def _between_distributions(
        self, query: Query, base: Float[Tensor, "tokens hidden"], alone: Float[Tensor, "passes tokens hidden"]
    ) -> Float[Tensor, " passes"]:
        total = torch.zeros(alone.shape[0], dtype=torch.float64)
        states = torch.cat([base[None], alone])
        block = max(1, _LENS_VALUES // (query.vocabulary * len(states)))
        divergence = _kl if self.distance == "kl" else _js
        for start in range(0, base.shape[0], block):
            log_probabilities = query.logits(states[:, start : start + block], norm=self.final_norm).log_softmax(dim=-1)
            total += divergence(log_probabilities[0], log_probabilities[1:]).sum(dim=-1).cpu()
        return total / base.shape[0]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _js(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_mean = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return (_kl(log_p, log_mean) + _kl(log_q, log_mean)) / 2

r"""Centroid: the adapters whose own data looks like the query.

$$w = \operatorname{softmax}\nolimits_{\text{top } k}\big(\cos(e(\text{query}), c_i) / \tau\big)$$

with $c_i$ the mean of the embeddings e of samples of adapter i's data, and e the mean over the tokens of a hidden state
of the base model itself, or another model's embedding. Hidden states of language models all lie in one narrow cone,
where every cosine is close to one; so the mean of the centroids is taken from both sides first, unless `center` is off.

After LoraRetriever (Zhao et al. 2024, [arXiv 2402.09997](https://arxiv.org/abs/2402.09997)) and the training-free
baseline of qa-FLoRA. Cost: one pass of the prompt; then one low-rank pass; k embeddings, from samples of each
adapter's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.methods._shared.centroids import BASE, EmbedsPrompts
from loraflow.methods._shared.scores import top_k_softmax
from loraflow.methods.base import Learning, Place, Query, ScoredMethod
from loraflow.methods.checks import check_positive, check_top_k


@dataclass(frozen=True)
class Centroid(EmbedsPrompts, ScoredMethod):
    """Weights by likeness to each adapter's data.

    Attributes:
        layer: which decoder layer's output of the base is the embedding; -1 is the last.
        temperature: divisor of the cosines.
        top_k: how many adapters are kept; None keeps all.
        center: whether the centroids' mean is taken from query and centroids first.
        encoder: "base", or the Hub id or directory of another model that embeds texts (`loraflow.encoders`).
        instruction: what another model reads before each text.
    """

    layer: int = -1
    temperature: float = 0.1
    top_k: int | None = None
    center: bool = True
    encoder: str = BASE
    instruction: str = ""

    name: ClassVar[str] = "centroid"
    paper: ClassVar[str] = "2402.09997"
    place: ClassVar[Place] = "model"
    learns: ClassVar[Learning] = "samples"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.temperature, "temperature")

    @property
    def measure(self) -> str:  # noqa: D102
        return "cosine"

    def scores(self, query: Query, gate: Any) -> Float[Tensor, " adapters"]:
        """A prompt's likeness to the centroids: cosines."""
        embedding, centroids = self.compared(query, gate, center=self.center)
        return torch.cosine_similarity(embedding, centroids, dim=-1)

    def weights_of(self, scores: Float[Tensor, " adapters"]) -> Float[Tensor, " adapters"]:  # noqa: D102
        return top_k_softmax(scores, self.top_k or len(scores), self.temperature)

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.top_k, adapters)

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

from loraflow.errors import MethodError
from loraflow.methods._shared.encoder import TextEncoder
from loraflow.methods._shared.scores import top_k_softmax
from loraflow.methods.base import Learning, Place, Query, QueryGate, ScoredMethod, Site, check_positive, check_top_k


class Centroids(QueryGate):
    """Each adapter's mean embedding.

    Attributes:
        centroids: c, `[adapters, hidden]`; zero before they are made of samples.
        encoder: the model that embeds texts; None is the base.
    """

    centroids: Float[Tensor, "adapters hidden"]
    encoder: TextEncoder | None

    def __init__(self, adapters: int, features: int, encoder: TextEncoder | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("centroids", torch.zeros(adapters, features))

    def set_samples(self, embeddings: Sequence[Float[Tensor, "_samples hidden"]]) -> None:
        """Take the mean embedding of each adapter's samples."""
        self.centroids.copy_(torch.stack([of_one.mean(dim=0) for of_one in embeddings]))


@dataclass(frozen=True)
class Centroid(ScoredMethod):
    """Weights by likeness to each adapter's data.

    Attributes:
        layer: which decoder layer's output of the base is the embedding; -1 is the last.
        temperature: divisor of the cosines.
        top_k: how many adapters are kept; None keeps all.
        center: whether the centroids' mean is taken from query and centroids first.
        encoder: "base", or the Hub id or directory of another model that embeds texts (the mean of its last states).
    """

    layer: int = -1
    temperature: float = 0.1
    top_k: int | None = None
    center: bool = True
    encoder: str = "base"

    name: ClassVar[str] = "centroid"
    paper: ClassVar[str] = "2402.09997"
    place: ClassVar[Place] = "model"
    learns: ClassVar[Learning] = "samples"

    def __post_init__(self) -> None:
        check_positive(self.temperature, "temperature")

    def gate(self, site: Site) -> Centroids:
        """Make the place for the centroids.

        Raises:
            MethodError: if the base has no such layer.
        """
        if not -site.layers <= self.layer < site.layers:
            raise MethodError(f"`layer` (={self.layer}) must be between -{site.layers} and {site.layers - 1}.")
        encoder = None if self.encoder == "base" else TextEncoder(self.encoder)
        return Centroids(len(site.adapters), site.features if encoder is None else encoder.features, encoder)

    def embed(self, query: Query, gate: Any) -> Float[Tensor, " hidden"]:
        """The embedding of a text."""
        if gate.encoder is not None:
            return gate.encoder.embed(query.text, gate.centroids.device)
        return query.layer_output(self.layer).float().mean(dim=0)

    @property
    def measure(self) -> str:  # noqa: D102
        return "cosine"

    def scores(self, query: Query, gate: Any) -> Float[Tensor, " adapters"]:
        """A prompt's likeness to the centroids: cosines.

        Raises:
            MethodError: if there are none yet.
        """
        if not gate.centroids.any():
            raise MethodError("The centroids are not made yet. Fit the method on samples of each adapter's own data.")
        embedding = self.embed(query, gate).double()
        centroids = gate.centroids.to(embedding)
        if self.center:
            origin = centroids.mean(dim=0)
            embedding, centroids = embedding - origin, centroids - origin
        return torch.cosine_similarity(embedding, centroids, dim=-1)

    def weights_of(self, scores: Float[Tensor, " adapters"]) -> Float[Tensor, " adapters"]:  # noqa: D102
        return top_k_softmax(scores, self.top_k or len(scores), self.temperature)

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.top_k, adapters)

r"""LoraRetriever: the adapters whose own data is nearest to the query, chosen by a text encoder.

With e the encoder's vector of a text, of length 1, and $c_i$ the plain mean of e over some (the paper: 20) of the
inputs of adapter i's own data, without answers,

$$s_i = \langle e(\text{query}), c_i \rangle, \qquad R = \text{the } k \text{ adapters of the largest } s_i$$

and what was retrieved is used in one of three ways:

- *mixture*: $y = W x + \frac1k \sum_{i \in R} s^{\text{lora}}_i B_i A_i x$;
- *selection*: the same with k = 1;
- *fusion*: $y = W x + \big(\frac1k \sum_{i \in R} s^{\text{lora}}_i B_i\big) \big(\frac1k \sum_{j \in R} A_j\big) x$,
  which multiplies out to cross terms between adapters, and needs equal ranks.

Each adapter keeps its own scaling $s^{\text{lora}}_i$ (folded into its B), where the paper's code applies that of one
to all. Every request has its own R; in a batch, only the adapters that some request retrieved are computed.

Of the base's own hidden states, the mean over the tokens is e. They all lie in one narrow cone, where every inner
product is close to one; so the mean of the $c_i$ is taken from both sides first, which a sentence encoder does not need
(`center`).

Paper: Zhao et al. 2024, "LoraRetriever: Input-Aware LoRA Retrieval and Composition for Mixed Tasks in the Wild",
[arXiv 2402.09997](https://arxiv.org/abs/2402.09997). Cost: one run of the encoder, or one pass of the prompt; then one
low-rank pass over k adapters; a vector for each adapter, from samples of its own data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.errors import MethodError
from loraflow.methods._shared.centroids import BASE, Centroids, EmbedsPrompts
from loraflow.methods._shared.mixed import check_equal_ranks, check_mixable
from loraflow.methods.base import Learning, Mixing, Place, Query, ScoredMethod, Site
from loraflow.methods.checks import check_choice, check_top_k

_TOP_K = 3


@dataclass(frozen=True)
class LoraRetriever(EmbedsPrompts, ScoredMethod):
    """LoraRetriever's choice.

    Attributes:
        mode: how the retrieved adapters are used: "mixture", "selection" (the nearest alone), or "fusion".
        top_k: how many are retrieved; None is the paper's 3, or all where there are fewer, and 1 in "selection".
        encoder: "base", or the Hub id or directory of another model that embeds texts (`loraflow.encoders`).
        instruction: what another model reads before each text; the paper's, for its instruct encoder, is "Represent the
            sentence for similar task retrieval: ".
        center: whether the mean of all adapters' vectors is taken from query and adapters first; None: for the base's
            states only.
        layer: which decoder layer's output of the base is averaged; -1 is the last.
    """

    mode: Literal["mixture", "selection", "fusion"] = "mixture"
    top_k: int | None = None
    encoder: str = BASE
    instruction: str = ""
    center: bool | None = None
    layer: int = -1

    name: ClassVar[str] = "lora-retriever"
    paper: ClassVar[str] = "2402.09997"
    place: ClassVar[Place] = "model"
    learns: ClassVar[Learning] = "samples"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.mode, ("mixture", "selection", "fusion"), "mode")
        if self.mode == "selection" and self.top_k not in (None, 1):
            raise MethodError(
                f'`top_k` (={self.top_k!r}) must be 1 where `mode` is "selection", which takes the nearest adapter '
                'alone. Leave it out, or set `mode` to "mixture".'
            )

    @property
    def mixing(self) -> Mixing:  # noqa: D102
        return "parameters" if self.mode == "fusion" else "outputs"

    def gate(self, site: Site) -> Centroids:
        """Make the place for the adapters' vectors.

        Raises:
            MethodError: if the base has no such layer, or the adapters cannot be fused.
        """
        if self.mode == "fusion":
            remedy = 'Set `mode` to "mixture"'
            check_mixable(site, "LoraRetriever's fusion", remedy)
            check_equal_ranks(site, "LoraRetriever's fusion", remedy)
        return super().gate(site)

    def embed(self, query: Query, gate: Any) -> Float[Tensor, " hidden"]:
        """The vector of a prompt, of length 1."""
        return torch.nn.functional.normalize(super().embed(query, gate), dim=0)

    def scores(self, query: Query, gate: Any) -> Float[Tensor, " adapters"]:
        """How near each adapter's data is to a prompt; in float64.

        Raises:
            MethodError: if the adapters have no vectors yet.
        """
        center = self.encoder == BASE if self.center is None else self.center
        embedding, centroids = self.compared(query, gate, center=center)
        return centroids @ embedding

    @property
    def measure(self) -> str:  # noqa: D102
        return "inner product"

    def weights_of(self, scores: Float[Tensor, " adapters"]) -> Float[Tensor, " adapters"]:
        """1/k for each adapter that is retrieved; of equal ones, those named first."""
        retrieved = scores.argsort(descending=True, stable=True)[: self._count(len(scores))]
        return torch.zeros_like(scores).index_fill(0, retrieved, 1 / len(retrieved))

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.top_k, adapters)

    def _count(self, adapters: int) -> int:
        return 1 if self.mode == "selection" else min(self.top_k or _TOP_K, adapters)

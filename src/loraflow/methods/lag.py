r"""LAG: in each linear one adapter of each library answers a token, chosen among candidates by two scores.

$$C = \operatorname{top}_c\, |x \cdot v_i|, \qquad i^* = \arg\max_{i \in C} \lVert V_i^T x \rVert, \qquad w_{i^*} = 1$$

with $V_i$ the right singular vectors of $B_i A_i$ and $v_i$ the first: Arrow's score finds the candidates, SpectR's the
winner. Libraries, such as one of tasks and one of knowledge, are routed apart and their winners added; without
`libraries` all adapters are one. Both scores come from $u_i = A_i x$ where the fused pass reads all A anyway. Where
that costs more, with many adapters loaded and few tokens, the candidates are found by one vector each, and only they
are read: $2 d (k + c r)$ operations for k adapters, c candidates and rank r, instead of $2 d k r$; and only the winners
are written. Where no adapter of a library targets a linear, or none adds anything there, the library adds nothing.
A DoRA is scored by its $B A$; matrices of experts are refused.

Paper: "LoRA-Augmented Generation" 2025, [arXiv 2507.05346](https://arxiv.org/abs/2507.05346); candidates, winner and
weight as there, of 1,000 knowledge and 5 task adapters. Cost: as above; nothing learned, no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loraflow.errors import MethodError, did_you_mean
from loraflow.methods._shared.projections import right_singular
from loraflow.methods._shared.scored import ProjectionGate, exactly, lasting, lengths, linears_only
from loraflow.methods._shared.scores import largest, linear_scores
from loraflow.methods.base import Level, Method, Place, Site
from loraflow.methods.checks import check_count

_LOWEST = float("-inf")


class LagGate(ProjectionGate):
    """The gate of one linear.

    Attributes:
        members: which adapters can be chosen from each library that has one here, `[libraries, adapters]`.
        sizes: how many candidates each of them has.
        lists: whether candidates can be read alone: adapters of one rank, of which not all are candidates.
        candidates: of all libraries, at one position.
        list_rows: rows of the product that finds them.
        firsts: v, `[adapters, features]`; None until it is needed.
        places: where each adapter's small matrix is, `[adapters]`.
    """

    members: Bool[Tensor, "libraries adapters"]
    sizes: tuple[int, ...]
    lists: bool
    candidates: int
    list_rows: int
    firsts: Tensor | None
    places: Int[Tensor, " adapters"]

    def __init__(self, site: Site, libraries: Sequence[Sequence[int]], candidates: int) -> None:
        super().__init__(site, right_singular)
        members = torch.zeros(len(libraries), len(self.updates), dtype=torch.bool)
        for row, own in zip(members, libraries, strict=True):
            row[list(own)] = self.targets[list(own)]
        members = members[members.any(dim=1)]
        self.sizes = tuple(min(candidates, count) for count in members.sum(dim=1).tolist())
        self.candidates, self.list_rows = sum(self.sizes), len(self.updates)
        self.lists = len(self.buckets) == 1 and self.candidates < int(members.sum())
        places = torch.zeros(len(self.updates), dtype=torch.long)
        if self.lists:
            places[list(self.buckets[0].adapters)] = torch.arange(len(self.buckets[0].adapters))
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("firsts", None, persistent=False)

    @property
    def most(self) -> int:
        """How many adapters have a weight at one position, at most."""
        return max(1, len(self.sizes))

    def choose(self, projected: Float[Tensor, "*batch adapters height"]) -> Float[Tensor, "*batch adapters"]:
        """Weight 1 for the winner of each library."""
        first, whole = projected[..., 0].abs(), lengths(projected)
        weights = torch.zeros_like(whole)
        for own, size in zip(self.members, self.sizes, strict=True):
            kept = own & largest(first.masked_fill(~own, _LOWEST), size)
            winner = whole.masked_fill(~kept, _LOWEST).argmax(dim=-1, keepdim=True)
            weights = weights.scatter(-1, winner, 1.0)
        return weights

    def shortlist(self, x: Float[Tensor, "tokens features"]) -> Int[Tensor, "tokens candidates"]:
        """The candidates, those of one library after the other."""
        if self.firsts is None:
            with lasting():
                firsts = torch.zeros(len(self.updates), self.features, dtype=torch.float64)
                for position, update in enumerate(self.updates):
                    if update is not None:
                        firsts[position] = right_singular(update).first(1).rows.sum(dim=0)
                self.firsts = firsts.to(self.targets.device, self.dtype)
        scores = linear_scores(x, self.firsts).abs()
        chosen = [
            scores.masked_fill(~own, _LOWEST).topk(size, dim=-1).indices
            for own, size in zip(self.members, self.sizes, strict=True)
        ]
        return torch.cat(chosen, dim=-1)

    def weigh_listed(
        self, u: Float[Tensor, "tokens candidates width"], listed: Int[Tensor, "tokens candidates"]
    ) -> Float[Tensor, "tokens candidates"]:
        """Weight 1 for the winner among the candidates of each library, from what these have read."""
        (bucket,) = self.buckets
        small = self.small(bucket)[self.places[listed]]
        with exactly(u):
            whole = lengths((small @ u[..., : bucket.rank, None].to(small.dtype))[..., 0])
        weights = [
            torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
            for scores in whole.split(self.sizes, dim=-1)
        ]
        return torch.cat(weights, dim=-1)


@dataclass(frozen=True)
class Lag(Method):
    """LAG's routing.

    Attributes:
        candidates: how many adapters of a library the second score is taken of, or all where there are fewer.
        libraries: names of adapters by library, such as {"tasks": [...], "knowledge": [...]}; every adapter is in one
            of them. None is one library of all.
    """

    candidates: int = 20
    libraries: Mapping[str, Sequence[str]] | None = None

    name: ClassVar[str] = "lag"
    paper: ClassVar[str] = "2507.05346"
    level: ClassVar[Level] = "token"
    place: ClassVar[Place] = "module"

    def __post_init__(self) -> None:
        check_count(self.candidates, "candidates")

    def gate(self, site: Site) -> LagGate:
        """The gate of one linear.

        Raises:
            MethodError: if it is the matrices of experts.
        """
        linears_only(site, self.name)
        libraries = [site.adapters] if self.libraries is None else list(self.libraries.values())
        return LagGate(site, [[site.adapters.index(name) for name in own] for own in libraries], self.candidates)

    def check(self, adapters: Sequence[str]) -> None:
        """Check that every adapter is in one library.

        Raises:
            MethodError: if one is in none or in several, or a library is empty or names an unknown one.
        """
        if self.libraries is None:
            return
        if not isinstance(self.libraries, Mapping):
            example = '{"tasks": ["summarise"], "knowledge": ["law", "tax"]}'
            raise MethodError(f"`libraries` (={self.libraries!r}) must give adapters by library, such as {example}.")
        homes: dict[str, str] = {}
        for library, own in self.libraries.items():
            if isinstance(own, str) or not isinstance(own, Sequence) or not own:
                raise MethodError(
                    f"`libraries` gives the library {library!r} {own!r}; it must be a list of at least one adapter."
                )
            for name in own:
                if name not in adapters:
                    raise MethodError(
                        f"`libraries` names the unknown adapter {name!r}. {did_you_mean(str(name), adapters)}"
                    )
                if name in homes:
                    raise MethodError(
                        f"`libraries` has the adapter {name!r} twice, in {homes[name]!r} and {library!r}. Put it into "
                        "one of them."
                    )
                homes[name] = library
        missing = [name for name in adapters if name not in homes]
        if missing:
            raise MethodError(
                f"`libraries` leaves out the adapter {missing[0]!r}. Put every adapter into one library, or load only "
                "those that you want."
            )

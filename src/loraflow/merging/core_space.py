r"""Core space: adapters merged in the small space that all their row and column spaces span.

([Panariello et al. 2025](https://arxiv.org/abs/2509.17786)) For each linear, $U_B$ are the left singular vectors of
$[B_1 | \ldots | B_k]$ and $V_A$ the right ones of $[A_1; \ldots; A_k]$. The cores
$C_i = U_B^T \omega_i s_i B_i A_i V_A$ hold all of the updates, losslessly, and are as small as the ranks together; they
are merged, and $\Delta W = U_B\, C\, V_A^T$ is a LoRA as it is.

The singular vectors are those of the matrices as the files have them, without scalings. TIES is over the cores of all
linears as one vector for each adapter, as KnOTS has it; whether the paper's code trims so, or each linear by itself, is
not verified (it makes no difference at density 1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.merging.base import Factors, Merge, Places, Update, check_density, check_scale, nothing
from loraflow.merging.voting import trimmed, voted

# A singular value below this share of the largest is rounding: the matrices have no such direction.
_SMALLEST_SHARE = 1e-12


class Cores(NamedTuple):
    """The updates of one linear in core space."""

    U_B: Float[Tensor, "out_features rank_B"]
    V_A: Float[Tensor, "in_features rank_A"]
    cores: list[Float[Tensor, "rank_B rank_A"]]


def cores_of(updates: Sequence[Update | None]) -> Cores:
    """The updates of one linear in core space; zero where an adapter has none, and empty where all of them are zero."""
    present = [update for update in updates if update is not None]
    U_B = _directions(torch.cat([update.lora_B for update in present], dim=1))
    V_A = _directions(torch.cat([update.lora_A for update in present]).T)
    zero = torch.zeros(U_B.shape[1], V_A.shape[1]).double()
    return Cores(U_B, V_A, [zero if one is None else (U_B.T @ one.up) @ (one.lora_A @ V_A) for one in updates])


def _directions(columns: Float[Tensor, "features rank"]) -> Float[Tensor, "features directions"]:
    U, S, _ = torch.linalg.svd(columns, full_matrices=False)
    return U[:, _SMALLEST_SHARE * S[0] < S]


@dataclass(frozen=True)
class _CoreSpace(Merge):
    scale: float = 1.0

    paper: ClassVar[str] = "2509.17786"

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @abstractmethod
    def together(self, cores: Sequence[Cores]) -> list[Tensor]:
        """The merged core of every place."""

    def merge(self, places: Places) -> dict[str, Factors]:
        spaces = {place: cores_of(updates) for place, updates in places.items()}
        found = {place: one for place, one in spaces.items() if one.cores[0].numel()}
        merged = {place: nothing(updates) for place, updates in places.items()}
        if found:
            cores = self.together(list(found.values()))
            merged |= {place: self._factors(one, core) for (place, one), core in zip(found.items(), cores, strict=True)}
        return merged

    def _factors(self, one: Cores, core: Tensor) -> Factors:
        core = self.scale * core
        # The smaller of the core's two sides is the rank.
        if core.shape[0] <= core.shape[1]:
            return Factors(core @ one.V_A.T, one.U_B)
        return Factors(one.V_A.T, one.U_B @ core)


@dataclass(frozen=True)
class CoreSum(_CoreSpace):
    """The sum of the cores: task arithmetic again, of as low a rank as it has.

    Attributes:
        scale: what the sum is multiplied with.
    """

    name: ClassVar[str] = "core-sum"

    def together(self, cores: Sequence[Cores]) -> list[Tensor]:  # noqa: D102
        return [torch.stack(one.cores).sum(dim=0) for one in cores]


@dataclass(frozen=True)
class CoreTies(_CoreSpace):
    """TIES on the cores.

    Attributes:
        scale: what the mean is multiplied with.
        density: share of the entries that is kept, the largest of each adapter's, over all linears.
    """

    density: float = 1.0

    name: ClassVar[str] = "core-ties"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)

    def together(self, cores: Sequence[Cores]) -> list[Tensor]:  # noqa: D102
        adapters = range(len(cores[0].cores))
        vectors = [torch.cat([one.cores[i].flatten() for one in cores]) for i in adapters]
        pieces = voted(trimmed(vectors, self.density)).split([one.cores[0].numel() for one in cores])
        return [piece.view_as(one.cores[0]) for piece, one in zip(pieces, cores, strict=True)]


@dataclass(frozen=True)
class CoreIsoC(_CoreSpace):
    r"""Iso-C on the cores: the sum, with all singular values made their mean.

    ([Marczak et al. 2025](https://arxiv.org/abs/2502.04959)) $C = \bar\sigma\, U V^T$ of $\sum_i C_i = U S V^T$.

    Attributes:
        scale: what the result is multiplied with.
    """

    name: ClassVar[str] = "core-iso-c"

    def together(self, cores: Sequence[Cores]) -> list[Tensor]:  # noqa: D102
        merged = []
        for one in cores:
            U, S, Vh = torch.linalg.svd(torch.stack(one.cores).sum(dim=0), full_matrices=False)
            merged.append(S.mean() * (U @ Vh))
        return merged

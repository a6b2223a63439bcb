r"""KnOTS: TIES and DARE in a basis that all adapters' updates of a linear share.

([Stoica et al. 2024](https://arxiv.org/abs/2410.19735)) For each linear, the thin SVD
$[D_1 | \ldots | D_k] = U\, \mathrm{diag}(S)\, V^T$ (singular values above 1e-5) gives every adapter's representation
$\mathrm{diag}(S) V_i^T = U^T D_i$. The representations of *all* linears are one vector for each adapter; these are
trimmed, vote on signs and are averaged (TIES), and $\Delta W = U \cdot \mathrm{merged}$. A plain sum in this basis is
the sum outside of it: only what treats entries one by one differs.

Computed from the factors: with the QR decompositions $[\omega_i s_i B_i]_i = Q [R_1, \ldots, R_k]$ and
$A_i^T = P_i T_i$, the concatenation is $Q\, [R_1 T_1^T | \ldots | R_k T_k^T]\, \mathrm{blockdiag}(P_i^T)$: the SVD is
of a matrix that is as small as the ranks together. The representations of k adapters of rank r are k matrices of k r
rows for a linear. What is kept of each adapter is chosen over all linears, which are in memory together then; where all
is kept (`density` 1), one linear at a time is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.errors import MethodError
from loraflow.merging.base import Factors, Merge, Places, Update, check_density, check_scale, check_seed, nothing
from loraflow.merging.voting import dropped, seeded, trimmed, voted

# The official code's.
_SMALLEST = 1e-5


@dataclass(frozen=True)
class _Knots(Merge):
    density: float = 1.0

    paper: ClassVar[str] = "2410.19735"

    @abstractmethod
    def together(self, vectors: list[Tensor]) -> Tensor:
        """One vector of each adapter's, over all places that are merged together."""

    def merge(self, places: Places) -> dict[str, Factors]:
        if self.density < 1:
            return self._merge_together(places)
        merged: dict[str, Factors] = {}
        for place, updates in places.items():
            merged |= self._merge_together({place: updates})
        return merged

    def _merge_together(self, places: Places) -> dict[str, Factors]:
        shared = {place: in_shared_basis(updates) for place, updates in places.items()}
        # Those whose updates are all zero have no directions, and no say in how many entries are kept.
        found = {place: one for place, one in shared.items() if one[0].shape[1]}
        merged = {place: nothing(updates) for place, updates in places.items()}
        if not found:
            return merged
        adapters = len(next(iter(places.values())))
        vectors = [torch.cat([one[1][i].flatten() for one in found.values()]) for i in range(adapters)]
        pieces = self.together(vectors).split([one[1][0].numel() for one in found.values()])
        for (place, (U, representations)), piece in zip(found.items(), pieces, strict=True):
            merged[place] = Factors(piece.view_as(representations[0]), U)
        return merged


def in_shared_basis(
    updates: Sequence[Update | None],
) -> tuple[Float[Tensor, "out_features rank"], list[Float[Tensor, "rank in_features"]]]:
    """The basis U that all updates of a linear share, and each one's representation in it: `U^T D_i`.

    Updates that are all but zero (no singular value is above 1e-5) have none: U is of rank 0 then.
    """
    present = [update for update in updates if update is not None]
    Q, R = torch.linalg.qr(torch.cat([update.up for update in present], dim=1))
    blocks = dict(zip(map(id, present), R.split([len(update.lora_A) for update in present], dim=1), strict=True))
    small = torch.cat([blocks[id(one)] @ torch.linalg.qr(one.lora_A.T).R.T for one in present], dim=1)
    U, S, _ = torch.linalg.svd(small, full_matrices=False)
    U = U[:, S > _SMALLEST]
    zero = torch.zeros(U.shape[1], present[0].lora_A.shape[1]).double()
    return Q @ U, [zero if one is None else U.T @ blocks[id(one)] @ one.lora_A for one in updates]


@dataclass(frozen=True)
class KnotsTies(_Knots):
    """KnOTS with TIES; the paper's settings for Llama-3-8B at rank 16, which it chose on validation data.

    Attributes:
        density: share of the entries that is kept, the largest of each adapter's, over all linears.
        scale: what the mean is multiplied with.
    """

    scale: float = 0.5

    name: ClassVar[str] = "knots-ties"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)

    def together(self, vectors: list[Tensor]) -> Tensor:  # noqa: D102
        return self.scale * voted(trimmed(vectors, self.density))


@dataclass(frozen=True)
class KnotsDareTies(_Knots):
    """KnOTS with DARE before TIES; the paper's settings for Llama-3-8B at rank 16.

    Attributes:
        drop: share of the entries that is dropped at random; the others are divided by the share that stays.
        density: share of the entries that is kept afterwards, the largest of each adapter's.
        scale: what the mean is multiplied with.
        seed: of what is drawn.
    """

    drop: float = 0.8
    scale: float = 0.4
    seed: int = 0

    name: ClassVar[str] = "knots-dare-ties"
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.drop, bool) or not isinstance(self.drop, int | float) or not 0 <= self.drop < 1:
            raise MethodError(f"`drop` (={self.drop!r}) must be a share of the values, at least 0 and below 1.")
        check_density(self.density)
        check_scale(self.scale)
        check_seed(self.seed)

    def merge(self, places: Places) -> dict[str, Factors]:  # noqa: D102
        with seeded(self.seed):
            return super().merge(places)

    def together(self, vectors: list[Tensor]) -> Tensor:  # noqa: D102
        return self.scale * voted(trimmed(dropped(vectors, 1 - self.drop), self.density))

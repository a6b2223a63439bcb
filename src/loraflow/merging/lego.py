r"""LoRA-LEGO: the adapters' ranks as units, clustered.

([Zhao et al. 2024](https://arxiv.org/abs/2409.16167), from secondary sources) A unit is row j of $A_i$ and column j of
$\omega_i s_i B_i$, one behind the other. k-means puts the units of all adapters into K clusters, each of which becomes
one rank of the merged adapter: the mean of its units, scaled to their mean norm. The output is multiplied with
$\sqrt{r / K}$, r being the mean of the adapters' ranks.

Not verified at the source: which norm the paper means (here: that of the whole unit), what r is where ranks differ, and
how k-means starts (here: k-means++, by `seed`). A unit and its negative, (a, b) and (-a, -b), are the same update, and
k-means takes them for opposites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraflow.errors import MethodError
from loraflow.merging.base import Factors, Merge, Places, Update, check_seed
from loraflow.methods.checks import check_count

_MOST_ROUNDS = 100


@dataclass(frozen=True)
class Lego(Merge):
    """LoRA-LEGO.

    Attributes:
        clusters: the merged rank; by default the largest of the adapters' at each linear.
        seed: of where k-means starts.
    """

    clusters: int | None = None
    seed: int = 0

    name: ClassVar[str] = "lego"
    paper: ClassVar[str] = "2409.16167"
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clusters is not None:
            check_count(self.clusters, "clusters")
        check_seed(self.seed)

    def merge(self, places: Places) -> dict[str, Factors]:  # noqa: D102
        generator = torch.Generator().manual_seed(self.seed)
        return {place: self._merge_one(place, updates, generator) for place, updates in places.items()}

    def _merge_one(self, place: str, updates: Sequence[Update | None], generator: torch.Generator) -> Factors:
        present = [update for update in updates if update is not None]
        ranks = [len(update.lora_A) for update in present]
        units = torch.cat([torch.cat([update.lora_A, update.up.T], dim=1) for update in present])
        count = max(ranks) if self.clusters is None else self.clusters
        if count > len(units):
            raise MethodError(
                f"`clusters` (={count}) is more than the {len(units)} units that '{place}' has, one for each rank of "
                "its adapters. Give fewer."
            )
        cluster = k_means(units, count, generator)
        centres = torch.stack([_centre(units[cluster == one]) for one in range(count)])
        A, B = centres.split([present[0].lora_A.shape[1], present[0].lora_B.shape[0]], dim=1)
        return Factors(A, math.sqrt(sum(ranks) / len(ranks) / count) * B.T)


def _centre(units: Float[Tensor, "members size"]) -> Float[Tensor, " size"]:
    mean = units.mean(dim=0)
    norm = mean.norm()
    # Units that cancel out have no direction left.
    return mean if norm == 0 else mean * (units.norm(dim=1).mean() / norm)


def k_means(points: Float[Tensor, "points size"], count: int, generator: torch.Generator) -> Int[Tensor, " points"]:
    """The cluster of every point, by Lloyd's algorithm from a start by k-means++; none of them is empty."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        far = torch.cdist(points, centres).min(dim=1).values.square()
        # Where all that are left lie on centres, any will do.
        chances = far if far.sum() > 0 else torch.ones_like(far)
        centres = torch.cat([centres, points[torch.multinomial(chances, 1, generator=generator)]])
    cluster = torch.full((len(points),), -1)
    for _ in range(_MOST_ROUNDS):
        distances = torch.cdist(points, centres)
        nearest = distances.argmin(dim=1)
        for empty in set(range(count)) - set(nearest.tolist()):
            sizes = torch.bincount(nearest, minlength=count)
            own = distances.gather(1, nearest[:, None])[:, 0].masked_fill(sizes[nearest] < 2, -1.0)
            nearest[own.argmax()] = empty
        if torch.equal(nearest, cluster):
            break
        cluster = nearest
        centres = torch.stack([points[cluster == one].mean(dim=0) for one in range(count)])
    return cluster

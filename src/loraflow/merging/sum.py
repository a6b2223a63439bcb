"""The plain sum of all updates, which nothing is lost of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loraflow.merging.base import Factors, Merge, Places, stacked


@dataclass(frozen=True)
class Sum(Merge):
    r"""Task arithmetic, exactly: $\Delta W = \sum_i D_i$, of the adapters' ranks together.

    PEFT's `add_weighted_adapter` calls it "cat"; compressed to a lower rank, "svd".
    """

    name: ClassVar[str] = "sum"

    def merge(self, places: Places) -> dict[str, Factors]:  # noqa: D102
        return {place: stacked(updates) for place, updates in places.items()}

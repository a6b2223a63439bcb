"""One colour for each adapter, told apart by colour-blind readers too (Okabe and Ito 2008)."""

from __future__ import annotations

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")

NEUTRAL = "#808080"
"""Of tokens that no adapter dominates."""


def adapter_colour(index: int) -> str:
    """Colour of the adapter at this place in the order; they repeat after eight."""
    return PALETTE[index % len(PALETTE)]

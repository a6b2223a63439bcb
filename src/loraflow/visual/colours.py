"""One colour for each adapter, told apart by colour-blind readers too (Okabe and Ito 2008)."""

from __future__ import annotations

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")

# Underlines, so that colour is not alone in telling adapters apart on a page; those after the fifth are thicker.
_STROKES = ("solid", "dashed", "dotted", "double", "wavy", "solid", "dashed", "dotted")

NEUTRAL = "#808080"
"""Of tokens that no adapter dominates."""


def adapter_colour(index: int) -> str:
    """Colour of the adapter at this place in the order; they repeat after eight."""
    return PALETTE[index % len(PALETTE)]


def adapter_styles(attribute: str, count: int) -> str:
    """CSS of the first `count` adapters, one rule each for the elements whose `attribute` is the adapter's place."""
    rules = []
    for index in range(count):
        stroke, thickness = _STROKES[index % len(PALETTE)], 2 if index % len(PALETTE) < 5 else 4
        rules.append(
            f'[{attribute}="{index}"] {{ --colour: {adapter_colour(index)}; --stroke: {stroke}; '
            f"--thickness: {thickness}px }}\n"
        )
    return "".join(rules)

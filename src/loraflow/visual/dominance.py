"""Which adapter speaks at a token: the one with the largest weight, where it leads by enough to be seen.

The pages' script, `web/weights.js`, says the same in JavaScript; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

EVEN = 0.001
"""Weights that are the same to the three decimals that pictures show."""


def dominating(weights: Sequence[float]) -> int | None:
    """The place of the largest weight; None where another is as large, to three decimals."""
    top = max(range(len(weights)), key=weights.__getitem__)
    rest = [weight for index, weight in enumerate(weights) if index != top]
    return None if rest and weights[top] - max(rest) <= EVEN else top


def dominance(weights: Sequence[float]) -> float:
    """The largest weight as a share of all positive ones, from 0 to 1."""
    return max(*weights, 0.0) / (sum(max(weight, 0.0) for weight in weights) or 1.0)

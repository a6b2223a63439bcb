"""Intervals for scores."""

from __future__ import annotations

import math


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Interval for a share of successes, at 95 % with the default `z` (Wilson 1927).

    Args:
        successes: how many succeeded.
        trials: of how many.
        z: standard normal quantile of the interval.

    Returns:
        Lower and upper end, between 0 and 1.

    Raises:
        ValueError: if there were no trials.
    """
    if trials < 1:
        raise ValueError(f"`trials` (={trials}) must be at least 1.")
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

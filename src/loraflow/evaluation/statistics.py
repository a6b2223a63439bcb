"""Intervals for scores, and tests of differences between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float, Int

Values = np.ndarray


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Interval for a share of successes, at 95 % with the default `z` (Wilson 1927).

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


def bootstrap_means(
    outcomes: Float[Values, "runs problems"], *, problems_seed: int, runs_seed: int, resamples: int = 10_000
) -> Float[Values, " resamples"]:
    """Means of scores under resampling of problems and of runs, jointly and independently of each other.

    Every run answers the same problems; so both are resampled with replacement, and not the single answers: runs differ
    by their seeds, and problems are hard or easy for all of them. Means of two methods with the same `problems_seed`
    are of the same resampled problems: their differences are paired.

    Of n > 1 runs, n - 1 are drawn each time: with n, the variance of the few seeds that anybody runs would come out too
    small by the factor (n - 1) / n (Rao and Wu 1988). Of hundreds of problems as many are drawn.

    Raises:
        ValueError: if there is no run or no problem.
    """
    if outcomes.ndim != 2 or not outcomes.size:
        raise ValueError(f"`outcomes` (of shape {outcomes.shape}) must be [runs, problems], with at least one of each.")
    runs, problems = outcomes.shape
    problem_shares = _shares(problems, problems, problems_seed, resamples)
    run_shares = _shares(runs, max(1, runs - 1), runs_seed, resamples)
    return ((run_shares @ outcomes) * problem_shares).sum(axis=1)


def percentile_interval(resampled: Float[Values, " resamples"], level: float = 0.95) -> tuple[float, float]:
    """The middle part of resampled means or differences (Efron 1979)."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_p(differences: Float[Values, " resamples"]) -> float:
    """Two-sided p-value of a difference of means, from its paired bootstrap resamples (Efron and Tibshirani 1993).

    Twice the share of resamples on the other side of zero, at least 2 / (resamples + 1): it is never zero.
    """
    others = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (int(others) + 1) / (len(differences) + 1))


def mcnemar_p(first: Int[Values, " problems"], second: Int[Values, " problems"]) -> float:
    """Exact two-sided p-value of McNemar's test (1947): two methods, right or wrong on the same problems.

    Only problems on which the two differ count; if both are equally good, each is as likely to be right there.

    Raises:
        ValueError: if they are not 0 or 1, or not as many.
    """
    if first.shape != second.shape or not np.isin([first, second], (0, 1)).all():
        raise ValueError(f"McNemar's test compares as many zeros and ones, not {first.shape} and {second.shape}.")
    wins, losses = int((first > second).sum()), int((first < second).sum())
    trials = wins + losses
    tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**trials)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are, in the same order (Holm 1979).

    Rejecting all corrected values below 0.05 keeps the chance of even one wrong rejection below 5 %.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _shares(count: int, draws: int, seed: int, resamples: int) -> Float[Values, "resamples count"]:
    """How often each of `count` things is drawn in so many draws, as shares that sum to one."""
    return np.random.default_rng(seed).multinomial(draws, np.full(count, 1 / count), size=resamples) / draws

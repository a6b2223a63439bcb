"""Intervals: against known values, theory and each other."""

from __future__ import annotations

import numpy as np
import pytest

from loraflow.evaluation.statistics import bootstrap_means, percentile_interval, wilson_interval


def test_wilson_is_as_published() -> None:
    # Newcombe 1998, table I.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    with pytest.raises(ValueError, match=r"`trials` \(=0\) must be at least 1"):
        wilson_interval(0, 0)


def test_one_run_gives_the_interval_of_a_share() -> None:
    outcomes = np.array([[1.0] * 90 + [0.0] * 210])
    means = bootstrap_means(outcomes, problems_seed=0, runs_seed=1)
    assert means.shape == (10_000,)
    assert means.mean() == pytest.approx(0.3, abs=0.005)
    assert percentile_interval(means) == pytest.approx(wilson_interval(90, 300), abs=0.01)


def test_both_problems_and_runs_vary() -> None:
    generator = np.random.default_rng(0)
    problems, runs = generator.normal(0, 2, 200), generator.normal(0, 1, 50)
    variances = [
        bootstrap_means(outcomes, problems_seed=0, runs_seed=1).var()
        for outcomes in (
            np.broadcast_to(problems, (50, 200)),
            np.broadcast_to(runs[:, None], (50, 200)),
            problems + runs[:, None],
        )
    ]
    assert variances[0] == pytest.approx(problems.var() / 200, rel=0.05)
    assert variances[1] == pytest.approx(runs.var() / 50, rel=0.05)
    assert variances[2] == pytest.approx(variances[0] + variances[1], rel=0.05)


def test_the_same_problems_make_differences_paired() -> None:
    generator = np.random.default_rng(0)
    hard = (generator.random((1, 400)) < 0.5).astype(float)
    better = np.maximum(hard, generator.random((1, 400)) < 0.05)
    worse_means, better_means = (bootstrap_means(x, problems_seed=3, runs_seed=4) for x in (hard, better))
    other_means = bootstrap_means(better, problems_seed=5, runs_seed=4)
    low, high = percentile_interval(better_means - worse_means)
    assert 0 < low < (better - hard).mean() < high
    assert percentile_interval(other_means - worse_means)[0] < 0


def test_the_same_seeds_give_the_same_means() -> None:
    outcomes = np.eye(3)
    first = bootstrap_means(outcomes, problems_seed=1, runs_seed=2, resamples=10)
    assert np.array_equal(first, bootstrap_means(outcomes, problems_seed=1, runs_seed=2, resamples=10))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (4,)])
def test_nothing_to_resample_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`outcomes` \(of shape .*\) must be \[runs, problems\]"):
        bootstrap_means(np.zeros(shape), problems_seed=0, runs_seed=0)

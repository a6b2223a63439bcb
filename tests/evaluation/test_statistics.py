"""Intervals and tests: against known values, theory and each other."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraflow.evaluation.statistics import (
    bootstrap_means,
    bootstrap_p,
    holm,
    mcnemar_p,
    percentile_interval,
    wilson_interval,
)


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
    assert variances[1] == pytest.approx(runs.var(ddof=1) / 50, rel=0.05)
    assert variances[2] == pytest.approx(variances[0] + variances[1], rel=0.05)


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_few_runs_vary_as_much_as_they_do(runs: int) -> None:
    means = np.random.default_rng(0).normal(0, 1, runs)
    outcomes = np.broadcast_to(means[:, None], (runs, 200))
    variance = bootstrap_means(outcomes, problems_seed=0, runs_seed=1).var()
    assert variance == pytest.approx(means.var(ddof=1) / runs, rel=0.05)


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


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (4,)])
def test_nothing_to_resample_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`outcomes` \(of shape .*\) must be \[runs, problems\]"):
        bootstrap_means(np.zeros(shape), problems_seed=0, runs_seed=0)


# ---- Tests of differences ------------------------------------------------------------------------------------------


def pairs(wins: int, losses: int, both: int = 0, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of two methods, of which the first is right alone `wins` times, the second `losses` times."""
    first = [1] * wins + [0] * losses + [1] * both + [0] * neither
    second = [0] * wins + [1] * losses + [1] * both + [0] * neither
    return np.array(first), np.array(second)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(10, 2, 0.03857421875), (2, 10, 0.03857421875), (5, 0, 0.0625), (1, 0, 1.0), (3, 3, 1.0), (0, 20, 2 / 2**20)],
)
def test_mcnemar_is_the_binomial_test_of_where_two_differ(wins: int, losses: int, p: float) -> None:
    assert mcnemar_p(*pairs(wins, losses, both=7, neither=4)) == pytest.approx(p, rel=1e-12)


@given(wins=st.integers(0, 200), losses=st.integers(0, 200))
def test_mcnemar_agrees_with_scipy(wins: int, losses: int) -> None:
    if wins + losses == 0:
        return
    expected = pytest.importorskip("scipy.stats").binomtest(wins, wins + losses).pvalue
    assert mcnemar_p(*pairs(wins, losses)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [0, 5])
def test_methods_that_never_differ_have_a_p_of_one(count: int) -> None:
    assert mcnemar_p(*pairs(0, 0, both=count, neither=3)) == 1.0


def test_mcnemar_of_thousands_of_problems_is_a_number() -> None:
    assert 0 <= mcnemar_p(*pairs(3000, 10)) < 1e-300
    assert mcnemar_p(*pairs(2000, 2000)) == 1.0


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("second", [np.array([0, 1]), np.array([0, 1, 2]), np.array([0.5, 1, 0])])
def test_mcnemar_wants_as_many_zeros_and_ones(second: np.ndarray) -> None:
    with pytest.raises(ValueError, match="McNemar's test compares as many zeros and ones, not"):
        mcnemar_p(np.array([0, 1, 1]), second)


def test_holm_is_as_worked_by_hand() -> None:
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which may not be below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12), st.randoms())
def test_holm_corrects_upwards_and_keeps_the_order(values: list[float], random: Random) -> None:
    corrected = holm(values)
    assert all(raw <= new <= 1 for raw, new in zip(values, corrected, strict=True))
    ranked = [new for _, new in sorted(zip(values, corrected, strict=True))]
    assert ranked == sorted(ranked)
    if values:
        assert min(corrected) == min(1.0, len(values) * min(values))
    order = list(range(len(values)))
    random.shuffle(order)
    assert holm([values[i] for i in order]) == [corrected[i] for i in order]


def test_the_bootstrap_counts_resamples_on_the_other_side_twice() -> None:
    differences = np.array([-1.0] * 30 + [1.0] * 969)
    assert bootstrap_p(differences) == pytest.approx(2 * 31 / 1000)
    assert bootstrap_p(np.ones(999)) == pytest.approx(2 / 1000)
    assert bootstrap_p(np.zeros(99)) == 1.0


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50))
def test_the_bootstrap_has_two_sides_and_is_never_sure(values: list[int]) -> None:
    differences = np.array(values, float)
    p = bootstrap_p(differences)
    assert 0 < p <= 1
    assert p == bootstrap_p(-differences)

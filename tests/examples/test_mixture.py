"""Mixtures: how many of each, none twice, the same by the same seed."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraflow.errors import DataError
from loraflow.examples import mix, parse_examples


def part(name, count):
    return parse_examples([{"prompt": f"{name}{n}", "completion": name} for n in range(count)])


def counts(mixed):
    return {name: sum(e.completion == name for e in mixed) for name in {e.completion for e in mixed}}


def test_without_weights_all_are_taken():
    a, b = part("a", 3), part("b", 2)
    assert mix([a, b]) == [*a, *b]
    assert mix([a, a]) == [*a, *a]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((70, 100), (0.7, 0.3), (70, 30)),
        ((700, 30), (0.7, 0.3), (70, 30)),
        ((10, 10), (7, 3), (10, 4)),
        ((5, 5), (1, 1), (5, 5)),
        ((1000, 1), (1, 1000), (1, 1)),
        ((3,), (0.2,), (3,)),
    ],
)
def test_the_shortest_for_its_weight_gives_all(sizes, weights, expected):
    parts = [part(name, size) for name, size in zip("ab", sizes, strict=False)]
    assert counts(mix(parts, weights)) == dict(zip("ab", expected, strict=False))


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=4), st.integers(0, 9))
def test_none_twice_in_order_and_by_the_seed(lots, seed):
    parts = [part(str(n), size) for n, (size, _) in enumerate(lots)]
    weights = [weight for _, weight in lots]
    mixed = mix(parts, weights, seed=seed)
    whole = mix(parts)
    places = [whole.index(example) for example in mixed]
    assert places == sorted(set(places))
    assert mixed == mix(parts, weights, seed=seed)
    taken = counts(mixed)
    assert any(taken[str(n)] == size for n, (size, _) in enumerate(lots))
    unit = min(size / weight for size, weight in lots)
    assert all(taken[str(n)] - max(1, math.floor(weight * unit)) in (0, 1) for n, weight in enumerate(weights))


def test_another_seed_draws_others():
    a, b = part("a", 50), part("b", 5)
    assert mix([a, b], [1, 1], seed=0) != mix([a, b], [1, 1], seed=1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "`weights` (=[1]) must have one number for each of the 2 parts."),
        ([1, 0], "`weights` (=[1, 0]) must be greater than 0, and finite. Leave such a part out."),
        ([1, math.nan], "must be greater than 0, and finite."),
        ([math.inf, 1], "must be greater than 0, and finite."),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(DataError, match=re.escape(message)):
        mix([part("a", 2), part("b", 2)], weights)

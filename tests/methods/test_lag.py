"""LAG: candidates that are read alone, libraries, and what it refuses.

The formula itself, with every kind of adapter, is in test_projections.py; in a model, in tests/core/test_slots.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import Lag, SpectR
from loraflow.errors import MethodError
from tests.methods.test_projections import FEATURES, NAMES, site_of, slow, update

LIBRARIES = {"tasks": ["a3", "a0"], "knowledge": ["a1", "a2", "a4"]}


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["plain", "absent", "zero B", "deficient B"]), min_size=5, max_size=5).filter(
        lambda kinds: {"plain", "deficient B"} & set(kinds)
    ),
    candidates=st.integers(1, 5),
    libraries=st.sampled_from([None, LIBRARIES]),
    seed=st.integers(0, 99),
)
def test_candidates_that_are_read_alone_weigh_as_all(kinds, candidates, libraries, seed):
    torch.manual_seed(seed)
    updates, x = [update(kind) for kind in kinds], torch.randn(6, FEATURES, dtype=torch.float64)
    method = Lag(candidates, libraries)
    gate = method.gate(site_of(updates))
    assert gate.lists == (gate.candidates < int(gate.members.sum()))
    if not gate.lists:
        return
    listed = gate.shortlist(x)
    assert listed.shape == (6, gate.candidates)
    assert all(len(set(row)) == len(row) for row in listed.tolist())
    # Slots are padded, and a `lora_bias` is behind the others.
    slots = torch.zeros(6, gate.candidates, 5, dtype=torch.float64)
    slots[..., 3] = 1.0
    for token, row in enumerate(listed.tolist()):
        for place, adapter in enumerate(row):
            slots[token, place, :3] = updates[adapter].lora_A @ x[token]
    found = torch.zeros(6, 5, dtype=torch.float64).scatter(-1, listed, gate.weigh_listed(slots, listed))
    torch.testing.assert_close(found, slow(method, x, updates))


def test_with_all_as_candidates_it_is_spectrs_first():
    site, x = site_of([update("plain") for _ in NAMES]), torch.randn(20, FEATURES, dtype=torch.float64)
    assert torch.equal(Lag().gate(site)(x), SpectR(1).gate(site)(x))
    assert not torch.equal(Lag(1).gate(site)(x), SpectR(1).gate(site)(x))


def test_each_library_has_a_winner_where_one_of_its_adapters_adds_something():
    updates, x = [update("plain") for _ in NAMES], torch.randn(20, FEATURES, dtype=torch.float64)
    gate = Lag(2, LIBRARIES).gate(site_of(updates))
    weights = gate(x)
    assert gate.most == 2
    assert (weights[:, [0, 3]].sum(dim=-1) == 1).all()
    assert (weights[:, [1, 2, 4]].sum(dim=-1) == 1).all()
    gate = Lag(2, LIBRARIES).gate(site_of([update("zero B"), *updates[1:3], None, updates[4]]))
    assert gate.most == 1
    assert not gate(x)[:, [0, 3]].any()


def test_adapters_of_unlike_ranks_are_not_read_alone():
    assert Lag(1).gate(site_of([update("plain", 2), update("plain", 2)])).lists
    assert not Lag(1).gate(site_of([update("plain", 2), update("plain", 3)])).lists


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Lag(0), "`candidates` (=0) must be a whole number of at least 1."),
        (lambda: Lag(True), "`candidates` (=True) must be a whole number of at least 1."),
        (
            lambda: Lag(libraries=["a", "b"]).check(["a", "b"]),
            "`libraries` (=['a', 'b']) must give adapters by",
        ),
        (
            lambda: Lag(libraries={"x": "a"}).check(["a"]),
            "gives the library 'x' 'a'; it must be a list of at",
        ),
        (lambda: Lag(libraries={"x": ["a"], "y": []}).check(["a"]), "gives the library 'y' []; it must be a list"),
        (
            lambda: Lag(libraries={"x": ["maht"]}).check(["math"]),
            "names the unknown adapter 'maht'. Known: ",
        ),
        (
            lambda: Lag(libraries={"x": ["a"], "y": ["a", "b"]}).check(["a", "b"]),
            "`libraries` has the adapter 'a' twice, in 'x' and 'y'. Put it into one of them.",
        ),
        (lambda: Lag(libraries={"x": ["a"]}).check(["a", "b"]), "`libraries` leaves out the adapter 'b'. Put every"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        make()

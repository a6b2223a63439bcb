"""Norm-max: scalings count, and what it refuses; the formula is in test_projections.py and tests/core/test_slots.py."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from loraflow import NormMax
from loraflow.errors import MethodError
from tests.methods.test_projections import FEATURES, site_of, update


def test_an_adapter_that_is_scaled_up_is_chosen_everywhere():
    updates, x = [update("plain") for _ in range(3)], torch.randn(30, FEATURES, dtype=torch.float64)
    before = NormMax().gate(site_of(updates))(x)
    assert (before.sum(dim=0) > 0).all()
    # As an alpha ten thousand times larger, or rsLoRA's root, makes it.
    updates[1] = dataclasses.replace(updates[1], scaling=1e4 * updates[1].scaling)
    expected = torch.zeros_like(before)
    expected[:, 1] = 1
    assert torch.equal(NormMax().gate(site_of(updates))(x), expected)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: NormMax(temperature=-1), "`temperature` (=-1) must be a positive number."),
        (lambda: NormMax(weighting="sum"), "`weighting` is unknown: 'sum'. Known: 'equal', 'softmax'."),
        (lambda: NormMax(0), "`top_k` (=0) must be a whole number of at least 1."),
        (lambda: NormMax(None), "`top_k` (=None) must be a whole number of at least 1."),
        (lambda: NormMax(3).check(["a", "b"]), "`top_k` (=3) must be between 1 and the number of adapters (=2)."),
    ],
)
def test_settings_that_cannot_be_are_refused(make, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        make()

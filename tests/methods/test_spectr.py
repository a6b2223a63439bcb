"""SpectR: its scores are those of Arrow and norm-max where they must be, its weights, and what it refuses.

The formula itself, with every kind of adapter, is in test_projections.py; in a model, in tests/core/test_slots.py.
"""

from __future__ import annotations

import re

import pytest
import torch

from loraflow import Arrow, NormMax, SpectR
from loraflow.errors import MethodError
from tests.methods.test_projections import FEATURES, site_of, update


def test_of_rank_one_it_chooses_as_arrow_and_with_singular_values_as_norm_max_unscaled():
    x = torch.randn(20, FEATURES, dtype=torch.float64)
    ones = site_of([update("plain", 1) for _ in range(5)])
    assert torch.equal(SpectR(2).gate(ones)(x) > 0, Arrow(2).gate(ones)(x) > 0)
    # All have the same scaling.
    site = site_of([update("plain") for _ in range(5)])
    assert torch.equal(SpectR(1, True).gate(site)(x), NormMax().gate(site)(x))


@pytest.mark.parametrize(("adapters", "expected"), [(1, 1), (3, 3), (5, 4)])
def test_four_or_all_where_there_are_fewer_have_equal_weights(adapters, expected):
    weights = SpectR().gate(site_of([update("plain") for _ in range(adapters)]))(torch.randn(7, FEATURES))
    assert ((weights > 0).sum(dim=-1) == expected).all()
    torch.testing.assert_close(weights[weights > 0], torch.full((7 * expected,), 1 / expected, dtype=weights.dtype))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SpectR(temperature=0), "`temperature` (=0) must be a positive number."),
        (lambda: SpectR(weighting="equl"), "`weighting` is unknown: 'equl'. Known: 'equal', 'softmax'. Did you mean"),
        (lambda: SpectR(singular_values="no"), "`singular_values` (='no') must be true or false."),
        (lambda: SpectR(3).check(["a", "b"]), "`top_k` (=3) must be between 1 and the number of adapters (=2)."),
    ],
)
def test_settings_that_cannot_be_are_refused(make, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        make()

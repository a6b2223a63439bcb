"""Every kind of adapter: PEFT's numbers, or a refusal; `scripts/check_adapters.py` writes them down."""

from __future__ import annotations

import pytest

from tests.zoo.attempt import attempt
from tests.zoo.kinds import KINDS


@pytest.mark.parametrize("kind", KINDS, ids=[kind.title for kind in KINDS])
def test_what_is_accepted_is_what_peft_gives(kind):
    assert attempt(kind).kind in ("equal", "as saved", "refused"), attempt(kind)


def test_some_of_each_outcome_are_there():
    assert {attempt(kind).kind for kind in KINDS[::4]} == {"equal", "as saved", "refused"}

"""What an adapter on disk is tried with."""

from __future__ import annotations

import pytest

from tests.tiny import save_adapter, tiny_model


@pytest.fixture(scope="package")
def base():
    return tiny_model()


@pytest.fixture
def saved(base, tmp_path):
    """A plain adapter on disk, to be damaged."""
    return save_adapter(base, tmp_path / "adapter", ["q_proj", "v_proj"])

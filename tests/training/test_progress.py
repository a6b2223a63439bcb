"""Progress where there is a notebook."""

from __future__ import annotations

import sys
import types

import pytest
from rich.console import Console

from loraflow.training import fit
from tests.training.test_fit import QUICK, adapters, make_model, reversals

__all__ = ["adapters", "make_model"]


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would show, by a module in IPython's place."""
    shown = []
    display = types.ModuleType("IPython.display")
    display.HTML = lambda html: html

    class Handle:
        def update(self, html):
            shown.append(html)

    def show(html, display_id=False):
        shown.append(html)
        return Handle()

    display.display = show
    package = types.ModuleType("IPython")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    yield shown
    sys.modules.pop("transformers.utils.notebook", None)


def test_a_notebook_shows_a_bar_and_no_lines(make_model, shown, tmp_path):
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        fit(make_model(), reversals(8), config=QUICK, console=Console(file=file, force_jupyter=True))
    assert log.read_text() == ""
    assert any("<progress value='4' max='4'" in str(html) for html in shown)
    assert "fitting" in shown[-1]
    assert "loss" in shown[-1]

from __future__ import annotations

import os
import shutil

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.shapes import check_shapes

# Before the first import of the library: every shape that it writes down is checked in every test.
check_shapes("loraflow")

# The same examples everywhere, and none that fails because a machine is slow. Fixtures may be shared by examples: they
# are folders and models that no example changes for another.
_UNCHECKED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=_UNCHECKED)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def unchecked_shapes(monkeypatch):
    """For shapes that the library refuses itself, and for graphs, which the checks would break."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def offline_page():
    """A page of a real browser that may open files, and nothing of a network; errors on it fail the test."""
    executable = os.environ.get("LORAFLOW_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("there is no Chromium here; LORAFLOW_CHROMIUM may name one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = browser.new_context(offline=True)
        page = context.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda r: problems.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None
        )
        yield page
        browser.close()
    assert not problems

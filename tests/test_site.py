"""The documentation site builds without a warning, with everything that the code has in it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer.main

from loraflow.cli import app
from loraflow.methods import method_names
from tests.test_docs import ROOT

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_command_is_there(site):
    page = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    for command in typer.main.get_command(app).commands:
        assert f'id="loraflow-{command}"' in page


def test_every_method_and_every_docstring_is_there(site):
    page = (site / "reference" / "methods" / "index.html").read_text(encoding="utf-8")
    for name in method_names():
        assert name.replace("-", "_") in page
    for page in site.rglob("*.html"):
        assert "\n:::" not in page.read_text(encoding="utf-8"), page


def test_links_out_of_the_pages_do_not_end_in_nothing(site):
    for page in site.rglob("*.html"):
        assert 'href="../src/' not in page.read_text(encoding="utf-8"), page


def test_every_notebook_is_a_page_with_its_pictures(site):
    notebooks = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        page = (site / "notebooks" / notebook.stem / "index.html").read_text(encoding="utf-8")
        assert "data:image/png;base64," in page
        assert f'download="{notebook.name}"' in page
        assert (site / "notebooks" / notebook.name).is_file()
        assert f'href="../{notebook.name}"' in page
        # Links to other notebooks lead to their pages.
        others = [other.name for other in notebooks if other != notebook]
        assert not [name for name in others if f'{name}"' in page]

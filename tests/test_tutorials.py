"""The tutorials run as they stand on their pages, each in a folder of its own, one after the other where they go on."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from typer.testing import CliRunner

from loraflow.cli import app
from tests.test_docs import BLOCK, ROOT

PAGES = ROOT / "docs" / "tutorials"
DEADLINE_S = 60


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def follow(page, here, only=("python", "bash", "yaml"), port=8000):
    """Do what a page says, block by block; returns what its Python has made."""
    made = {}
    for match in BLOCK.finditer((PAGES / page).read_text(encoding="utf-8")):
        language, block = match[1], match[2].replace(":8000", f":{port}")
        if language not in only:
            continue
        if language == "python":
            exec(compile(block, page, "exec"), made)
        elif language == "yaml":
            (here / re.match(r"# (\S+)\n", block)[1]).write_text(block, encoding="utf-8")
        else:
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                if words[:1] == ["loraflow"] and words[1] != "serve":
                    result = CliRunner().invoke(app, words[1:])
                    assert result.exit_code == 0, f"{page}: {line}\n{result.output}"
    return made


def test_a_first_fusion(here, capsys):
    made = follow("first-fusion.md", here)
    assert made["trace"].weights.shape[-1] == 2
    assert "of 20 have the right number in them" in capsys.readouterr().out


def test_your_own_adapters_and_a_served_fusion(here, capsys):
    follow("own-adapters.md", here)
    assert (here / "es-math-adapter" / "adapter_config.json").exists()
    report = (here / "runs" / "es-math" / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \|", report, re.MULTILINE)
    assert {"base", "es", "math", "average", "es-math"} <= set(rows)
    (served,) = re.findall(r"^loraflow (serve .*) --port 8000$", (PAGES / "served-fusion.md").read_text(), re.MULTILINE)
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "loraflow", *shlex.split(served), "--port", str(port)], cwd=here)
    try:
        until = time.monotonic() + DEADLINE_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=DEADLINE_S).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
        made = follow("served-fusion.md", here, only=("python",), port=port)
    finally:
        server.terminate()
        server.wait(DEADLINE_S)
    assert len(made["answer"].choices[0].fusion_weights) > 0


def test_a_comparison_for_a_paper(here):
    follow("comparison.md", here)
    report = (here / "runs" / "first" / "report.md").read_text(encoding="utf-8")
    assert "| learned-static | 2 |" in report

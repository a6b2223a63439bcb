"""The benchmarks that need a GPU run, with small shapes, on a CPU, and those that may have one wait for it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPT = FOLDER / "gpu.py"


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("growth")


def test_growth_counts_what_a_device_has_done(growth, monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "synchronize", done.append)
    monkeypatch.setattr(growth.time, "perf_counter", lambda: len(done))
    assert growth.clock_s(torch.device("cuda", 1)) == 1
    assert done == [torch.device("cuda", 1)]
    growth.clock_s(torch.device("cpu"))
    assert len(done) == 1


def test_growth_has_the_ways_in_the_precision_and_place_that_are_asked_for(growth, monkeypatch, capsys):
    sizes = []
    monkeypatch.setattr(growth, "cheapest", lambda one: (sizes.append(one), "all")[1])
    # Nothing is computed on the meta device.
    monkeypatch.setattr(growth, "run_rounds", lambda contenders, rounds: {name: [1.0] for name in contenders})
    monkeypatch.setattr(sys, "argv", ["growth", "--hidden", "8", "--device", "meta", "--dtype", "bfloat16"])
    growth.report_ways(growth.parse_arguments())
    assert {(one.itemsize, one.device) for one in sizes} == {(2, "meta")}


def test_the_benchmark_for_gpus_runs_without_one():
    small = ("--tiny", "--device", "cpu", "--threads", "1", "--batch", "2", "--new-tokens", "2", "--without-compile")
    done = subprocess.run([sys.executable, str(SCRIPT), *small], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for line in (
        "machine: ",
        "== llama-2-7b: 3 layers",
        "== qwen3-8b: 3 layers",
        "  batch   2: ",
        "fit, 4 x 32 tokens",
    ):
        assert line in done.stdout

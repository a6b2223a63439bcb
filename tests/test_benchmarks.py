"""The benchmarks that need a GPU run, with small shapes, on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


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

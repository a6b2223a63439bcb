"""Names that others write down, in entry points, task files or on a wire: they go on meaning what they mean."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from loraflow.serving.vllm import LOAD_FORMAT
from loraflow.serving.vllm.request_weights import fusion_of, processor_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TASK_FILES = ROOT / "src" / "loraflow" / "evaluation" / "paper"
FUNCTIONS = {
    name for file in TASK_FILES.glob("*.yaml") for name in re.findall(r"!function (\S+)", file.read_text("utf-8"))
}


def resolved(name: str) -> object:
    module, _, attribute = name.rpartition(":" if ":" in name else ".")
    return getattr(importlib.import_module(module), attribute)


def test_entry_points():
    assert callable(resolved(PROJECT["scripts"]["loraflow"]))
    assert PROJECT["entry-points"]["vllm.general_plugins"] == {"loraflow": "loraflow.serving.vllm:register"}
    assert callable(resolved("loraflow.serving.vllm:register"))
    assert LOAD_FORMAT == "loraflow"


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_of_the_papers_task_files(name):
    assert name.startswith("loraflow.evaluation.paper.problems.")
    assert callable(resolved(name))


@pytest.mark.parametrize(
    "name",
    [
        "loraflow.evaluation.sandbox.run_tests",
        "loraflow.evaluation.sandbox.run_many",
        "loraflow.evaluation.harness.FusionLM",
        "loraflow.evaluation.harness.PAPER_TASKS",
        "loraflow.evaluation.compare.compare",
        "loraflow.evaluation.compare.open_comparison",
        "loraflow.methods.static.ConstantGate",
        "loraflow.official.load_official",
        "loraflow.export.export_peft",
        "loraflow.examples.read_examples",
        "loraflow.visual.explorer.save_explorer",
        "loraflow.visual.figures.save_figure",
    ],
)
def test_names_that_the_documents_tell(name):
    assert resolved(name) is not None


def test_the_processor_that_vllm_is_given_by_name():
    name = processor_name("/some/fusion")
    assert name == "loraflow.serving.vllm.requests:For_" + b"/some/fusion".hex()
    assert fusion_of(name) == "/some/fusion"
    # vLLM is not here to import it; it is where its name says.
    assert (ROOT / "src" / "loraflow" / "serving" / "vllm" / "requests.py").is_file()

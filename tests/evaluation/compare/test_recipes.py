"""The recipes in the repository are whole, and say what the paper's data says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loraflow.evaluation.compare.comparison import open_comparison
from loraflow.evaluation.compare.plan import SettingSpec, read_plan, study_names
from loraflow.evaluation.compare.tasks import load_setting

REPOSITORY = Path(__file__).parents[3]
RECIPE = REPOSITORY / "recipes" / "llama-2-7b.yaml"
WORLD = REPOSITORY / "benchmarks" / "world.yaml"
PAPER = Path(os.environ.get("LORAFLOW_PAPER_DATA", "no such place"))
needs_data = pytest.mark.skipif(not PAPER.is_dir(), reason="LORAFLOW_PAPER_DATA does not name the paper's data")


def test_the_recipe_has_all_that_the_studies_name(monkeypatch):
    monkeypatch.setenv("LORAFLOW_PAPER_DATA", "somewhere")
    plan = read_plan("mixed-prompts", setting=str(RECIPE))
    assert isinstance(plan.setting, SettingSpec)
    assert set(plan.tasks) <= plan.setting.tasks.keys()
    assert plan.setting.adapters["zh"] == str(RECIPE.parent / "checkpoints" / "LoRAs" / "zh_lora")
    assert plan.setting.base == "meta-llama/Llama-2-7b-hf"


@needs_data
def test_the_recipe_reads_the_papers_data():
    plan = read_plan("granularity", setting=str(RECIPE))
    setting = load_setting(plan.setting)
    system_prompts = json.loads((PAPER / "system_prompts.json").read_text(encoding="utf-8"))
    assert list(setting.tasks) == ["zh-math", "ru-math", "es-math", "zh-code", "ru-code", "es-code"]
    for name, task in setting.tasks.items():
        assert task.train_prompt.system_prompt == system_prompts[name.replace("-", "_")]
        assert len(task.train) == 200
        assert task.adapters == tuple(name.split("-"))
    math = setting.tasks["ru-math"]
    assert (len(math.test), len(math.dev)) == (250, 100)
    assert math.prompt.system_prompt == system_prompts["ru_math"]
    assert setting.tasks["es-code"].harness.name == "loraflow_es_code"


@needs_data
@pytest.mark.parametrize("study", [name for name in study_names() if name != "many"])
def test_every_study_opens_on_the_recipe(study):
    comparison = open_comparison(read_plan(study, setting=str(RECIPE)), allow_code=True)
    assert {cell.method for cell in comparison.cells} >= {comparison.reference}
    if study == "methods":
        assert len(comparison.left_out) == 4 * len(comparison.setting.tasks)


@needs_data
def test_questions_in_two_languages_are_made_of_the_same_problem():
    setting = load_setting(read_plan("mixed-prompts", setting=str(RECIPE)).setting, tasks=["zh-math-alternate"])
    question = setting.tasks["zh-math-alternate"].test[2].messages[0]["content"]
    assert question == (
        "乔希决定试试房屋翻新。 Compra una casa de $80 000 y luego agrega $50 000 para las reparaciones. "
        "这样做使房子的价值增加了 150%。 ¿Cuánto obtuvo de ganancia?"
    )


@pytest.mark.parametrize("study", ["methods", "granularity", "gates", "few-shot"])
def test_the_small_worlds_table_has_every_row_of_the_studies(study: str) -> None:
    rows = [spec.model_dump() for spec in read_plan(str(WORLD)).methods.values()]
    for name, spec in read_plan(study, setting="small-world").methods.items():
        asked = spec.model_copy(update={"if_possible": False}).model_dump()
        assert asked in rows or _by_granularity(asked) in rows, name


def _by_granularity(row: dict[str, Any]) -> dict[str, Any]:
    """The same row, saying nothing of the default granularity."""
    options = {key: value for key, value in row["options"].items() if (key, value) != ("granularity", "layer")}
    return {**row, "options": options}

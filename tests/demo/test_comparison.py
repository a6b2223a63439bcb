"""`loraflow demo`: it compares what it says, and leaves the files that it names."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from loraflow import FusedModel
from loraflow.cli import app
from loraflow.demo import setting
from loraflow.demo.comparison import Result, demo_plan
from loraflow.demo.tasks import load_task
from loraflow.evaluation.statistics import wilson_interval

ROWS = ["base", "zh-chat", "math", "average", "lora-flow"]
COUNT = 3


def test_the_plan_is_what_came_before_and_the_fitted_fusion():
    plan = demo_plan(load_task("zh-math"), {"granularity": "step"}, seed=3, count=7)
    assert [(name, spec.method) for name, spec in plan.methods.items()] == [(name, name) for name in ROWS]
    assert plan.methods["lora-flow"].options == {"granularity": "step"}
    assert (plan.tasks, plan.seeds, plan.limit) == (["zh-math"], [3], 7)


def test_a_result_has_both_shares_with_their_intervals():
    summary = Result(
        "average", ["a", "b", "c", "d"], [True, True, True, False], [True, False, False, False], 1.5
    ).summary()
    assert (summary["accuracy"], summary["in_language_accuracy"], summary["problems"]) == (0.75, 0.25, 4)
    assert summary["accuracy_interval"] == wilson_interval(3, 4)
    assert summary["in_language_interval"] == wilson_interval(1, 4)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of one step and a few problems: where its files are, and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setting, "RECIPES", {"lora-flow": {"learning_rate": 1e-2, "max_steps": 1}})
        patch.setenv("COLUMNS", "200")
        arguments = ["--problems", str(COUNT), "--seed", "4", "--method-option", "granularity=step"]
        shown = CliRunner().invoke(app, ["demo", *arguments, "--output", str(output)])
    assert shown.exit_code == 0, shown.output
    return output, shown.output


def test_the_demo_leaves_the_files_that_it_names(demo):
    output, _ = demo
    assert sorted(path.name for path in output.iterdir()) == ["answers", "data", "fusion", "results.json"]
    task = load_task("zh-math")
    for split in ("train", "dev", "test"):
        lines = (output / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == [problem.prompt for problem in getattr(task, split)]
    model = FusedModel.from_pretrained(output / "fusion")
    assert (model.adapter_names, model.method.granularity) == (["zh-chat", "math"], "step")
    content = json.loads((output / "results.json").read_text())
    assert (content["task"], content["seed"]) == ("zh-math", 4)
    assert [result["method"] for result in content["results"]] == ROWS
    for result in content["results"]:
        lines = (output / "answers" / f"{result['method']}.jsonl").read_text(encoding="utf-8").splitlines()
        answers = [json.loads(line) for line in lines]
        assert [answer["prompt"] for answer in answers] == [problem.prompt for problem in task.test[:COUNT]]
        assert list(answers[0]) == ["prompt", "answer", "right", "in_language"]
        assert result["problems"] == COUNT
        assert result["accuracy"] == sum(answer["right"] for answer in answers) / COUNT
        assert result["in_language_accuracy"] == sum(answer["in_language"] for answer in answers) / COUNT


def test_the_demo_prints_its_table_and_a_trace(demo):
    output, shown = demo
    for result in json.loads((output / "results.json").read_text())["results"]:
        line = next(line for line in shown.splitlines() if re.match(rf" {result['method']} +\d", line))
        low, high = (100 * end for end in result["accuracy_interval"])
        assert f"{100 * result['accuracy']:.1f}  ({low:.1f} to {high:.1f})" in line
        assert line.split()[-1] == str(COUNT)
    assert "gate values on 200 examples; base and adapters stay frozen" in shown
    assert "which adapter spoke, in one answer:" in shown
    assert f"fusion: {output}/fusion" in shown

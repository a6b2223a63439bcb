"""`loraflow demo`: it compares what it says, and leaves the files that it names."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from loraflow import FusedModel
from loraflow.cli import app
from loraflow.demo import comparison
from loraflow.demo.comparison import QUICK, Result, Size, demo_plan
from loraflow.demo.tasks import load_task
from loraflow.evaluation.compare import prepare
from loraflow.evaluation.statistics import wilson_interval

ROWS = ["base", "zh-chat", "math", "average", "lora-flow"]
COUNT = 3


def test_the_plan_is_what_came_before_and_the_fitted_fusion():
    plan = demo_plan(load_task("zh-math"), {"granularity": "step"}, seed=3, size=Size(problems=7))
    assert [(name, spec.method) for name, spec in plan.methods.items()] == [(name, name) for name in ROWS]
    assert plan.methods["lora-flow"].options == {"granularity": "step"}
    assert (plan.tasks, plan.seeds, plan.limit) == (["zh-math"], [3], 7)


def test_a_smaller_demo_says_what_is_smaller():
    task = load_task("zh-math")
    assert Size(problems=500).less_than_whole(task) == ""
    assert QUICK.less_than_whole(task) == (
        "the gates learn for 100 steps instead of 250, and are not at their best; "
        "100 of 500 test problems, so intervals are some 2.2 times as wide"
    )
    plan = demo_plan(task, {}, seed=0, size=QUICK)
    assert (plan.methods["lora-flow"].fit, plan.limit) == ({"max_steps": 100}, 100)


def test_a_result_has_both_shares_with_their_intervals():
    summary = Result(
        "average", ["a", "b", "c", "d"], [True, True, True, False], [True, False, False, False], 1.5
    ).summary()
    assert (summary["accuracy"], summary["in_language_accuracy"], summary["problems"]) == (0.75, 0.25, 4)
    assert summary["accuracy_interval"] == wilson_interval(3, 4)
    assert summary["in_language_interval"] == wilson_interval(1, 4)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A quick demo of one step and a few problems, stopped before it learns and started again.

    Returns:
        Where its files are, and what it printed when it was stopped and at the end.
    """
    output = tmp_path_factory.mktemp("demo") / "new"
    arguments = ["--quick", "--problems", str(COUNT), "--seed", "4", "--method-option", "granularity=step"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "QUICK", Size(problems=100, steps=1))
        patch.setenv("COLUMNS", "200")
        with pytest.MonkeyPatch.context() as stopping:
            stopping.setattr(prepare, "fit", interrupt)
            stopped = CliRunner().invoke(app, ["demo", *arguments, "--output", str(output)])
        shown = CliRunner().invoke(app, ["demo", *arguments, "--output", str(output)])
    assert stopped.exit_code == 130, stopped.output
    assert shown.exit_code == 0, shown.output
    return output, stopped.output, shown.output


def test_a_demo_that_was_stopped_goes_on(demo):
    _, stopped, shown = demo
    assert "5 cells, 0 of them finished before" in stopped
    assert "[4/5] average" in stopped
    assert "5 cells, 4 of them finished before" in shown
    assert "[1/1] lora-flow" in shown
    assert "average, zh-math" not in shown


def test_the_demo_leaves_the_files_that_it_names(demo):
    output, *_ = demo
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
    output, _, shown = demo
    for result in json.loads((output / "results.json").read_text())["results"]:
        line = next(line for line in shown.splitlines() if re.match(rf" {result['method']} +\d", line))
        low, high = (100 * end for end in result["accuracy_interval"])
        assert f"{100 * result['accuracy']:.1f}  ({low:.1f} to {high:.1f})" in line
        assert line.split()[-1] == str(COUNT)
    assert f"instead of 250, and are not at their best; {COUNT} of 500 test problems" in shown
    assert "gate values on 200 examples; base and adapters stay frozen" in shown
    assert "which adapter spoke, in one answer:" in shown
    assert f"fusion: {output}/fusion" in shown

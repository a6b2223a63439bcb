"""`loraflow compare`, run as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from loraflow import FusedModel
from loraflow.cli import app
from loraflow.cli.compare import Rows, _print_table
from loraflow.errors import LoraflowError
from loraflow.evaluation.compare import workers
from loraflow.evaluation.compare.plan import Plan, study_names
from loraflow.evaluation.compare.table import make_table
from loraflow.prompts import PromptFormat
from tests.evaluation.compare.small import write_setting
from tests.evaluation.compare.synthetic import synthetic_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A setting, a plan of three rows on one task, and two saved fusions."""
    root = tmp_path_factory.mktemp("world")
    setting = write_setting(root)
    for task in setting["tasks"].values():
        task["max_new_tokens"] = 4
    (root / "setting.yaml").write_text(yaml.safe_dump(setting))
    plan = {
        "title": "Three rows",
        "setting": "setting.yaml",
        "methods": ["base", "average", "math"],
        "tasks": ["zh"],
        "limit": 1,
        "reference": "average",
    }
    (root / "plan.yaml").write_text(yaml.safe_dump(plan))
    adapters = {name: setting["adapters"][name] for name in ("zh-chat", "math")}
    model = FusedModel.from_adapters(setting["base"], adapters, "average")
    for name in ("mean", "other/mean", "alone"):
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def run(world, monkeypatch):
    """Compare; `{world}` in the arguments is where everything lies."""
    monkeypatch.setenv("COLUMNS", "220")

    def invoke(*arguments):
        return CliRunner().invoke(app, ["compare", *(argument.format(world=world) for argument in arguments)])

    invoke.world = world
    return invoke


def rows(output: Path) -> list[str]:
    content = json.loads((output / "report.json").read_text())
    return [row["contender"] for row in content["rows"] if row["task"] == content["tasks"][0]]


PLAN = ("{world}/plan.yaml", "--device", "cpu")


def test_help_tells_every_flag(run):
    result = run("--help")
    assert result.exit_code == 0, result.output
    flags = """--output --methods --fusions --seeds --reference --setting --tasks --base --lora-modules --test --scorer
    --data --dev --limit --batch-size --workers --device --allow-code --weights --rescore --report --overwrite --list
    --ray --cell-cpus --cell-gpus --cell-memory --retries
    --chat --revision --dtype --quantization --prompt-field --completion-field --max-new-tokens"""
    assert [flag for flag in flags.split() if flag not in result.output] == []


def test_studies_are_listed(run):
    result = run("--list")
    assert result.exit_code == 0
    assert all(name in result.output for name in study_names())


def test_a_plan_is_compared_and_reported(run, tmp_path):
    done = run(*PLAN, "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "Three rows" in done.output
    assert "* differs from average" in " ".join(done.output.split())
    assert rows(tmp_path) == ["base", "average", "math"]
    assert all((tmp_path / f"report.{ending}").is_file() for ending in ("html", "md", "csv", "json"))
    again = run(*PLAN, "--output", str(tmp_path))
    assert "3 cells, 3 of them finished before" in again.output
    assert "scores changed in 0 cells" in run(*PLAN, "--output", str(tmp_path), "--rescore").output
    # The run knows its own plan.
    assert "scores changed in 0 cells" in run("--output", str(tmp_path), "--rescore").output
    assert "Three rows" in run("--output", str(tmp_path), "--report").output


def test_a_report_can_be_of_a_part(run, tmp_path):
    assert run(*PLAN, "--output", str(tmp_path), "--methods", "math").exit_code == 0
    assert rows(tmp_path) == ["math"]
    part = run(*PLAN, "--output", str(tmp_path), "--report")
    assert part.exit_code == 0, part.output
    assert rows(tmp_path) == ["math"]
    assert "**2 cells are not finished**" in (tmp_path / "report.md").read_text()
    nothing = run(*PLAN, "--output", str(tmp_path / "other"), "--report")
    assert nothing.exit_code == 1
    assert "has no finished cells of this plan. Run it first." in nothing.output


def test_methods_choose_rows_of_a_plan_or_are_the_rows(run, tmp_path):
    assert run(*PLAN, "--output", str(tmp_path / "a"), "--methods", "math", "base").exit_code == 0
    assert rows(tmp_path / "a") == ["math", "base"]
    content = json.loads((tmp_path / "a" / "report.json").read_text())
    # The plan's own is not among them: the last is.
    assert content["reference"] == "base"
    own = ("--setting", "{world}/setting.yaml", "--tasks", "es,zh", "--limit", "1", "--device", "cpu")
    done = run(*own, "--methods", "math", "base", "--reference", "math", "--output", str(tmp_path / "b"))
    assert done.exit_code == 0, done.output
    assert rows(tmp_path / "b") == ["math", "base"]
    content = json.loads((tmp_path / "b" / "report.json").read_text())
    assert (content["tasks"], content["reference"]) == (["es", "zh"], "math")


def test_a_curve_is_chosen_by_its_name(run, tmp_path):
    rows_of = {"gates": {"method": "average", "examples": [1, 2]}, "base": None}
    plan = Plan.model_validate({"setting": "small-world", "methods": rows_of})
    assert list(Rows(methods=["gates"]).chosen(plan, "p.yaml").methods) == ["gates, 1", "gates, 2"]
    assert list(Rows(methods=["base", "gates, 2"]).chosen(plan, "p.yaml").methods) == ["base", "gates, 2"]
    with pytest.raises(LoraflowError, match=r"The plan 'p.yaml' has no row 'gate'. .*Did you mean 'gates'"):
        Rows(methods=["gate"]).chosen(plan, "p.yaml")


def test_reports_leave_out_what_was_measured_otherwise(run, tmp_path):
    plan = yaml.safe_load((run.world / "plan.yaml").read_text())
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({**plan, "setting": str(run.world / "setting.yaml")}))
    assert run(str(file), "--device", "cpu", "--output", str(tmp_path / "run")).exit_code == 0
    file.write_text(yaml.safe_dump({**plan, "setting": str(run.world / "setting.yaml"), "limit": 2}))
    done = run(str(file), "--report", "--output", str(tmp_path / "run"))
    assert done.exit_code == 1
    assert "has no finished cells of this plan" in done.output
    changed = {**plan, "setting": str(run.world / "setting.yaml"), "methods": {"base": "base", "average": "math"}}
    file.write_text(yaml.safe_dump(changed))
    done = run(str(file), "--report", "--output", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    assert rows(tmp_path / "run") == ["base"]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["missing"] == ["average, zh (measured otherwise)"]


def test_all_rows_are_asked_in_the_fusions_own_format(run, tmp_path):
    model = FusedModel.from_pretrained(run.world / "mean")
    model.prompt = PromptFormat(template="Q: {prompt} A:")
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "completion": "2"}) + "\n")
    task = ("--test", str(tmp_path / "sums.jsonl"), "--scorer", "last-number", "--max-new-tokens", "4")
    done = run("--fusions", str(tmp_path / "other"), "--methods", "base", *task, "--output", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    answers = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "cells").rglob("*.jsonl"))]
    assert len(answers) == 2
    assert all("Q: 1 + 1? A:" in answer["prompt"] for answer in answers)
    both = ("--fusions", str(tmp_path / "other"), "{world}/mean")
    assert "were made with different prompt formats" in run(*both, *task, "--output", str(tmp_path / "b")).output


def test_fusions_bring_base_and_adapters(run, tmp_path):
    problems = "".join(json.dumps({"q": f"{n} + 1?", "a": str(n + 1)}) + "\n" for n in range(3))
    (tmp_path / "sums.jsonl").write_text(problems)
    task = ("--test", str(tmp_path / "sums.jsonl"), "--scorer", "last-number", "--prompt-field", "q")
    task = (*task, "--completion-field", "a", "--max-new-tokens", "4", "--limit", "2", "--device", "cpu")
    fusions = ("--fusions", "{world}/mean", "{world}/alone")
    done = run(*fusions, "--methods", "base", "zh-chat", *task, "--output", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    assert rows(tmp_path / "run") == ["base", "zh-chat", "mean", "alone"]
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (content["tasks"], content["rows"][0]["problems"]) == (["sums"], 2)


def test_a_failed_cell_is_an_exit_code(run, tmp_path, monkeypatch):
    real = workers.answer_task

    def unlucky(model: Any, *rest: Any, **options: Any) -> Any:
        if not model.gates:
            raise RuntimeError("no luck")
        return real(model, *rest, **options)

    monkeypatch.setattr(workers, "answer_task", unlucky)
    result = run(*PLAN, "--output", str(tmp_path))
    assert result.exit_code == 1
    assert "RuntimeError: no luck" in result.output
    assert "1 cells failed. Give the same command again" in result.output
    assert rows(tmp_path) == ["average", "math"]
    alone = run(*PLAN, "--output", str(tmp_path), "--methods", "base")
    assert alone.exit_code == 1
    assert "All 1 cells failed. There is nothing to report." in alone.output


BASE = ("--base", "x", "--lora-modules", "a=b")
TEST = ("--test", "x.jsonl", "--scorer", "last-number")
MISTAKES = {
    "no output": ((*PLAN,), "`--output` is missing. Say where the run's files go"),
    "no task": ((*BASE, "--output", "x"), "There is no task. Give --tasks of lm-evaluation-harness, or --test"),
    "one adapter's name alone": ((*BASE[:3], "a", *TEST, "--output", "x"), "takes name=path, found 'a'"),
    "no rows": ((*BASE, *TEST, "--output", "x"), "There is nothing to compare. Give a plan or study, --methods"),
    "no base": ((*TEST, "--methods", "base", "--output", "x"), "`--base` is missing. Give --base and --lora-modules"),
    "no adapters": (
        (*TEST, "--base", "x", "--methods", "base", "--output", "x"),
        "`--lora-modules` is missing. Give --base and --lora-modules",
    ),
    "no scorer": ((*BASE, *TEST[:2], "--methods", "base", "--output", "x"), "`test` needs a `scorer`"),
    "unknown row": (
        (*PLAN, "--methods", "averag", "--output", "x"),
        "plan.yaml' has no row 'averag'. Known: 'average', 'base', 'math'. Did you mean 'average'?",
    ),
    "fusions of a plan": (
        (*PLAN, "--fusions", "{world}/mean", "--output", "x"),
        "`--fusions` are rows, and a plan names its own. Add them there.",
    ),
    "fusions of one name": (
        (*BASE, *TEST, "--fusions", "{world}/mean", "{world}/other/mean", "--output", "x"),
        "Two of --fusions end in the same name. Name them in a plan.",
    ),
    "a fusion with a method's name": (
        (*BASE, *TEST, "--fusions", "{world}/mean", "--methods", "mean", "--output", "x"),
        "`--methods` and --fusions both have a row 'mean'.",
    ),
    "a reference that is no row": (
        (*PLAN, "--methods", "base", "--reference", "math", "--output", "x"),
        "`--reference` (='math') is not among --methods. Name it there too.",
    ),
    "unknown plan": (("granularty", "--output", "x"), "There is no plan 'granularty'"),
    "no setting": (("granularity", "--output", "x"), "there is no `setting`. Name one there or with --setting"),
    "unknown setting": (
        ("granularity", "--setting", "small-word", "--output", "x"),
        "There is no setting 'small-word'. Known: 'many-world', 'small-world'. Did you mean 'small-world'?",
    ),
    "workers": ((*PLAN, "--workers", "0", "--output", "x"), "`workers` (=0) must be at least 1."),
    "workers of a cluster": (
        (*PLAN, "--workers", "2", "--ray", "auto", "--output", "x"),
        "`workers` (=2) are processes of this machine, and a cluster has as many as it has room for. Leave it out.",
    ),
    "cells without a cluster": (
        (*PLAN, "--cell-memory", "2", "--output", "x"),
        "`--cell-memory` is for cells on a cluster. Give --ray too, or leave it out.",
    ),
    "one field": ((*BASE, *TEST, "--prompt-field", "q", "--output", "x"), "`--prompt-field` and `--completion-field`"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_without_a_traceback(run, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, said = MISTAKES[case]
    result = run(*arguments)
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--base", "x"),
        ("--lora-modules", "a=b"),
        ("--revision", "x"),
        ("--dtype", "float32"),
        ("--quantization", "bnb-4bit"),
        ("--test", "x"),
        ("--scorer", "last-number"),
        ("--data", "x"),
        ("--dev", "x"),
        ("--prompt-field", "x"),
        ("--completion-field", "x"),
        ("--max-new-tokens", "3"),
        ("--max-new-tokens", "512"),
        ("--dtype", "auto"),
        ("--chat",),
    ],
    ids=" ".join,
)
def test_a_plan_has_its_own_setting(run, flags):
    result = run(*PLAN, *flags, "--output", "x")
    assert result.exit_code == 1
    assert f"`{flags[0]}` describes a setting, and a plan or --setting names one. Leave it out." in result.output


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_is_never_squeezed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    scores = {(method, task): [[1.0, 0.0]] for method in ("a", "b") for task in ("zh", "es", "ru", "en")}
    table = make_table(*synthetic_run(tmp_path, scores))
    monkeypatch.setenv("COLUMNS", "60")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    _print_table(table)
    _, head, *lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    columns = ["average"] if terminal else ["zh", "es", "ru", "en", "average"]
    assert head.split() == ["method", *columns, "p,", "corrected"]
    assert [line.split()[0] for line in lines[:2]] == ["a", "b"]
    assert ("every task" in " ".join(lines)) == terminal

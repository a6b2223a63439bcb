"""`loraflow fit` from a file and for another time, one at a time, and what it asks before it starts over."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from loraflow import FitConfig
from loraflow.cli.replay import CONFIG_FILE
from loraflow.files import alone
from loraflow.saved.fusion import SavedFusion
from tests.cli.test_cli import SOURCES, run, world

__all__ = ["run", "world"]

DATA = ("--data", "{world}/train.jsonl")


def tensors_of(directory):
    return SavedFusion.open(directory).tensors


def equal(first, second):
    first, second = tensors_of(first), tensors_of(second)
    return first.keys() == second.keys() and all(torch.equal(second[name], value) for name, value in first.items())


def test_a_fit_is_replayed_from_its_own_file(run, world, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    settings = ("--dev", "{world}/dev.jsonl", "--max-steps", "3", "--seed", "7", "--method-option", "granularity=step")
    monkeypatch.chdir(world)
    sources = ("--base", "base", "--lora-modules", "zh=zh", "math=math", "--data", "train.jsonl")
    done = run("fit", *sources, *settings, "--output", str(first))
    assert done.exit_code == 0, done.output
    saved = yaml.safe_load((first / CONFIG_FILE).read_text())
    assert saved["base"] == str(world / "base")
    assert saved["lora_modules"] == {"zh": str(world / "zh"), "math": str(world / "math")}
    assert saved["data"] == [str(world / "train.jsonl")]
    assert saved["method_option"] == ["granularity=step"]
    assert not saved.keys() & {"output", "resume", "overwrite", "config"}
    assert FitConfig.from_yaml(first / CONFIG_FILE) == FitConfig(max_steps=3, seed=7)
    monkeypatch.chdir(tmp_path)
    again = run("fit", "--config", str(first / CONFIG_FILE), "--output", str(second))
    assert again.exit_code == 0, again.output
    assert equal(first, second)
    assert yaml.safe_load((second / CONFIG_FILE).read_text()) == saved


@pytest.mark.parametrize("method", ["lorahub", "phatgoose"])
def test_methods_that_leave_options_out_are_replayed_too(run, world, tmp_path, method):
    own = ("--adapter-data", "zh={world}/train.jsonl", "math={world}/dev.jsonl", "--max-steps", "2")
    given = {"lorahub": (*DATA, "--method-option", "budget=3"), "phatgoose": own}[method]
    first, second = tmp_path / "first", tmp_path / "second"
    done = run("fit", *SOURCES, "--method", method, *given, "--output", str(first))
    assert done.exit_code == 0, done.output
    again = run("fit", "--config", str(first / CONFIG_FILE), "--output", str(second))
    assert again.exit_code == 0, again.output
    assert equal(first, second)


def test_options_win_over_the_file(run, world, tmp_path):
    path = tmp_path / "mine.yaml"
    content = {
        "base": f"{world}/base",
        "lora-modules": {"zh": f"{world}/zh"},
        "data": f"{world}/train.jsonl",
        "output": str(tmp_path / "out"),
        "batch-size": 8,
        "recipe": {"max_steps": 4, "betas": [0.5, 0.6], "learning_rate": 1e-2},
    }
    path.write_text(yaml.safe_dump(content))
    done = run("fit", "--config", str(path), "--max-steps", "2")
    assert done.exit_code == 0, done.output
    recipe = json.loads((tmp_path / "out" / "fusion_config.json").read_text())["training"]["recipe"]
    assert (recipe["max_steps"], recipe["batch_size"], recipe["learning_rate"]) == (2, 8, 0.01)
    assert recipe["betas"] == [0.5, 0.6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "mine.yaml: the command has no 'epoch'. Known:"),
        ({"epoch": 3}, "Did you mean 'epochs'?"),
        ({"recipe": {"epoch": 3}}, "mine.yaml: `recipe` has no 'epoch'."),
        ({"recipe": 3}, "mine.yaml: `recipe` holds fields, as `name: value`, and no 3."),
        ({"epochs": 3, "recipe": {"epochs": 3}}, "mine.yaml: 'epochs' stands twice, also under `recipe`."),
        ({"seed": [1, 2]}, "mine.yaml: 'seed' (=[1, 2]) takes one value."),
        ({"recipe": {"betas": ["x", "y"]}}, "`betas` (='x') must be a number."),
        ({"method": "lorahub", "epochs": 3}, "The method 'lorahub' has no use for --epochs. Leave it out."),
    ],
)
def test_a_file_with_something_unknown_is_refused(run, tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    result = run("fit", *SOURCES, *DATA, "--output", str(tmp_path / "x"), "--config", str(path))
    assert result.exit_code == 1, result.output
    assert message in result.output.replace("\n", " ")


def test_a_second_fit_is_refused_before_anything_is_loaded(run, tmp_path):
    with alone(tmp_path / "out", "fit"):
        for command in (("fit", *SOURCES[2:]), ("finetune",)):
            second = run(*command, "--base", "no/such-model", *DATA, "--output", str(tmp_path / "out"))
            assert second.exit_code == 1
            assert "Another fit is running in" in second.output
            assert "Wait for it, or give another place." in second.output.replace("\n", " ")


def test_what_was_interrupted_asks_for_a_decision(run, tmp_path):
    out = tmp_path / "out"
    fit = ("fit", *SOURCES, *DATA, "--max-steps", "2", "--output", str(out))
    nothing = run(*fit, "--resume")
    assert nothing.exit_code == 1
    assert "There is nothing to resume in" in nothing.output
    assert "Start without --resume" in nothing.output
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "run.json").write_text("{}")
    early = run(*fit)
    assert early.exit_code == 1
    assert "interrupted before its first checkpoint. Say --overwrite to start over" in early.output.replace("\n", " ")
    (out / "checkpoints" / "checkpoint-1").mkdir()
    (out / "checkpoints" / "checkpoint-1" / "COMPLETE").touch()
    refused = run(*fit)
    assert refused.exit_code == 1
    assert "holds an interrupted run. Say --resume to go on with it, or --overwrite to start" in refused.output
    assert (out / "checkpoints" / "run.json").exists()
    done = run(*fit, "--overwrite")
    assert done.exit_code == 0, done.output


def test_a_rate_is_found_and_nothing_is_fitted(run, tmp_path):
    out = tmp_path / "out"
    result = run("fit", *SOURCES, *DATA, "--find-learning-rate", "--output", str(out))
    assert result.exit_code == 0, result.output
    found = json.loads((out / "learning-rates.json").read_text())
    assert f"suggestion: --learning-rate {found['suggestion']:g}" in result.output
    assert "learning rate" in result.output
    assert [path.name for path in out.iterdir()] == ["learning-rates.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--find-learning-rate", "--resume"), "`--resume` has no effect: --find-learning-rate fits nothing"),
        (("--early-stopping", "2"), "`--early-stopping` has no effect: there is no --dev"),
        (("--report-to", "tensorbord"), "`report_to` is unknown: 'tensorbord'"),
        (("--report-to", "no-such", "wandb"), "`report_to` is unknown: 'no-such'"),
        (("--schedule", "cosin"), "`schedule` is unknown: 'cosin'"),
    ],
)
def test_what_would_have_no_effect_is_refused(run, tmp_path, options, message):
    (tmp_path / "x" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "x" / "checkpoints" / "checkpoint-1" / "COMPLETE").touch()
    result = run("fit", *SOURCES, *DATA, "--output", str(tmp_path / "x"), *options)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")

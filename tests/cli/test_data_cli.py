"""Examples on the command line: every command takes every kind of place, and mixtures are what was asked for."""

from __future__ import annotations

import csv
import json
import re

import pytest
from typer.testing import CliRunner

from loraflow.cli import app
from loraflow.cli.mixtures import read_mixture
from loraflow.errors import DataError, LoraflowError
from loraflow.examples import Fields
from tests.tiny import byte_tokenizer, save_adapter, tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, an adapter, and the same questions in files of several kinds."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    save_adapter(base, root / "a", seed=1)
    rows = [{"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(10)]
    (root / "x.json").write_text(json.dumps([{"prompt": r["question"], "completion": r["answer"]} for r in rows]))
    with (root / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    return root


@pytest.fixture
def run(world, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments):
        return CliRunner().invoke(app, [argument.format(world=world) for argument in arguments])

    return invoke


SOURCES = ("--base", "{world}/base", "--lora-modules", "a={world}/a")
NAMED = ("--prompt-field", "Q: {{question}}\\nA:", "--completion-field", "answer")


def test_a_fit_on_a_mixture_and_what_is_done_with_it(run, tmp_path):
    data = ("--data", "{world}/x.csv=2", "{world}/x.csv[:4]=1", *NAMED, "--dev", "{world}/x.csv[8:]")
    fitted = run("fit", *SOURCES, *data, "--epochs", "1", "--train-on", "all", "--output", f"{tmp_path}/fusion")
    assert fitted.exit_code == 0, fitted.output
    # All four of the second, and of the first twice as many.
    assert "12 examples" in fitted.output
    config = json.loads((tmp_path / "fusion/fusion_config.json").read_text())
    assert config["training"]["examples"] == 12
    assert config["training"]["recipe"]["train_on"] == "all"

    stats = run("info", f"{tmp_path}/fusion", "--stats", "--data", "{world}/x.json[2:]", "--examples", "3")
    assert stats.exit_code == 0, stats.output
    asked = ("--prompt-field", "Say {{question}}.", "--max-new-tokens", "1", "--output", f"{tmp_path}/answers")
    answered = run("generate", f"{tmp_path}/fusion", "--data", "{world}/x.csv[:2]", *asked)
    assert answered.exit_code == 0, answered.output
    records = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [record["question"] for record in records] == ["0+0", "1+1"]
    mean = ("--mean-weights-on", "{world}/x.json[:3]", "--output", f"{tmp_path}/adapter")
    exported = run("export", f"{tmp_path}/fusion", *mean)
    assert exported.exit_code == 0, exported.output
    assert "3 examples" in exported.output


def test_finetune_takes_mixtures_too(run, tmp_path):
    data = ("--data", "{world}/x.csv[:3]", "{world}/x.csv[5:]", *NAMED)
    tuned = run("finetune", "--base", "{world}/base", *data, "--epochs", "1", "--output", f"{tmp_path}/adapter")
    assert tuned.exit_code == 0, tuned.output
    assert "2 steps" in tuned.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "{world}/x.csv"), "x.csv:2: expected `prompt` and `completion`, or `messages`; found ['answer'"),
        (("--data", "{world}/x.csv"), "Name two fields with --prompt-field and --completion-field."),
        (("--data", "{world}/x.json=1", "{world}/x.csv"), "`--data` gives some sources a weight, and"),
        (("--data", "{world}/x.json=1", "{world}/x.json=-1"), "`weights` (=[1.0, -1.0]) must be greater than 0"),
        (("--data", "{world}/x.json[train]"), "which has no splits. Leave 'train' out."),
        (("--data", "{world}/x.json", "--train-on", "first"), "`train_on` is unknown: 'first'. Known: 'all', 'last'."),
        (("--data", "{world}/x.json", "--prompt-field", "{{", "--completion-field", "a"), "Write {{{{ and }}}} for"),
        (
            ("--method", "centroid", "--adapter-data", "a={world}/x.json", "--train-on", "all"),
            "The method 'centroid' has no use for --train-on.",
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(run, tmp_path, arguments, message):
    sources = ("--base", "no/such-model", "--lora-modules", "a={world}/a")
    refused = run("fit", *sources, *arguments, "--output", f"{tmp_path}/x")
    assert refused.exit_code == 1
    assert message.format() in refused.output
    assert "Traceback" not in refused.output


def test_a_mixture_in_files(world, tmp_path, capsys):
    fields = Fields("question", "answer")
    source = f"{world}/x.csv"
    assert len(read_mixture([source], fields, 0)) == 10
    assert len(read_mixture([f"{source}=3"], fields, 0)) == 10
    capsys.readouterr()
    assert len(read_mixture([f"{source}[:5]=1", f"{source}=0.4"], fields, 0)) == 7
    assert capsys.readouterr().err == f"the mixture: 5 of 5 of {source}[:5], 2 of 10 of {source}\n"
    drawn = [[e.origin for e in read_mixture([f"{source}=1", f"{source}[:2]=1"], fields, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # What exists by the whole name has no weight.
    (tmp_path / "x=1").write_text('{"question": "a", "answer": "b"}')
    assert len(read_mixture([f"{tmp_path}/x=1", source], fields, 0)) == 11
    with pytest.raises(LoraflowError, match=re.escape(f"and {source!r} none. Give all of them one, or none.")):
        read_mixture([f"{source}=1", source], fields, 0)
    with pytest.raises(DataError, match=r"There is no file .*x\.csv=one\."):
        read_mixture([f"{source}=one"], fields, 0)

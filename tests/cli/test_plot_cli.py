"""`loraflow plot`, run as a user runs it."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from typer.testing import CliRunner

from loraflow import FusedModel
from loraflow.analysis.weights import answer_tokens, statistics_of_tokens, weight_statistics
from loraflow.cli import app
from loraflow.examples import read_examples
from tests.tiny import byte_tokenizer, save_adapter, set_random_gates, tiny_model
from tests.visual.test_curves import curves_report
from tests.visual.test_figures import make_report

RECORDS = [
    {"prompt": "1 2 3", "completion": "3 2 1"},
    {"prompt": "中文 5", "completion": "五。"},
    {"prompt": "8 9", "completion": "9 8"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a tokenizer, two adapters, a fusion of them, and data, on disk."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    sources = {name: save_adapter(base, root / name, seed=seed) for seed, name in enumerate(("zh", "math"))}
    model = FusedModel.from_adapters(root / "base", sources, "lora-flow")
    set_random_gates(model)
    model.save_pretrained(root / "fusion")
    write_lines(root / "data.jsonl", RECORDS)
    write_lines(root / "prompts.jsonl", [{"prompt": record["prompt"]} for record in RECORDS])
    write_lines(root / "asked.jsonl", [{"q": record["prompt"], "a": record["completion"]} for record in RECORDS])
    (root / "report.json").write_text(json.dumps(make_report()))
    return root


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(world, monkeypatch):
    """Run a command; `{world}` in its arguments is where everything lies."""
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument).format(world=world) for argument in arguments])

    return invoke


FUSION = "{world}/fusion"
SHORT = ("--max-new-tokens", "5")


def test_help_teaches(run):
    assert {"layers", "decoding", "answer", "transfer", "curves"} <= {*run("plot", "--help").output.split()}
    for command in ("layers", "decoding", "answer", "transfer", "curves"):
        shown = run("plot", command, "--help")
        assert shown.exit_code == 0
        assert f"loraflow plot {command}" in shown.output
        assert "figure" in shown.output


@pytest.mark.parametrize("command", ["layers", "decoding"])
def test_figures_of_generated_answers(run, world, tmp_path, command):
    made = run(
        *("plot", command, FUSION, "--data", "{world}/prompts.jsonl", *SHORT, "--title", "T"),
        *("--output", tmp_path / "out", "--json", tmp_path / "deep" / "numbers.json"),
    )
    assert made.exit_code == 0, made.output
    assert made.stdout.splitlines()[-2:] == [str(tmp_path / "out.png"), str(tmp_path / "out.svg")]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "out.svg").getroot().tag.endswith("svg")
    numbers = json.loads((tmp_path / "deep" / "numbers.json").read_text())
    model = FusedModel.from_pretrained(world / "fusion")
    messages = [[{"role": "user", "content": record["prompt"]}] for record in RECORDS]
    found = statistics_of_tokens(model, answer_tokens(model, messages, max_new_tokens=5))
    expected = found.answers if command == "layers" else found.tenths
    assert numbers["figure"] == command
    assert numbers["adapters"] == ["zh", "math"]
    assert numbers["examples"] == 3
    assert numbers["count"] == expected.count.tolist()
    shown = torch.tensor([[float("nan") if x is None else x for x in row] for row in numbers["mean"]])
    torch.testing.assert_close(shown.double(), expected.mean, equal_nan=True, atol=1e-5, rtol=0)


@pytest.mark.parametrize("command", ["layers", "decoding"])
def test_figures_of_given_answers(run, world, tmp_path, command):
    made = run(
        *("plot", command, FUSION, "--data", "{world}/asked.jsonl", "--completions", "--examples", "2"),
        *("--prompt-field", "q", "--completion-field", "a", "--output", tmp_path / "x.svg", "--json", tmp_path / "j"),
    )
    assert made.exit_code == 0, made.output
    assert made.stdout.splitlines()[-1] == str(tmp_path / "x.svg")
    model = FusedModel.from_pretrained(world / "fusion")
    found = weight_statistics(model, read_examples(world / "data.jsonl")[:2])
    expected = found.answers if command == "layers" else found.tenths
    assert json.loads((tmp_path / "j").read_text())["count"] == expected.count.tolist()


def test_prompts_may_be_in_any_field_or_in_messages(run, world, tmp_path):
    turns = [{"role": "user", "content": "1 2 3"}, {"role": "assistant", "content": "3 2 1"}]
    write_lines(tmp_path / "messages.jsonl", [{"messages": turns}])
    counts = []
    for data in (
        ("{world}/asked.jsonl", "--prompt-field", "q"),
        (tmp_path / "messages.jsonl",),
        ("{world}/data.jsonl",),
    ):
        made = run(
            *("plot", "layers", FUSION, "--data", *data, "--examples", "1", *SHORT),
            *("--output", tmp_path / "x.png", "--json", tmp_path / "j"),
        )
        assert made.exit_code == 0, made.output
        counts.append(json.loads((tmp_path / "j").read_text())["mean"])
    assert counts[0] == counts[1] == counts[2]


def test_another_method_and_no_fusion(run, tmp_path):
    made = run(
        *("plot", "layers", "--base", "{world}/base", "--lora-modules", "zh={world}/zh", "math={world}/math"),
        *("--method", "static", "--method-option", 'weights={{"zh": 0.25, "math": 0.5}}'),
        *("--data", "{world}/data.jsonl", "--completions", "--output", tmp_path / "x.png", "--json", tmp_path / "j"),
    )
    assert made.exit_code == 0, made.output
    assert json.loads((tmp_path / "j").read_text())["mean"] == [[0.25, 0.5]] * 3


@pytest.mark.parametrize("given", [("--answer", "五 9"), SHORT], ids=["given", "generated"])
def test_figure_of_one_answer(run, world, tmp_path, given):
    options = ("--prompt", "5 6", *given)
    made = run("plot", "answer", FUSION, *options, "--output", tmp_path / "x.png", "--json", tmp_path / "j")
    assert made.exit_code == 0, made.output
    assert (tmp_path / "x.png").is_file()
    numbers = json.loads((tmp_path / "j").read_text())
    traced = run("trace", FUSION, *options, "--json", tmp_path / "trace")
    assert traced.exit_code == 0, traced.output
    whole = json.loads((tmp_path / "trace").read_text())
    start = whole["prompt_length"]
    assert numbers["tokens"] == whole["tokens"][start:]
    own = torch.tensor(whole["weights"]).mean(dim=1)
    torch.testing.assert_close(torch.tensor(numbers["weights"]), own[start - 1 : -1])


@pytest.mark.parametrize("report", ["{world}/report.json", "{world}"], ids=["file", "directory"])
def test_figure_of_transfer(run, tmp_path, report):
    made = run("plot", "transfer", report, "--output", tmp_path / "x.pdf", "--json", tmp_path / "j")
    assert made.exit_code == 0, made.output
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    numbers = json.loads((tmp_path / "j").read_text())
    assert numbers["reference"] == "math"
    assert [round(gain["gain"]) for gain in numbers["gains"]] == [1, 2, 3, 11, 12, 13]
    assert [gain["own"] for gain in numbers["gains"]] == [True, False, False, False, False, True]


def test_figure_of_curves(run, tmp_path, world):
    (tmp_path / "report.json").write_text(json.dumps(curves_report()))
    made = run("plot", "curves", tmp_path, "--output", tmp_path / "x", "--json", tmp_path / "j", "--title", "$N$")
    assert made.exit_code == 0, made.output
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "x.png", "x.svg", "j"}
    points = json.loads((tmp_path / "j").read_text())["points"]
    assert [(p["curve"], p["examples"], p["score"]) for p in points] == [
        ("core", 20, 25.0), ("core", 200, 50.0), ("gates", 20, 12.5), ("base", None, 0.0)
    ]  # fmt: skip


NO_MODEL = ("plot", "layers", "--base", "no/such-model", "--lora-modules", "zh={world}/zh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*NO_MODEL, "--data", "{world}/data.jsonl", "--output", "x.gif"), "ends in '.gif'. Let it end in"),
        ((*NO_MODEL, "--data", "{world}/none.jsonl", "--output", "x.png"), "There is no file"),
        ((*NO_MODEL, "--data", "{world}/asked.jsonl", "--output", "x"), "asked.jsonl:1: there is no field 'prompt'"),
        (
            (*NO_MODEL, "--data", "{world}/prompts.jsonl", "--completions", "--output", "x"),
            "prompts.jsonl:1: expected `prompt` and `completion`",
        ),
        (
            (*NO_MODEL, "--data", "{world}/asked.jsonl", "--completion-field", "a", "--output", "x"),
            "`--completion-field` names what --completions reads. Say --completions too.",
        ),
        (("plot", "decoding", FUSION, "--data", "{world}/data.jsonl", "--output", "x.doc"), "ends in '.doc'"),
        (("plot", "answer", FUSION, "--prompt", "5", "--output", "x.doc"), "ends in '.doc'"),
        (("plot", "transfer", "{world}/report.json", "--output", "x.doc"), "ends in '.doc'"),
        (("plot", "transfer", "{world}/nothing.json", "--output", "x"), "nothing.json cannot be read"),
        (("plot", "transfer", "{world}/data.jsonl", "--output", "x"), "data.jsonl cannot be read: Extra data"),
        (
            ("plot", "transfer", "{world}/fusion/fusion_config.json", "--output", "x"),
            "This is no report of a comparison",
        ),
        (
            (
                "plot",
                "layers",
                FUSION,
                "--method",
                "base",
                "--data",
                "{world}/data.jsonl",
                "--completions",
                "--output",
                "x",
            ),
            "'base', which has no fusion weights",
        ),
    ],
)
def test_errors_are_one_clear_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("layers", "--data", "{world}/data.jsonl"),
        ("decoding", "--data", "{world}/data.jsonl"),
        ("answer", "--prompt", "5"),
        ("transfer", "{world}/report.json"),
        ("curves", "{world}/report.json"),
    ],
    ids=["layers", "decoding", "answer", "transfer", "curves"],
)
def test_matplotlib_is_asked_for_before_anything_heavy(run, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("plot", *arguments, "--output", "x")
    assert result.exit_code == 1
    assert "Figures need matplotlib. Run: pip install 'loraflow[plots]'" in result.output

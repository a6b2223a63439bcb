"""`loraflow info`: what it says for people, and how a fusion weighs."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from loraflow import FusedModel, LoraFlow
from loraflow.analysis.weights import weight_statistics
from loraflow.cli import app
from loraflow.cli.info import _method_text, _value_text
from tests.tiny import byte_tokenizer, edit_config, edit_tensors, save_adapter, set_random_gates, tiny_model

RECORDS = [
    {"prompt": "1 2 3", "completion": "3 2 1 as was asked"},
    {"prompt": "5", "completion": "5 and nothing else"},
    {"prompt": "8 9", "completion": "9 8"},
    {"prompt": "4", "completion": "4"},
    {"prompt": "2 2", "completion": "2 2"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a tokenizer, two adapters, fusions of them, and data, on disk."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    sources = {name: save_adapter(base, root / name, seed=seed) for seed, name in enumerate(("zh", "math"))}
    for name in ("layer", "module"):
        model = FusedModel.from_adapters(root / "base", sources, LoraFlow(name))
        set_random_gates(model)
        model.training_record = {"examples": 24, "steps": 6, "train_loss": 0.43123456, "dev_score": None}
        model.save_pretrained(root / name)
    with torch.no_grad():
        for gate in model.gates.values():
            gate.weight.zero_()
            gate.bias.copy_(torch.tensor([-0.5, 0.5]))
    model.save_pretrained(root / "collapsed")
    lines = [json.dumps(record) for record in RECORDS]
    (root / "data.jsonl").write_text("\n".join(lines) + "\n")
    (root / "asked.jsonl").write_text(json.dumps({"q": "5 6", "a": "6 5"}) + "\n")
    return root


@pytest.fixture
def run(world, monkeypatch):
    """Run a command; `{world}` in its arguments is where everything lies."""
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument).format(world=world) for argument in arguments])

    return invoke


STATS = ("--stats", "--data", "{world}/data.jsonl")


def test_fusions_are_described_for_people(run):
    shown = run("info", "{world}/layer")
    assert shown.exit_code == 0, shown.output
    assert "method lora-flow (granularity layer, temperature 1, start best, " in shown.output
    assert "trained: examples 24, steps 6, train_loss 0.4312\n" in shown.output
    assert "top_k" not in shown.output


@pytest.mark.parametrize(
    ("trained_on", "noted"),
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("C:\\models\\Other", True),
        ("someone/Base", False),
        ("/home/someone/models/base/", False),
        ("/hub/models--someone--base/snapshots/0123abcd", False),
        (None, False),
        ("", False),
    ],
)
def test_an_adapter_of_another_base_by_its_own_account_is_noted(run, world, tmp_path, trained_on, noted):
    shutil.copytree(world / "zh", tmp_path / "zh")
    edit_config(tmp_path / "zh", base_model_name_or_path=trained_on)
    shown = run("info", "--base", "{world}/base", "--lora-modules", f"zh={tmp_path}/zh")
    assert shown.exit_code == 0, shown.output
    note = f"note: zh was trained on {trained_on!r} by its own account; the base here is '{world}/base'."
    assert (note in shown.output) == noted
    assert ("note:" in shown.output) == noted


def test_copies_of_the_bases_parameters_are_noted_and_those_of_other_shapes_do_not_fit(run, world, tmp_path):
    shutil.copytree(world / "zh", tmp_path / "zh")
    key = "base_model.model.lm_head.weight"
    edit_tensors(tmp_path / "zh", lambda tensors: tensors.update({key: torch.randn(259, 32)}))
    shown = run("info", "--base", "{world}/base", "--lora-modules", f"zh={tmp_path}/zh")
    assert shown.exit_code == 0, shown.output
    assert "note: zh brings its own lm_head.weight; it is fused only with a base that has the same" in shown.output
    edit_tensors(tmp_path / "zh", lambda tensors: tensors.update({key: torch.randn(261, 32)}))
    shown = run("info", "--base", "{world}/base", "--lora-modules", f"zh={tmp_path}/zh")
    assert shown.exit_code == 1
    assert "(tokens added: 2)" in shown.output


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({}, "m"),
        ({"a": None}, "m"),
        ({"start": {"zh": 0.25, "math": 1.0}, "k": 3}, "m (start zh=0.25 math=1, k 3)"),
        ({"a": 0.1 + 0.2, "b": [0.5, 1], "c": {}, "d": False}, "m (a 0.3, b 0.5 1, c none, d False)"),
    ],
)
def test_parameters_are_readable(parameters, text):
    assert _method_text("m", parameters) == text
    assert _value_text(1 / 3, ".4f") == "0.3333"


def table_rows(output):
    """The table's rows by their first column."""
    return {line.split()[0]: line for line in output.splitlines() if re.search(r"± \d", line)}


def test_memory_is_that_of_the_precision_asked_for(run):
    sizes = []
    for options in ((), ("--dtype", "bfloat16"), ("--quantization", "bnb-8bit"), ("--quantization", "none")):
        shown = run("info", "{world}/layer", *options)
        assert shown.exit_code == 0, shown.output
        sizes.append(re.search(r"memory for weights .*: base ([\d.]+) MiB", shown.output)[1])
    assert sizes[0] == sizes[3]
    assert float(sizes[0]) > float(sizes[1]) > float(sizes[2])


def test_weights_are_reported_by_layer(run, world, tmp_path):
    shown = run("info", "{world}/layer", *STATS, "--json", tmp_path / "deep" / "stats.json")
    assert shown.exit_code == 0, shown.output
    found = weight_statistics(FusedModel.from_pretrained(world / "layer"), RECORDS)
    rows = table_rows(shown.output)
    for site in range(3):
        numbers = re.findall(r"([+-]\d\.\d\d) ± (\d\.\d\d) +([\d.]+)%", rows[str(site)])
        assert len(numbers) == 2
        for adapter, (mean, std, share) in enumerate(numbers):
            assert float(mean) == pytest.approx(found.answers.mean[site, adapter].item(), abs=0.0051)
            assert float(std) == pytest.approx(found.answers.std[site, adapter].item(), abs=0.0051)
            assert float(share) == pytest.approx(100 * found.answers.largest[site, adapter].item(), abs=0.051)
        assert float(rows[str(site)].split()[-1]) == pytest.approx(found.answers.entropy[site].item(), abs=0.0051)
    assert "all" in rows
    assert f"{int(found.answers.count[0])} tokens of 5 given answers" in shown.output
    assert f"on the prompts' {int(found.prompts.count[0])} tokens, mean of all layers: zh " in shown.output
    assert "No gate has collapsed" in shown.output
    saved = json.loads((tmp_path / "deep" / "stats.json").read_text())
    assert torch.allclose(torch.tensor(saved["answers"]["mean"]).double(), found.answers.mean, atol=1e-5)


def test_fewer_examples_and_other_fields(run):
    fewer = run("info", "{world}/layer", *STATS, "--examples", "2")
    assert "tokens of 2 given answers" in fewer.output
    named = run(
        *("info", "{world}/layer", "--stats", "--data", "{world}/asked.jsonl"),
        *("--prompt-field", "q", "--completion-field", "a"),
    )
    assert "4 tokens of 1 given answers" in named.output
    assert "4 tokens are too few" in named.output


def test_modules_on_request(run):
    shown = run("info", "{world}/module", *STATS, "--modules")
    assert shown.exit_code == 0, shown.output
    assert len(table_rows(shown.output)) == 21 + 1
    assert "layers.2.mlp.down_proj" in shown.output
    assert len(table_rows(run("info", "{world}/module", *STATS).output)) == 3 + 1


def test_a_collapse_is_said_plainly(run):
    shown = run("info", "{world}/collapsed", *STATS)
    assert shown.exit_code == 0, shown.output
    assert "CONSTANT: all 21 gates give every token the same weights (on average zh 0.00, math 1.00)" in shown.output
    assert "UNUSED: 'zh' never has the largest weight" in shown.output


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("average", "'average' gives every token of every prompt the same weights, by design"),
        ("qa-flora", "'qa-flora' weighs each prompt once and keeps the weights for its answer, by design"),
    ],
)
def test_other_methods_without_a_fusion(run, method, said):
    sources = ("--base", "{world}/base", "--lora-modules", "zh={world}/zh", "math={world}/math")
    shown = run("info", *sources, *STATS, "--method", method)
    assert shown.exit_code == 0, shown.output
    assert said in shown.output
    assert ("5 prompts" in shown.output) == (method == "qa-flora")
    assert "COLLAPSED" not in shown.output
    assert "CONSTANT" not in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{world}/layer", "--stats"), "`--stats` reads examples. Give --data"),
        (("{world}/layer", "--data", "{world}/data.jsonl"), "`--data` belongs to --stats. Say --stats too."),
        (("{world}/layer", "--json", "x"), "`--json` belongs to --stats."),
        (("{world}/layer", "--method", "average"), "`--method` belongs to --stats."),
        (("{world}/layer", "--method-option", "top_k=1"), "`--method-option` belongs to --stats."),
        (("{world}/layer", "--prompt-field", "q"), "`--prompt-field` belongs to --stats."),
        (("{world}/layer", "--completion-field", "a"), "`--completion-field` belongs to --stats."),
        (("{world}/layer", "--batch-size", "8"), "`--batch-size` belongs to --stats."),
        (("{world}/layer", "--examples", "2"), "`--examples` belongs to --stats."),
        (("{world}/layer", "--modules"), "`--modules` belongs to --stats."),
        (("{world}/layer", "--device", "cpu"), "`--device` belongs to --stats."),
        (("{world}/layer", "--quantization", "bnb-3bit"), "`quantization` is unknown: 'bnb-3bit'."),
        (("{world}/layer", "--stats", "--data", "{world}/none"), "There is no file"),
        (("{world}/layer", *STATS, "--prompt-field", "q"), "go together"),
        (("{world}/layer", *STATS, "--modules"), "those of 'lora-flow' stand at each layer. Leave it out."),
        (("{world}/layer", *STATS, "--method", "base"), "'base', which has no fusion weights"),
    ],
)
def test_errors_are_one_clear_line(run, arguments, message):
    result = run("info", *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output

"""The command line, run as a user runs it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from loraflow import FitConfig, FusedModel, training
from loraflow.cli import app
from loraflow.cli.values import parse_method_options, spread_values
from loraflow.errors import LoraflowError, MethodError
from loraflow.methods import METHODS, LearnedStatic
from loraflow.saved.fusion import SavedFusion
from tests.tiny import byte_tokenizer, save_adapter, set_random_gates, tiny_model, trained_tokenizer
from tests.training.test_fit import reversals

PAPER = Path(os.environ.get("LORAFLOW_PAPER_DATA", "no such place"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a tokenizer, two adapters and data, on disk."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    save_adapter(base, root / "zh", seed=1)
    save_adapter(base, root / "math", r=2, seed=2)
    for name, count in (("train", 24), ("dev", 6)):
        lines = [json.dumps(record) for record in reversals(count, seed=count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def run(world, monkeypatch):
    """Run a command; `{world}` in its arguments is where everything lies."""
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments):
        return CliRunner().invoke(app, [argument.format(world=world) for argument in arguments])

    return invoke


SOURCES = ("--base", "{world}/base", "--lora-modules", "zh={world}/zh", "math={world}/math")
DATA = ("--data", "{world}/train.jsonl", "--dev", "{world}/dev.jsonl")
FIT = ("fit", *SOURCES, "--data", "{world}/train.jsonl", "--output", "x")


def test_the_program_explains_itself(run):
    assert "loraflow demo" in run("--help").output
    assert run("--version").output.startswith("loraflow ")


TASK_DATA = ("--data", "{world}/train.jsonl")
OWN_DATA = ("--adapter-data", "zh={world}/train.jsonl", "math={world}/dev.jsonl")


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lorahub", ("--method-option", "budget=4", "--data", "{world}/train.jsonl"), "4 evaluations"),
        ("learned-static", ("--epochs", "1", "--data", "{world}/train.jsonl"), "weights: zh "),
        ("phatgoose", ("--max-steps", "2", *OWN_DATA), "4 steps"),
        ("centroid", OWN_DATA, "30 examples"),
    ],
)
def test_one_command_fits_every_method(run, world, tmp_path, method, options, said):
    out = str(tmp_path / "fusion")
    fitted = run("fit", *SOURCES, "--method", method, *options, "--output", out)
    assert fitted.exit_code == 0, fitted.output
    assert said in fitted.output
    answered = run("generate", out, "--prompt", "4 5", "--max-new-tokens", "4")
    assert answered.exit_code == 0, answered.output
    loaded = FusedModel.from_pretrained(out)
    assert loaded.method.name == method
    assert not (Path(out) / "checkpoints").exists()
    described = run("info", out)
    assert described.exit_code == 0, described.output
    trained = re.search(r"trained: (.*)", described.output)[1]
    assert ("zh 24, math 6" if OWN_DATA[0] in options else "examples 24") in trained


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory):
    """A fusion with gates of its own, on disk."""
    out = tmp_path_factory.mktemp("fitted") / "fusion"
    sources = {name: world / name for name in ("zh", "math")}
    model = FusedModel.from_adapters(world / "base", sources, "lora-flow")
    set_random_gates(model)
    model.save_pretrained(out)
    return out


def test_a_result_is_replaced_only_on_request(run, world, fitted, tmp_path):
    out, before = tmp_path / "out", (fitted / "fusion.safetensors").read_bytes()
    shutil.copytree(fitted, out)
    fit = ("fit", *SOURCES, "--data", "{world}/train.jsonl", "--max-steps", "1", "--output")
    refused = run(*fit, str(out))
    assert refused.exit_code == 1
    assert "holds a finished fusion. Give another directory, or say --overwrite." in refused.output
    assert (out / "fusion.safetensors").read_bytes() == before
    assert "holds a LoRA adapter. Give another directory." in run(*fit, str(world / "zh"), "--overwrite").output
    assert not (world / "zh" / "fusion.safetensors").exists()
    tune = ("finetune", "--base", "{world}/base", "--data", "{world}/train.jsonl", "--output")
    assert "holds a finished adapter" in run(*tune, str(world / "zh")).output
    assert "holds a LoRA fusion" in run(*tune, str(out)).output
    assert run(*fit, str(out), "--overwrite").exit_code == 0
    assert (out / "fusion.safetensors").read_bytes() != before


def test_a_fusions_own_method_keeps_what_it_learned(run, fitted, tmp_path):
    def weights(*options):
        shown = run("trace", str(fitted), "--prompt", "4 5", "--answer", "6", "--json", str(tmp_path / "t"), *options)
        assert shown.exit_code == 0, shown.output
        return json.loads((tmp_path / "t").read_text())["weights"]

    own = weights()
    assert weights("--method", "lora-flow") == own
    # Deeper layers read what the sparse weights of the layers before made.
    first, sparse = torch.tensor(own)[:, 0], torch.tensor(weights("--method-option", "top_k=1"))[:, 0]
    kept = first.abs().argmax(dim=-1, keepdim=True)
    torch.testing.assert_close(sparse, torch.zeros_like(first).scatter(-1, kept, first.gather(-1, kept)))
    refused = run("generate", str(fitted), "--prompt", "4", "--method", "phatgoose")
    assert "this fusion was fitted by 'lora-flow'" in refused.output


def test_a_moved_fusion_says_how_to_find_its_adapters(run, world, fitted, tmp_path):
    moved = shutil.copytree(fitted, tmp_path / "deep" / "er" / "fusion")
    refused = run("generate", str(moved), "--prompt", "4")
    assert "cannot be read from where it was" in refused.output
    assert "--lora-modules zh=..." in refused.output
    answered = run("generate", str(moved), *SOURCES, "--prompt", "4", "--max-new-tokens", "2")
    assert answered.exit_code == 0, answered.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "arrow", "--data", "{world}/train.jsonl"), "The method 'arrow' learns nothing"),
        (("--method", "phatgoose", "--data", "{world}/train.jsonl"), "--adapter-data zh=FILE math=FILE"),
        (("--method", "centroid", "--adapter-data", "zh={world}/dev.jsonl"), "--adapter-data zh=FILE math=FILE"),
        (("--method", "centroid", "--adapter-data", "hz={world}/dev.jsonl"), "unknown adapter 'hz'"),
        (("--method", "lorahub", *OWN_DATA), "Give them with --data"),
        (("--method", "arow"), "Did you mean 'arrow'?"),
        (("--method", "phatgoose", *OWN_DATA, "--search"), "'phatgoose' has no use for --search"),
        (("--method", "phatgoose", *OWN_DATA, "--dev", "{world}/dev.jsonl"), "'phatgoose' has no use for --dev"),
        (("--method", "centroid", *OWN_DATA, "--learning-rate", "5"), "'centroid' has no use for --learning-rate"),
        (("--method", "lorahub", *TASK_DATA, "--packing"), "'lorahub' has no use for --packing"),
        (
            ("--method", "lorahub", "--data", "{world}/train.jsonl", "--epochs", "2"),
            "'lorahub' has no use for --epochs",
        ),
        (
            (*TASK_DATA, "--dev", "{world}/dev.jsonl", "--search", "--learning-rate", "1e-3"),
            "`--learning-rate` has no effect: --search tries rates of its own",
        ),
        (
            (*TASK_DATA, "--dev", "{world}/dev.jsonl", "--search", "--batch-size", "2"),
            "`--batch-size` has no effect: --search tries sizes of its own",
        ),
        ((*TASK_DATA, "--dev-prompt-field", "p"), "`--dev-prompt-field` has no effect: there is no --dev"),
        ((*TASK_DATA, "--allow-code"), "`--allow-code` has no effect: --dev-metric is not code-tests"),
        ((*TASK_DATA, "--max-new-tokens", "9"), "`--max-new-tokens` has no effect: --dev-metric is the loss"),
    ],
)
def test_fit_says_what_a_method_learns_from(run, arguments, message):
    refused = run("fit", *SOURCES, *arguments, "--output", "x")
    assert refused.exit_code == 1
    assert message in refused.output
    assert "Traceback" not in refused.output


def test_fit_generate_trace_info(run, world, tmp_path):
    out = str(tmp_path / "fusion")
    fitted = run("fit", *SOURCES, *DATA, "--output", out, "--epochs", "2")
    assert fitted.exit_code == 0, fitted.output
    assert {path.name for path in Path(out).iterdir()} == {
        *("fusion_config.json", "fusion.safetensors", "README.md", "fit.yaml")
    }
    config = json.loads((Path(out) / "fusion_config.json").read_text())
    assert config["training"]["examples"] == 24
    assert str(world) not in (Path(out) / "fusion_config.json").read_text()

    model = FusedModel.from_pretrained(out)
    ids = torch.tensor([byte_tokenizer()("5 6 7")["input_ids"]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[0, 5:]
    answered = run("generate", out, "--prompt", "5 6 7", "--max-new-tokens", "5")
    assert answered.exit_code == 0, answered.output
    assert answered.stdout.strip() == byte_tokenizer().decode(expected, skip_special_tokens=True).strip()

    answers = tmp_path / "answers.jsonl"
    options = ("--max-new-tokens", "3", "--method", "average")
    many = run("generate", out, "--data", "{world}/dev.jsonl", "--output", str(answers), *options)
    assert many.exit_code == 0, many.output
    keys = [set(json.loads(line)) for line in answers.read_text().splitlines()]
    assert keys == [{"prompt", "completion", "answer_text"}] * 6

    weights = tmp_path / "trace.json"
    traced = run("trace", out, "--prompt", "5 6 7", "--answer", "7 6 5", "--numbers", "--json", str(weights))
    assert traced.exit_code == 0, traced.output
    assert "zh" in traced.output
    assert "math" in traced.output
    saved = json.loads(weights.read_text())
    assert torch.tensor(saved["weights"]).shape == (len(saved["tokens"]), 3, 2)
    assert saved["prompt_length"] == 5

    described = run("info", out)
    assert described.exit_code == 0, described.output
    assert "method lora-flow" in described.output
    assert "trained: examples 24" in described.output


@dataclass(frozen=True)
class Patient(LearnedStatic):
    """A method of another package, with a recipe of its own."""

    name = "patient"
    recipe: ClassVar = {"epochs": 2, "batch_size": 8, "warmup": 0.0, "max_steps": 3}


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ((), {}),
        (("--batch-size", "4", "--warmup", "0.2"), {"batch_size": 4, "warmup": 0.2}),
        # Epochs that are asked for win over steps of the method's own.
        (("--epochs", "1"), {"epochs": 1, "max_steps": None}),
        (("--epochs", "1", "--max-steps", "2"), {"epochs": 1, "max_steps": 2}),
    ],
)
def test_only_what_is_given_changes_a_methods_recipe(run, tmp_path, monkeypatch, options, changed):
    monkeypatch.setitem(METHODS, "patient", Patient)
    used = []

    def stop(*_, config, **__):
        used.append(config)
        raise LoraflowError("far enough")

    monkeypatch.setattr(training, "fit", stop)
    result = run("fit", *SOURCES, *TASK_DATA, "--method", "patient", *options, "--output", str(tmp_path / "out"))
    assert "far enough" in result.output
    assert used == [FitConfig.for_method(Patient(), **changed)]


def test_fit_searches_the_paper_grid(run, tmp_path):
    out = tmp_path / "searched"
    batches = ("--batch-size", "auto", "--group-by-length", "--packing")
    result = run("fit", *SOURCES, *DATA, "--output", str(out), "--epochs", "1", "--search", *batches)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "fusion_config.json").read_text())["training"]["search"]
    tried = {(row["learning_rate"], row["batch_size"]) for row in found}
    assert tried == set(itertools.product((1e-3, 1e-4), (2, 4, 8)))


@pytest.mark.parametrize("option", ["--batch-size", "--gradient-accumulation"])
def test_sizes_are_numbers_or_auto(run, option):
    refused = run(*FIT, option, "some")
    assert refused.exit_code == 2
    assert "'some' is neither a number nor 'auto'" in refused.output
    both = run(*FIT, "--batch-size", "auto", "--gradient-accumulation", "2")
    assert both.exit_code == 1
    assert "Leave one of them out" in both.output


def test_info_before_anything_heavy(run, world, tmp_path):
    good = run("info", *SOURCES)
    assert good.exit_code == 0, good.output
    # k (d + 1) values for each of 1, 3 and 21 gates.
    assert "gates, step   (2 adapters): 66 values in 1" in good.output
    assert "gates, layer  (2 adapters): 198 values in 3" in good.output
    assert "plan of a fit (lora-flow, 4 examples in a forward)" in good.output
    assert re.search(r"4 x 256 +[\d.]+ MiB +[\d.]+ MiB +[\d.]+ MiB +[\d.]+ MiB", good.output)
    other = tiny_model(hidden_size=64, intermediate_size=32, head_dim=16, vocab_size=259)
    save_adapter(other, tmp_path / "wide", seed=4)
    bad = run("info", "--base", "{world}/base", "--lora-modules", "zh={world}/zh", f"wide={tmp_path}/wide")
    assert bad.exit_code == 1
    assert "does not fit" in bad.output
    assert re.search(r"maps \d+ to \d+ features, but the base's maps \d+ to \d+", bad.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", *SOURCES, "--data", "{world}/nothing.jsonl", "--output", "x"), "There is no file"),
        ((*FIT, "--prompt-field", "a"), "go together"),
        ((*FIT, "--search"), "`--search` needs dev examples"),
        ((*FIT, "--method", "base"), "'base' learns nothing"),
        ((*FIT, "--method-option", "granularity=word"), "`granularity` is unknown: 'word'"),
        (("fit", "--base", "{world}/base", *DATA, "--output", "x"), "`--lora-modules` is missing"),
        ((*FIT, "--dtype", "int3"), "`--dtype` is unknown"),
        (("generate", *SOURCES, "--method", "lora-flow", "--prompt", "5"), "must be fitted first"),
        (("generate", "{world}", "--prompt", "5"), "has no fusion.safetensors"),
        (("generate", "--base", "b", "--lora-modules", "zh", "--prompt", "5"), "takes name=path, found 'zh'"),
        (("info",), "Give a saved fusion, or --base and --lora-modules"),
        (("demo", "--task", "zh-maths"), "Did you mean 'zh-math'"),
        (("demo", "--task", "zh-code"), "--allow-code"),
    ],
)
def test_errors_are_one_clear_line(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_bad_line_is_named_before_the_model_is_loaded(run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    sources = ("--base", "no/such-model", "--lora-modules", "zh={world}/zh")
    result = run("fit", *sources, "--data", str(bad), "--output", "x")
    assert result.exit_code == 1
    assert "bad.jsonl:2: expected `prompt` and `completion`" in result.output


def test_resumes_after_kill_9(world, tmp_path):
    def command(output, *more):
        return [
            *(sys.executable, "-c", "from loraflow.cli import app; app()", "fit"),
            *("--base", f"{world}/base", "--lora-modules", f"zh={world}/zh", f"math={world}/math"),
            *("--data", f"{world}/train.jsonl", "--output", str(output)),
            *("--epochs", "12", "--checkpoint-steps", "3", "--device", "cpu", *more),
        ]

    def final_loss(output):
        return json.loads((output / "fusion_config.json").read_text())["training"]["train_loss"]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(killed.glob("checkpoints/checkpoint-*/COMPLETE")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "fusion_config.json").exists()
    subprocess.run(command(killed, "--resume"), check=True, capture_output=True, timeout=300)
    assert final_loss(killed) == final_loss(whole)
    expected, found = SavedFusion.open(whole).tensors, SavedFusion.open(killed).tensors
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.skipif(not PAPER.is_dir(), reason="LORAFLOW_PAPER_DATA does not name the paper's data")
@pytest.mark.parametrize(
    ("data", "fields", "dev", "dev_fields"),
    [
        ("train/zh_math_train.jsonl", ("query", "response"), "dev/zh_math_dev.jsonl", ("question", "answer")),
        ("train/es_code_train.jsonl", ("data.0", "data.1"), "dev/es_code_dev.jsonl", ("text", "code")),
    ],
)
def test_the_papers_own_files(run, tmp_path, data, fields, dev, dev_fields):
    texts = [(PAPER / name).read_text() for name in (data, dev)]
    base = tiny_model(vocab_size=1200, max_position_embeddings=4096)
    base.save_pretrained(tmp_path / "base")
    trained_tokenizer(texts, vocab_size=1200).save_pretrained(tmp_path / "base")
    adapters = [
        f"{name}={save_adapter(base, tmp_path / name, seed=seed)}" for seed, name in enumerate(("language", "task"))
    ]
    task = Path(data).name.removesuffix("_train.jsonl")
    system = json.loads((PAPER / "system_prompts.json").read_text())[task]
    result = run(
        *("fit", "--base", f"{tmp_path}/base", "--lora-modules", *adapters, "--system-prompt", system),
        *("--data", f"{PAPER}/{data}", "--prompt-field", fields[0], "--completion-field", fields[1]),
        *("--dev", f"{PAPER}/{dev}", "--dev-prompt-field", dev_fields[0], "--dev-completion-field", dev_fields[1]),
        *("--output", str(tmp_path / "out"), "--epochs", "1", "--max-length", "4000"),
    )
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "fusion_config.json").read_text())
    assert config["training"]["examples"] == 200
    assert config["training"]["steps"] == 50
    assert config["prompt"]["system_prompt"] == system


def test_several_values_after_one_flag():
    assert spread_values(["fit", "--lora-modules", "a=1", "b=2", "--output", "x"]) == [
        *("fit", "--lora-modules", "a=1", "--lora-modules", "b=2", "--output", "x")
    ]
    assert spread_values(["generate", "dir", "--prompt", "a=b"]) == ["generate", "dir", "--prompt", "a=b"]
    assert spread_values(["fit", "--data", "a", "b=1"]) == ["fit", "--data", "a", "--data", "b=1"]
    # Where there are arguments, they follow an option's value.
    assert spread_values(["info", "--data", "a", "fusion"]) == ["info", "--data", "a", "fusion"]


def test_method_options_are_json_where_they_can_be():
    assert parse_method_options(["start=zh", "temperature=1.5", 'weights={"a": 1}']) == {
        "start": "zh",
        "temperature": 1.5,
        "weights": {"a": 1},
    }
    with pytest.raises(MethodError, match="takes key=value, found 'start'"):
        parse_method_options(["start"])

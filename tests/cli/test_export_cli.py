"""`loraflow export` and `loraflow import-official`, run as a user runs them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from loraflow import FusedModel, LoraFlow
from loraflow.adapters import load_adapter, match_adapter
from loraflow.cli import app
from loraflow.merging import make_merge, merge_adapters
from tests.test_official import gate_state
from tests.tiny import (
    byte_tokenizer,
    peft_model,
    random_ids,
    relative_error,
    save_adapter,
    set_random_gates,
    tiny_model,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a tokenizer, two adapters, a dynamic fusion of them, a gate file and data, on disk."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    save_adapter(base, root / "zh", seed=1)
    save_adapter(base, root / "math", r=2, seed=2)
    sources = {"zh": root / "zh", "math": root / "math"}
    fusion = FusedModel.from_adapters(root / "base", sources, LoraFlow())
    set_random_gates(fusion)
    fusion.save_pretrained(root / "fusion")
    torch.save(gate_state(), root / "gate.pt")
    records = [{"q": "5 6", "a": "6 5"}, {"q": "1 2 3", "a": "3 2 1"}, {"q": "a", "a": "b" * 600}]
    (root / "dev.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture
def run(world, monkeypatch):
    """Run a command; `{world}` in its arguments is where everything lies."""
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument).format(world=world) for argument in arguments])

    return invoke


SOURCES = ("--base", "{world}/base", "--lora-modules", "zh={world}/zh", "math={world}/math")
DATA = ("--mean-weights-on", "{world}/dev.jsonl", "--prompt-field", "q", "--completion-field", "a")


@torch.no_grad()
def test_a_constant_fusion(run, world, tmp_path):
    out = tmp_path / "adapter"
    result = run("export", *SOURCES, "--method", "average", "--to", "peft", "--output", out)
    assert result.exit_code == 0, result.output
    assert f"one adapter of zh, math: 21 modules, rank 6, in {out}" in result.output
    assert f"vLLM can load it: --enable-lora --max-lora-rank 8 --lora-modules name={out}" in result.output
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    fused = FusedModel.from_adapters(world / "base", {n: world / n for n in ("zh", "math")}, "average")
    ids = random_ids()
    assert relative_error(peft_model(base, str(out))(ids).logits, fused(ids).logits) < 1e-5


@torch.no_grad()
def test_a_merge(run, world, tmp_path):
    out = tmp_path / "adapter"
    options = ("--merge", "core-iso-c", "--merge-option", "scale=0.5", 'weights={{"zh": 2.0}}', "--rank", "5")
    result = run("export", *SOURCES, *options, "--output", out)
    assert result.exit_code == 0, result.output
    assert f"one adapter of zh, math: 21 modules, rank 5, in {out}" in result.output
    assert "relative difference from the sum of the updates 0." in result.output
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    adapters = [match_adapter(load_adapter(name, world / name), base) for name in ("zh", "math")]
    merge = make_merge("core-iso-c", {"scale": 0.5, "weights": {"zh": 2.0}})
    expected = merge_adapters(adapters, merge, rank=5)
    saved = load_adapter("saved", out)
    for name, module in expected.adapter.modules.items():
        assert torch.allclose(saved.modules[name].lora_B @ saved.modules[name].lora_A, module.lora_B @ module.lora_A)
    assert "by the merge `core-iso-c`" in (out / "README.md").read_text()
    # The fusion's own method weighs each token; a merge does not ask it.
    again = run("export", "{world}/fusion", "--merge", "sum", "--output", tmp_path / "other")
    assert again.exit_code == 0, again.output


@torch.no_grad()
def test_a_whole_checkpoint(run, world, tmp_path):
    out = tmp_path / "model"
    options = ("--method", "average", "--to", "merged", "--max-shard-size", "40KB", "--output", out)
    result = run("export", *SOURCES, *options)
    assert result.exit_code == 0, result.output
    assert "the base with zh, math folded in: " in result.output
    assert "files of weights in float32, with its tokenizer" in result.output
    assert "rounded to float32: relative error " in result.output
    fused = FusedModel.from_adapters(world / "base", {n: world / n for n in ("zh", "math")}, "average")
    ids = random_ids()
    assert relative_error(AutoModelForCausalLM.from_pretrained(out)(ids).logits, fused(ids).logits) < 1e-5
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == byte_tokenizer()("a b")["input_ids"]
    again = run("export", *SOURCES, *options)
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    refused = run("export", "{world}/fusion", "--to", "merged", "--output", tmp_path / "other")
    assert refused.exit_code == 1
    assert "'lora-flow' weighs every token anew" in refused.output


def test_a_lora_for_llama_cpp(run, tmp_path):
    pytest.importorskip("gguf")
    out = tmp_path / "lora.gguf"
    result = run("export", *SOURCES, "--method", "average", "--to", "gguf", "--output", out)
    assert result.exit_code == 0, result.output
    assert f"llama.cpp can load it: --lora {out}" in result.output


def test_a_dynamic_fusion(run, tmp_path):
    out = tmp_path / "adapter"
    refused = run("export", "{world}/fusion", "--output", out)
    assert refused.exit_code == 1
    assert "'lora-flow' weighs every token anew" in refused.output
    assert "--mean-weights-on data.jsonl" in refused.output
    result = run("export", "{world}/fusion", "--output", out, *DATA, "--rank", "3", "--adapter-dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "compressed to rank 3: relative error 0." in result.output
    assert "constant weights, the means on 3 examples: loss " in result.output
    assert "nats per response token" in result.output
    assert "1 of 3 examples were cut to the longest length" in result.output
    again = run("export", "{world}/fusion", "--output", out, *DATA)
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    assert run("export", "{world}/fusion", "--output", out, *DATA, "--overwrite").exit_code == 0


@torch.no_grad()
def test_import_official(run, world, tmp_path):
    out = tmp_path / "fusion"
    result = run(
        "import-official", "{world}/gate.pt", *SOURCES, "--output", out, "--temperature", "1.1", "--copy-adapters"
    )
    assert result.exit_code == 0, result.output
    assert "3 gates for zh, math" in result.output
    model = FusedModel.from_pretrained(out)
    assert model.method == LoraFlow(temperature=1.1)
    assert torch.equal(model.state_dict()["layers.1.bias"], gate_state()["encoder.layers.1.weight_bias"][0])
    assert (out / "adapters").is_dir()


def test_help_teaches(run):
    for command, example in (("export", "loraflow export zh-math"), ("import-official", "--temperature 1.1")):
        result = run(command, "--help")
        assert result.exit_code == 0, result.output
        assert example in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("export", "{world}/fusion", "--output", "x", "--to", "pef"),
            "`--to` is unknown: 'pef'. Known: 'gguf', 'gguf-model', 'merged', 'peft'. Did yo",
        ),
        (("export", "f", "--output", "x", "--merge", "knots"), "Unknown merge 'knots'."),
        (
            ("export", "f", "--output", "x", "--merge-option", "a=1"),
            "`--merge-option` is of a `--merge`, which is miss",
        ),
        (("export", "f", "--output", "x", "--merge", "sum", "--merge-option", "a"), "`--merge-option` takes key=value"),
        (
            ("export", "f", "--output", "x", "--merge", "sum", "--method", "average"),
            "`--merge` takes the place of `--m",
        ),
        (
            ("export", "f", "--output", "x", "--to", "merged", "--adapter-dtype", "float16"),
            "`--adapter-dtype` (='float16') is nothing that `--to merged` has. Leave it out.",
        ),
        (("export", "f", "--output", "x", "--max-shard-size", "1GB"), "is nothing that `--to peft` has"),
        (("export", "f", "--output", "x", "--llama-cpp", "y"), "is nothing that `--to peft` has"),
        (
            ("export", "f", "--output", "x", "--to", "gguf-model"),
            "`--llama-cpp` is missing: a whole model becomes GGUF",
        ),
        (("export", "f", "--output", "x", "--adapter-dtype", "int8"), "`--adapter-dtype` is unknown: 'int8'"),
        (
            ("export", "f", "--output", "x", "--prompt-field", "q"),
            "`--prompt-field` and `--completion-field` go togeth",
        ),
        (("export", "f", "--output", "x", *DATA[2:]), "names a field of `--mean-weights-on`, which is missing"),
        (("export", "f", "--output", "x", "--mean-weights-on", "{world}/no.jsonl"), "There is no file"),
        (("import-official", "{world}/gate.pt", "--output", "x", *SOURCES[:2]), "`--lora-modules` is missing"),
        (("import-official", "{world}/gate.pt", "--output", "x", *SOURCES[2:]), "`--base` is missing"),
        (("import-official", "{world}/no.pt", "--output", "x", *SOURCES), "There is no file"),
    ],
)
def test_errors_are_one_clear_line(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_prompt_options_without_examples_are_refused(run, tmp_path):
    options = ("--method", "average", "--output", tmp_path / "out", "--system-prompt", "Be brief.")
    result = run("export", *SOURCES, *options)
    assert result.exit_code == 1
    assert "are how the examples of `--mean-weights-on` are asked, which is missing" in " ".join(result.output.split())

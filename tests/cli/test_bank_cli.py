"""A folder of adapters on the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from loraflow.cli import app
from tests.tiny import byte_tokenizer, save_adapter, tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    for seed, name in enumerate(("law", "math", "zh")):
        save_adapter(base, root / "bank" / name, seed=seed, r=2 + seed)
    for name in ("law", "zh"):
        save_adapter(base, root / "damaged" / name)
    (root / "damaged" / "zh" / "adapter_model.safetensors").write_bytes(b"no header")
    return root


@pytest.fixture
def run(world, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments):
        return CliRunner().invoke(app, [argument.replace("{world}", str(world)) for argument in arguments])

    return invoke


BASE = ("--base", "{world}/base")
BANK = (*BASE, "--adapters", "{world}/bank")
SINGLE = (*BASE, "--lora-modules", *(f"{name}={{world}}/bank/{name}" for name in ("law", "math", "zh")))
WEIGHTS = ("--method", "static", "--method-option", "weights=" + json.dumps({"law": 0.5, "zh": 0.7}))


@pytest.mark.parametrize("method", [("--method", "math"), ("--method", "average"), ("--method", "qa-flora")])
def test_answers_are_those_of_the_adapters_named_one_by_one(run, method):
    ask = ("generate", "--prompt", "Hi", "--max-new-tokens", "8", *method)
    found, expected = run(*ask, *BANK), run(*ask, *SINGLE)
    assert found.exit_code == 0, found.output
    assert found.stdout == expected.stdout


def test_weights_are_traced(run, world, tmp_path):
    trace = ("trace", "--prompt", "Hi", "--answer", "ho", *WEIGHTS, "--json")
    assert run(*trace, str(tmp_path / "bank"), *BANK, "--host-memory", "0.001").exit_code == 0
    assert run(*trace, str(tmp_path / "single"), *SINGLE).exit_code == 0
    assert json.loads((tmp_path / "bank").read_text()) == json.loads((tmp_path / "single").read_text())


def test_info_tells_them_from_their_headers(run):
    found, expected = run("info", *BANK), run("info", *SINGLE)
    assert found.exit_code == 0, found.output
    assert found.stdout == expected.stdout


def test_a_broken_adapter_is_named_and_left_out_only_if_that_is_asked_for(run):
    ask = ("generate", "--prompt", "Hi", "--max-new-tokens", "2", *BASE, "--adapters", "{world}/damaged")
    refused = run(*ask)
    assert refused.exit_code != 0
    message = str(refused.exception) + refused.output
    assert "1 of 2 adapters cannot be used: Adapter 'zh'" in message
    assert "--skip-broken" in message
    found = run(*ask, "--skip-broken", "--method", "law")
    assert found.exit_code == 0, found.output
    assert "left out zh: Adapter 'zh'" in found.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*SINGLE, "--adapters", "{world}/bank"), "`--adapters` and `--lora-modules` exclude each other."),
        ((*SINGLE, "--skip-broken"), "`--skip-broken` belongs to --adapters."),
        ((*SINGLE, "--host-memory", "1"), "`--host-memory` belongs to --adapters."),
        ((*BANK, "--device-memory", "0"), "`--device-memory` (=0.0) must be a number of GiB above 0."),
        ((*BANK, "--host-memory", "nan"), "`--host-memory` (=nan) must be a number of GiB above 0."),
        ((*BASE, "--adapters", "{world}/base"), "has no adapter in it"),
        ((*BANK, "--device-memory", "0.000001", "--method", "average"), "would be used at once"),
    ],
)
def test_what_cannot_be_is_refused(run, words, message):
    result = run("generate", "--prompt", "Hi", *words)
    assert result.exit_code != 0
    assert message in str(result.exception) + result.output

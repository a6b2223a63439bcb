"""`loraflow trace`: several methods on one text, in the terminal, as JSON and as a page."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch
from typer.testing import CliRunner

from loraflow import FusedModel, LoraFlow
from loraflow.cli import app
from loraflow.cli.values import spread_values
from tests.tiny import byte_tokenizer, save_adapter, set_random_gates, tiny_model
from tests.visual.test_explorer import decoded, embedded


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a tokenizer, two adapters and a fusion with gates of its own, on disk."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    save_adapter(base, root / "zh", seed=1)
    save_adapter(base, root / "math", r=2, seed=2)
    sources = {name: root / name for name in ("zh", "math")}
    fusion = FusedModel.from_adapters(root / "base", sources, "lora-flow")
    set_random_gates(fusion)
    fusion.save_pretrained(root / "fusion")
    return root


@pytest.fixture
def run(world, monkeypatch):
    """Run `loraflow trace` on a question; `{world}` in its arguments is where everything lies."""
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments, of=("{world}/fusion",)):
        given = ("trace", *of, "--prompt", "5 6 7", *map(str, arguments))
        return CliRunner().invoke(app, [argument.format(world=world) for argument in given])

    return invoke


ANSWERED = ("--answer", "7 6 5")


def test_fitted_fusions_beside_each_other(run, world, tmp_path):
    sources = {name: world / name for name in ("zh", "math")}
    other = FusedModel.from_adapters(world / "base", sources, LoraFlow("module"))
    set_random_gates(other, seed=9)
    other.save_pretrained(tmp_path / "modules")
    numbers = tmp_path / "trace.json"
    result = run(*ANSWERED, "--compare", tmp_path / "modules", "average", "--json", numbers)
    assert result.exit_code == 0, result.output
    saved = json.loads(numbers.read_text())
    assert list(saved["compared"]) == ["modules", "average"]
    ids = byte_tokenizer()("5 6 7")["input_ids"]
    found = torch.tensor(saved["compared"]["modules"]["weights"])
    torch.testing.assert_close(found[: len(ids)], other.trace(torch.tensor([ids])).weights[0], rtol=1e-4, atol=1e-5)
    turned = FusedModel.from_adapters(world / "base", dict(reversed(sources.items())), "average")
    turned.save_pretrained(tmp_path / "turned")
    refused = run(*ANSWERED, "--compare", tmp_path / "turned")
    assert refused.exit_code == 1
    assert "or the same in another order. Compare fusions of the same ones." in refused.output
    assert "another one is called 'modules' already" in run(*ANSWERED, "--compare", *[tmp_path / "modules"] * 2).output


def test_several_methods_of_one_text(run, world, tmp_path):
    page, numbers = tmp_path / "new" / "trace.html", tmp_path / "new" / "trace.json"
    result = run(*ANSWERED, "--compare", "average", "qa-flora", "zh", "--html", page, "--json", numbers)
    assert result.exit_code == 0, result.output
    for name in ("lora-flow", "average", "qa-flora", "zh"):
        assert f"\n{name} ──" in f"\n{result.stdout}"
    assert result.output.count("adapter  ") == 4
    assert f"Wrote {page}; open it in a browser." in result.output
    assert f"Wrote {numbers}." in result.output

    model = FusedModel.from_pretrained(world / "fusion")
    tokenizer = byte_tokenizer()
    ids = tokenizer("5 6 7")["input_ids"]
    saved, content = json.loads(numbers.read_text()), embedded(page.read_text(encoding="utf-8"))
    whole = torch.tensor([model.prompt.prompt_ids(tokenizer, [{"role": "user", "content": "5 6 7"}])])
    assert whole.tolist() == [ids]
    answer = model.prompt.completion_ids(tokenizer, [{"role": "user", "content": "5 6 7"}], "7 6 5")
    whole = torch.tensor([ids + answer])
    assert saved["method"] == "lora-flow"
    assert list(saved["compared"]) == ["average", "qa-flora", "zh"]
    assert [m["name"] for m in content["methods"]] == ["lora-flow", "average", "qa-flora", "zh"]
    for stored in content["methods"]:
        with model.using(stored["name"]) if stored["name"] != "lora-flow" else contextlib.nullcontext():
            trace = model.trace(whole, prompt_length=len(ids))
        of_method = saved if stored["name"] == "lora-flow" else saved["compared"][stored["name"]]
        torch.testing.assert_close(torch.tensor(of_method["weights"]), trace.weights[0])
        found = decoded(stored, 3, 2).expand(len(whole[0]), 3, 2)
        torch.testing.assert_close(found.float(), trace.shown_weights(), atol=1e-4, rtol=0)


def test_all_methods_read_the_answer_of_the_fusions_own(run, tmp_path):
    def tokens(*options):
        result = run("--max-new-tokens", "4", "--json", tmp_path / "t.json", *options)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "t.json").read_text())["tokens"]

    alone = tokens()
    assert len(alone) > 5
    assert tokens("--compare", "average", "math") == alone


def test_one_method_needs_no_heading(run):
    result = run(*ANSWERED)
    assert result.exit_code == 0, result.output
    assert "──" not in result.output
    # Piped, the text names its adapters.
    assert "▸ [" in result.output


def test_weights_of_a_prompt_are_shown_by_layer(run):
    of = ("--base", "{world}/base", "--lora-modules", "zh={world}/zh", "math={world}/math", "--method", "qa-flora")
    result = run(*ANSWERED, of=of)
    assert result.exit_code == 0, result.output
    assert "these weights are the prompt's, the same for every token" in result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[-3:]] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--compare", "base"), "`--compare` names 'base', which has no fusion weights. Leave it out."),
        (("--compare", "lora-flow"), "`--compare` names 'lora-flow', the method that is traced anyway. Leave it out."),
        (("--compare", "zh", "arrow", "zh"), "`--compare` names 'zh', a method twice. Leave it out."),
        (("--compare", "phatgoose"), "names 'phatgoose', which must be fitted first, and what is opened here is"),
        (("--method", "average", "--compare", "lora-flow"), "names 'lora-flow', which must be fitted first"),
        (("--compare", "arow"), "Unknown method 'arow'. Known"),
        (("--compare", "static"), "`static` needs `weights`"),
        (("--html", "{world}"), "is a directory. Give a file."),
        (("--json", "{world}/base"), "is a directory. Give a file."),
        (("--html", "{world}/base/config.json/t.html"), "base/config.json is a file. Give another place."),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value).replace("{world}", ""),
)
def test_what_cannot_be_traced_is_refused_before_any_answer(run, monkeypatch, options, message):
    monkeypatch.setattr(FusedModel, "generate", lambda *_, **__: pytest.fail("it has answered"))
    result = run(*options)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_read_only_folder_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    result = run("--html", tmp_path / "t.html")
    assert result.exit_code == 1
    assert f"cannot be written: {tmp_path} is read-only. Give another place." in result.output


def test_bare_words_after_compare():
    assert spread_values(["trace", "dir", "--compare", "average", "arrow", "--html", "x"]) == [
        *("trace", "dir", "--compare", "average", "--compare", "arrow", "--html", "x")
    ]
    # Words after the values of other options stay where they are.
    assert spread_values(["trace", "--lora-modules", "a=1", "dir"]) == ["trace", "--lora-modules", "a=1", "dir"]


def test_a_given_answer_has_no_stop(run):
    result = run(*ANSWERED, "--stop", "x")
    assert result.exit_code == 1
    assert "`--stop` ends a generated answer, and `--answer` gives one" in " ".join(result.output.split())

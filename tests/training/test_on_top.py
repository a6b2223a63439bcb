"""A LoRA on top of a fusion: what it learns beside, what it leaves as it was, what is saved, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from loraflow import BaseOptions, FitConfig, FusedModel
from loraflow.adapters import load_adapter
from loraflow.cli import app
from loraflow.errors import LoraflowError, MethodError
from loraflow.export import export_peft
from loraflow.methods import Average, LoraFlow, OnTop, Static
from loraflow.serving.vllm.plan import read_plan
from loraflow.training import finetune
from loraflow.training.checkpoints import COMPLETE, complete_checkpoints
from loraflow.training.config import LoraSettings
from loraflow.training.data import prepare
from loraflow.training.loss import mean_loss
from tests.tiny import (
    number_tokenizer,
    peft_model,
    random_ids,
    relative_error,
    save_adapter,
    set_random_gates,
    tiny_model,
)
from tests.training.test_fit import reversals

SHORT = FitConfig(epochs=1, learning_rate=1e-2)
SMALL = LoraSettings(r=3, alpha=6, dropout=0.0)
DEV = reversals(6, seed=1)


@pytest.fixture
def make_model(tmp_path):
    """A fusion of adapters of unlike ranks and targets, its gates as after a fit."""

    def make(method="lora-flow", architecture="llama"):
        base, folder = tiny_model(architecture), tmp_path / architecture
        some = ["q_proj", "v_proj"] if architecture == "llama" else None
        adapters = {
            "a": save_adapter(base, folder / "a", some, seed=1),
            "b": save_adapter(base, folder / "b", seed=2, r=2, use_rslora=True),
        }
        model = FusedModel.from_adapters(base, adapters, method, tokenizer=number_tokenizer())
        set_random_gates(model)
        return model

    return make


@pytest.fixture
def train(tmp_path):
    """Train on top of a fusion; the result is in `tmp_path / "top"`."""
    console = Console(file=(tmp_path / "log.txt").open("w"))

    def call(model, examples=None, output="top", **settings):
        settings = {"config": SHORT, "lora": SMALL, "console": console, **settings}
        return model.finetune(examples or reversals(8), tmp_path / output, **settings)

    return call


def opened(result, architecture="llama"):
    return FusedModel.from_pretrained(result.output, base=tiny_model(architecture), tokenizer=number_tokenizer())


def loss(model):
    return mean_loss(model, prepare(model, DEV, None, FitConfig()).train, 2)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [("llama", LoraFlow(granularity="module")), ("llama", "arrow"), ("gpt2", "lora-flow"), ("gpt2", {"a": 1.0})],
    ids=str,
)
def test_the_saved_fusion_is_what_was_trained_and_the_one_below_stays(make_model, train, architecture, method):
    model = make_model(method, architecture)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    types = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        before = model(random_ids()).logits
    result = train(model, config=FitConfig(epochs=1, learning_rate=1e-2, gradient_checkpointing=True), dev=DEV)
    with torch.no_grad():
        assert torch.equal(model(random_ids()).logits, before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    top = opened(result, architecture)
    assert top.adapter_names == ["a", "b", "tuned"]
    assert (top.method.name, top.adapters[2].ranks) == (model.method.name, (3,))
    assert result.parameters == top.adapters[2].parameters
    assert loss(top) == pytest.approx(result.dev_loss, rel=1e-4)
    assert loss(top) < loss(model)
    weights = top.trace(random_ids()).weights
    assert torch.equal(weights[..., 2], torch.ones_like(weights[..., 2]))


def test_a_lora_that_has_learned_nothing_changes_nothing(make_model, train):
    model = make_model(LoraFlow(granularity="module"))
    top = opened(train(model, config=FitConfig(epochs=1, learning_rate=1e-12)))
    with torch.no_grad():
        assert relative_error(top(random_ids()).logits, model(random_ids()).logits) < 1e-5
    # Gates that have linears inside are none of the LoRA's targets, and the folder is PEFT's.
    low_rank = make_model(LoraFlow(reads="normalized", scorer="low-rank"))
    result = train(low_rank, output="other", name="mine")
    (folder,) = (result.output / "adapters").iterdir()
    adapter = load_adapter("mine", folder)
    assert not [name for name in adapter.modules if "fusion" in name]
    assert not [name for name in adapter.config.target_modules if "fusion" in name]
    with torch.no_grad():
        theirs = peft_model(tiny_model(), str(folder))(random_ids()).logits
        alone = FusedModel.from_adapters(tiny_model(), {"mine": folder}, "mine")
        assert relative_error(alone(random_ids()).logits, theirs) < 1e-5
    card = (folder / "README.md").read_text()
    assert "a fusion of the adapters `a`, `b` by the" in card
    assert "`mine`" in (result.output / "README.md").read_text()


def test_on_an_adapter_it_exports_to_one_that_is_both(make_model, train, tmp_path):
    result = train(make_model({"b": 1.0}), name="mine")
    top = opened(result)
    assert top.method == Static({"b": 1.0, "mine": 1.0})
    export_peft(top, tmp_path / "both")
    with torch.no_grad():
        theirs = peft_model(tiny_model(), str(tmp_path / "both"))(random_ids()).logits
        assert relative_error(theirs, top(random_ids()).logits) < 1e-5
    assert load_adapter("both", tmp_path / "both").ranks == (5,)


def test_another_one_on_top_saved_again_and_read_for_vllm(make_model, train, tmp_path):
    model = opened(train(make_model()))
    result = train(model, output="second", name="again", config=FitConfig(epochs=1, learning_rate=1e-12))
    twice = opened(result)
    assert twice.method == OnTop(LoraFlow(), ("tuned", "again"))
    with torch.no_grad():
        assert relative_error(twice(random_ids()).logits, model(random_ids()).logits) < 1e-5
    twice.save_pretrained(tmp_path / "saved", copy_adapters=True)
    saved = FusedModel.from_pretrained(tmp_path / "saved", base=tiny_model())
    with torch.no_grad():
        assert torch.equal(saved(random_ids()).logits, twice(random_ids()).logits)
    tiny_model().save_pretrained(tmp_path / "base")
    plan = read_plan(tmp_path / "saved", str(tmp_path / "base"))
    assert plan.adapters == ("a", "b", "tuned", "again")
    x = torch.randn(1, 3, 32)
    for name, gate in plan.gates.items():
        assert torch.equal(gate(x), twice.gates[name](x))
    with pytest.raises(MethodError, match="The fusion has 'tuned', 'again' on top of 'lora-flow', trained over"):
        twice.fit(reversals(4))
    with pytest.raises(LoraflowError, match=r"The fusion has an adapter 'again' already. Give the new one another"):
        train(twice, name="again")


def test_an_interrupted_run_goes_on_to_the_same_adapter(make_model, train, tmp_path):
    config = FitConfig(epochs=3, learning_rate=1e-2, checkpoint_steps=2, gradient_accumulation=2)
    settings = {"config": config, "checkpoints": tmp_path / "run", "lora": LoraSettings(r=4)}
    whole = train(make_model(), **settings)
    # A crash while the newest was written: there, but not whole.
    (complete_checkpoints(tmp_path / "run")[-1] / COMPLETE).unlink()
    again = train(make_model(), output="again", resume=True, **settings)
    assert again.log == whole.log
    records = [json.loads((one.output / "fusion_config.json").read_text())["adapters"][2] for one in (whole, again)]
    assert records[0]["digest"] == records[1]["digest"]
    with pytest.raises(LoraflowError, match="another `on`"):
        train(make_model("average"), output="other", resume=True, **settings)


def test_what_excludes_what(make_model, train, tmp_path):
    model = make_model()
    tokenizer = number_tokenizer()
    with pytest.raises(LoraflowError, match=r"`adapter` .* is an existing one, and on a fusion a new one is trained"):
        finetune(model, reversals(2), tmp_path / "x", adapter=tmp_path / "llama" / "a", tokenizer=tokenizer)
    with pytest.raises(LoraflowError, match="`options` say how a base is loaded, but `base` is a fusion"):
        finetune(model, reversals(2), tmp_path / "x", options=BaseOptions())
    (tmp_path / "file").touch()
    with pytest.raises(LoraflowError, match=r"is a file. Give a directory"):
        train(model, output="file")
    with pytest.raises(LoraflowError, match=r"The adapter name '../x' cannot be used"):
        train(model, name="../x")
    with pytest.raises(LoraflowError, match="`target_modules` reaches 'lm_head', which is outside the decoder layers"):
        train(model, lora=LoraSettings(r=2, target_modules=["q_proj", "lm_head"]))
    model.attachment.check_attached()
    with torch.no_grad():
        model(random_ids())
    model.set_method("qa-flora")
    with pytest.raises(MethodError, match="'qa-flora' reads whole prompts before they are answered"):
        train(model)
    model.set_method(Average())
    with model.using("a"), pytest.raises(MethodError, match="'average', and 'static' is in use here"):
        train(model)
    model.unload()
    with pytest.raises(LoraflowError, match="were taken out of this model"):
        train(model)


def command(*arguments):
    quick = [
        "--epochs",
        2,
        "--batch-size",
        2,
        "--learning-rate",
        1e-2,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--rank",
        2,
    ]
    return CliRunner().invoke(app, [str(a) for a in ("finetune", *arguments, *quick)])


def test_the_command_trains_on_a_fusion_or_an_adapter(make_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    number_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, reversals(4))))
    make_model().unload()
    adapters = {name: tmp_path / "llama" / name for name in "ab"}
    FusedModel.from_adapters(tmp_path / "base", adapters, "average").save_pretrained(tmp_path / "fusion")
    data = ["--data", tmp_path / "train.jsonl"]
    done = command("--on", tmp_path / "fusion", *data, "--output", tmp_path / "one", "--name", "extra")
    assert done.exit_code == 0, done.output
    assert f"loraflow generate {tmp_path / 'one'} --prompt" in done.output.replace("\n", "")
    assert FusedModel.from_pretrained(tmp_path / "one").method == OnTop(Average(), ("extra",))
    named = f"skill={adapters['a']}"
    done = command("--base", tmp_path / "base", "--on", named, *data, "--output", tmp_path / "two")
    assert done.exit_code == 0, done.output
    assert FusedModel.from_pretrained(tmp_path / "two").adapter_names == ["skill", "tuned"]
    refused = {
        ("--on", named): "`--base` is missing.",
        ("--on", tmp_path / "fusion", "--adapter", adapters["a"]): "`--on` trains a new adapter",
        ("--on", tmp_path / "fusion", "--devices", 2): "Leave `--devices 2` out.",
        ("--base", tmp_path / "base", "--name", "x"): "`--name` (='x') is of an adapter on top of a fusion.",
    }
    for arguments, message in refused.items():
        done = command(*arguments, *data, "--output", tmp_path / "three")
        assert done.exit_code == 1
        assert message in " ".join(done.output.split())

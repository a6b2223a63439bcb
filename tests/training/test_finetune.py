"""Fine-tuning: what is trained and what is not, what is saved, resuming, and the errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from loraflow import BaseOptions, FitConfig, FusedModel
from loraflow.adapters import load_adapter
from loraflow.cli import app
from loraflow.errors import AdapterError, DataError, LoraflowError
from loraflow.training.checkpoints import COMPLETE, complete_checkpoints
from loraflow.training.config import LoraSettings
from loraflow.training.learners.finetune import TrainedAdapter, finetune
from tests.tiny import (
    byte_tokenizer,
    edit_config,
    edit_tensors,
    number_tokenizer,
    peft_model,
    random_ids,
    save_adapter,
    tiny_model,
)
from tests.training.test_fit import reversals

QUICK = FitConfig(epochs=2, learning_rate=1e-2)
SMALL = LoraSettings(r=4, alpha=8, dropout=0.0)


@pytest.fixture
def console(tmp_path):
    return Console(file=(tmp_path / "log.txt").open("w"))


@pytest.fixture
def run(tmp_path, console):
    """Fine-tune a tiny model; its output is `tmp_path / "tuned"`."""

    def call(examples=None, base=None, output="tuned", **arguments):
        settings = {"config": QUICK, "tokenizer": number_tokenizer(), "console": console, **arguments}
        if "adapter" not in settings:
            settings.setdefault("lora", SMALL)
        return finetune(base or tiny_model(), examples or reversals(16), tmp_path / output, **settings)

    return call


def test_a_new_adapter_learns(run):
    result = run(reversals(40), config=FitConfig(epochs=8, learning_rate=1e-2))
    first = [loss for _, loss in result.log[:10]]
    assert result.train_loss < sum(first) / 10 - 0.1
    assert (result.steps, result.kept_step) == (80, 80)
    assert result.parameters == load_adapter("tuned", result.output).parameters


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}])
def test_a_loaded_base_is_given_back_as_it_was(run, tmp_path, existing, settings):
    base = tiny_model()
    base.lm_head.weight.requires_grad_(False)
    base.train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    types = {name: type(module) for name, module in base.named_modules()}
    arguments = {"adapter": save_adapter(base, tmp_path / "old")} if existing else {}
    run(base=base, config=FitConfig(epochs=1, learning_rate=1e-2, **settings), **arguments)
    assert {name: type(module) for name, module in base.named_modules()} == types
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == flags
    assert base.training
    assert not base.is_gradient_checkpointing
    assert base.config.use_cache
    assert not hasattr(base, "peft_config")


def test_a_target_that_peft_refuses_leaves_nothing_in_the_base(run):
    base = tiny_model()
    types = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(LoraflowError, match="`target_modules`"):
        run(base=base, lora=LoraSettings(r=2, target_modules=["q_proj", "mlp"]))
    assert {name: type(module) for name, module in base.named_modules()} == types
    assert not hasattr(base, "peft_config")
    run(base=base)


def test_an_existing_adapter_is_trained_further_and_its_file_stays(run, tmp_path):
    old = Path(save_adapter(tiny_model(), tmp_path / "old", r=3))
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    result = run(adapter=old)
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    first, tuned = load_adapter("old", old), load_adapter("tuned", result.output)
    assert tuned.ranks == (3,)
    assert tuned.modules.keys() == first.modules.keys()
    assert all(not torch.equal(tuned.modules[name].lora_A, m.lora_A) for name, m in first.modules.items())
    # With a learning rate of almost nothing it is the old one: training starts there.
    same = load_adapter("same", run(adapter=old, output="same", config=FitConfig(epochs=1, learning_rate=1e-12)).output)
    for name, module in first.modules.items():
        torch.testing.assert_close(same.modules[name].lora_B, module.lora_B)


def test_an_adapter_that_peft_would_read_otherwise_is_not_trained_further(run, tmp_path):
    old = save_adapter(tiny_model(), tmp_path / "old", ["q_proj"])

    def without_prefix(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)

    edit_tensors(old, without_prefix)
    with pytest.raises(LoraflowError, match=r"further: PEFT reads '.*q_proj.lora_A.weight' otherwise than a fusion"):
        run(adapter=old)
    # It takes q_proj and v_proj where nothing is said.
    old = save_adapter(tiny_model(), tmp_path / "open", ["q_proj"])
    edit_config(old, target_modules=None)
    with pytest.raises(LoraflowError, match=r"further: PEFT reads '.*v_proj.lora_A.weight' otherwise than a fusion"):
        run(adapter=old)


@pytest.mark.parametrize("config", [{"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}], ids=["bias", "modules"])
def test_an_adapter_that_trains_parts_of_the_base_is_not_trained_further(run, tmp_path, config):
    base = tiny_model("opt")
    old = save_adapter(base, tmp_path / "old", ["q_proj"], **config)
    with pytest.raises(LoraflowError, match=r"cannot be trained further: PEFT would train parts of the base with it"):
        run(base=base, adapter=old)
    assert not hasattr(base, "peft_config")


def test_the_result_is_the_same_adapter_for_peft_and_for_a_fusion(run):
    output = run().output
    assert {file.name for file in output.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert config["target_modules"] == sorted(config["target_modules"])
    ids = random_ids()
    with torch.no_grad():
        expected = peft_model(tiny_model(), str(output))(ids).logits
        found = FusedModel.from_adapters(tiny_model(), {"tuned": output}, "tuned")(ids).logits
        assert not torch.allclose(expected, tiny_model()(ids).logits, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_by_default_all_linear_modules_are_adapted_as_in_the_paper(run):
    adapter = load_adapter("tuned", run(lora=None, config=FitConfig(epochs=1)).output)
    assert (adapter.config.r, adapter.config.lora_alpha, adapter.config.lora_dropout) == (64, 16, 0.1)
    assert len(adapter.modules) == 3 * 7
    assert not any("lm_head" in name for name in adapter.modules)


def test_only_named_modules_are_adapted(run):
    targets = LoraSettings(r=2, target_modules=["q_proj", "down_proj"])
    adapter = load_adapter("tuned", run(lora=targets).output)
    assert {name.rpartition(".")[2] for name in adapter.modules} == {"q_proj", "down_proj"}


def test_the_loss_is_on_the_response_only(run, monkeypatch):
    seen = []
    forward = TrainedAdapter.forward

    def watch(self, **inputs):
        seen.append(inputs)
        return forward(self, **inputs)

    monkeypatch.setattr(TrainedAdapter, "forward", watch)
    result = run([{"prompt": "5 6 7", "completion": "8 9"}], config=FitConfig(epochs=1, learning_rate=1e-12))
    # The completion ends with the end token.
    assert seen[0]["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2]]
    assert seen[0]["labels"].tolist() == [[-100, -100, -100, 8, 9, 2]]
    with torch.no_grad():
        logits = tiny_model()(torch.tensor([[5, 6, 7, 8, 9, 2]])).logits[0, 2:-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([8, 9, 2]))
    assert result.train_loss == pytest.approx(expected.item(), rel=1e-3)


def test_keeps_the_best_checkpoint_on_dev(run, tmp_path):
    dev = reversals(8, seed=1)
    result = run(reversals(24), dev=dev, config=FitConfig(epochs=4, learning_rate=0.05), checkpoints=tmp_path / "run")
    state = json.loads((complete_checkpoints(tmp_path / "run")[-1] / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert result.kept_step == min(losses, key=losses.__getitem__)
    assert result.dev_loss == min(losses.values())
    again = run(
        reversals(4), adapter=result.output, output="again", dev=dev, config=FitConfig(epochs=1, learning_rate=1e-12)
    )
    assert again.dev_loss == pytest.approx(result.dev_loss, rel=1e-4), "the saved weights are not the kept ones"


def test_the_same_seed_gives_the_same_adapter(run):
    lora = LoraSettings(r=4, alpha=8, dropout=0.1)
    digests = [
        load_adapter("x", run(output=f"out{number}", lora=lora, config=FitConfig(epochs=1, seed=seed)).output).digest
        for number, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("existing", [False, True])
def test_resumes_to_the_uninterrupted_result(run, tmp_path, existing):
    config = FitConfig(epochs=3, learning_rate=1e-2, checkpoint_steps=2)
    kind = {"adapter": save_adapter(tiny_model(), tmp_path / "old")} if existing else {"lora": LoraSettings(r=4)}
    common = {"config": config, **kind}
    expected = run(reversals(20), output="whole", checkpoints=tmp_path / "run", **common)
    newest = complete_checkpoints(tmp_path / "run")[-1]
    # A crash while the newest was written: there, but not whole.
    (newest / COMPLETE).unlink()
    (newest / "optimizer.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "run", tmp_path / "interrupted")
    result = run(reversals(20), output="resumed", checkpoints=tmp_path / "interrupted", resume=True, **common)
    assert result.log == expected.log
    assert load_adapter("x", result.output).digest == load_adapter("x", expected.output).digest


def test_resuming_another_run_is_refused(run, tmp_path):
    run(checkpoints=tmp_path / "run")
    for changed, arguments in {
        "r": {"lora": LoraSettings(r=2)},
        "epochs": {"config": FitConfig(epochs=3)},
        "data": {"examples": reversals(8, seed=9)},
    }.items():
        with pytest.raises(LoraflowError, match=f"another `{changed}`"):
            run(checkpoints=tmp_path / "run", resume=True, **arguments)


def test_an_interrupted_run_leaves_no_adapter_and_a_failed_one_the_old(run, tmp_path, monkeypatch):
    digest = load_adapter("x", run().output).digest

    def crash(self, **inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainedAdapter, "forward", crash)
    base = tiny_model()
    for output in ("tuned", "other"):
        with pytest.raises(KeyboardInterrupt):
            run(base=base, output=output)
    assert load_adapter("x", tmp_path / "tuned").digest == digest
    assert not (tmp_path / "other").exists()
    assert type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_an_adapter_on_a_half_precision_base_is_trained_in_full_precision(run):
    output = run(base=tiny_model(dtype=torch.bfloat16)).output
    assert {m.lora_A.dtype for m in load_adapter("tuned", output).modules.values()} == {torch.float32}


@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
def test_trains_on_a_quantised_base(run, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(tmp_path / "base")
    options = BaseOptions(quantization=quantization, dtype=torch.float32)
    result = run(base=tmp_path / "base", options=options)
    model = FusedModel.from_adapters(tmp_path / "base", {"tuned": result.output}, "tuned", options=options)
    assert torch.isfinite(model(random_ids()).logits).all()


def test_bad_arguments(run, tmp_path):
    old = save_adapter(tiny_model(), tmp_path / "old")
    (tmp_path / "file").touch()
    for arguments, message in [
        ({"adapter": old, "lora": SMALL}, "`lora` describes a new adapter, and `adapter` is an existing one"),
        ({"adapter": old, "output": "old"}, "is the adapter that is trained further"),
        ({"output": "file"}, "is a file. Give a directory"),
        ({"config": FitConfig(adapter_dropout=0.1)}, r"`adapter_dropout` \(=0.1\) is for fitting a fusion"),
        ({"lora": LoraSettings(target_modules=["no_proj"])}, r"`target_modules` \(=\['no_proj'\]\): "),
        ({"tokenizer": None}, "needs a tokenizer"),
    ]:
        with pytest.raises(LoraflowError, match=message):
            run(**arguments)
    with pytest.raises(LoraflowError, match="`options` say how a base is loaded"):
        run(options=BaseOptions())
    with pytest.raises(AdapterError, match="features, but the base's maps"):
        run(base=tiny_model(hidden_size=16, head_dim=4), adapter=old)
    with pytest.raises(DataError, match="example 0: the prompt has"):
        run(config=FitConfig(max_length=2))
    with pytest.raises(LoraflowError, match="is fused already"):
        run(base=FusedModel.from_adapters(tiny_model(), {"a": old}).base_model)


def test_bad_settings():
    for settings, message in [
        ({"r": 0}, r"`r` \(=0\) must be a whole number of at least 1"),
        ({"alpha": 0}, r"`alpha` \(=0\) must be greater than 0"),
        ({"alpha": float("inf")}, r"`alpha` \(=inf\) must be greater than 0, and finite"),
        ({"alpha": float("nan")}, r"`alpha` \(=nan\) must be greater than 0, and finite"),
        ({"dropout": 1.0}, r"`dropout` \(=1.0\) must be at least 0 and less than 1"),
        ({"target_modules": []}, "`target_modules` names no module"),
    ]:
        with pytest.raises(LoraflowError, match=message):
            LoraSettings(**settings)


def test_a_checkpoint_of_another_adapter_is_refused():
    adapted = peft_model_of(tiny_model())
    with pytest.raises(LoraflowError, match="The checkpoint is of another adapter"):
        adapted.load_state_dict({"nothing": torch.zeros(1)})


def peft_model_of(base):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    return TrainedAdapter(get_peft_model(base, config), number_tokenizer(), None)


# The command line.


@pytest.fixture
def world(tmp_path):
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(base, tmp_path / "old")
    for name, count in (("train", 12), ("dev", 4)):
        lines = [json.dumps(record) for record in reversals(count, seed=count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def command(world, *arguments):
    sources = ["--base", world / "base", "--data", world / "train.jsonl", "--dev", world / "dev.jsonl"]
    recipe = ["--epochs", 1, "--learning-rate", 1e-2, "--dtype", "float32", "--device", "cpu"]
    return CliRunner().invoke(app, [str(a) for a in ("finetune", *sources, *recipe, *arguments)])


def test_the_command_makes_a_new_adapter(world):
    result = command(world, "--output", world / "new", "--rank", 2, "--alpha", 4, "--target-modules", "q_proj,v_proj")
    assert result.exit_code == 0, result.output
    adapter = load_adapter("new", world / "new")
    assert (adapter.ranks, adapter.config.lora_alpha, len(adapter.modules)) == ((2,), 4, 6)
    assert not (world / "new" / "checkpoints").exists()


def test_the_command_trains_an_existing_adapter_further(world):
    result = command(world, "--output", world / "more", "--adapter", world / "old", "--keep-checkpoints")
    assert result.exit_code == 0, result.output
    assert load_adapter("more", world / "more").ranks == (4,)
    again = command(world, "--output", world / "more", "--adapter", world / "old", "--resume")
    assert again.exit_code == 0, again.output


def test_the_command_says_what_excludes_what(world):
    result = command(world, "--output", world / "x", "--adapter", world / "old", "--rank", 8)
    assert result.exit_code == 1
    assert "`--rank` describes a new adapter" in result.output

"""A fusion folded into its base: an ordinary checkpoint that gives the fusion's logits, and says what rounding cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraflow import BaseOptions, FusedModel, LoraFlow, PromptFormat
from loraflow.cli.export import describe_checkpoint
from loraflow.core.stack import dense_weight
from loraflow.errors import LoraflowError, MethodError
from loraflow.export import checkpoint, export_merged
from loraflow.merging import make_merge, merge_adapters
from tests.tiny import CHATML, chat_tokenizer, random_adapter, random_ids, relative_error, save_adapter, tiny_model

DOUBLE = torch.float64


def fused(architecture="llama", method="average", dtype=DOUBLE, kinds=("plain", "rslora"), **changes):
    base = tiny_model(architecture, dtype, **changes)
    adapters = {
        name: random_adapter(base, name, r=i + 2, kind=kind, seed=i)
        for i, (name, kind) in enumerate(zip(("zh", "math"), kinds, strict=True))
    }
    return FusedModel.from_adapters(base, adapters, method)


def load(directory: Path, dtype=DOUBLE):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    # The grouped kernels of the experts know no float64.
    model.config._experts_implementation = "eager"
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "kinds", "changes"),
    [
        ("llama", ("plain", "rslora"), {}),
        ("llama", ("plain", "dora"), {"tie_word_embeddings": True}),
        ("gpt2", ("lora_bias", "plain"), {}),
        ("gpt2", ("dora", "dora"), {}),
        ("mixtral", ("plain", "plain"), {}),
    ],
)
def test_the_checkpoint_gives_the_fusions_logits(tmp_path, architecture, kinds, changes):
    model = fused(architecture, {"zh": 0.7, "math": -0.4}, kinds=kinds, **changes)
    ids = random_ids()
    expected = model(ids).logits
    report = export_merged(model, tmp_path / "out", max_shard_size="20KB")
    assert report.shards > 1
    assert report.rounding.error < 1e-14
    assert not report.tokenizer
    assert relative_error(load(tmp_path / "out")(ids).logits, expected) < 1e-12
    assert torch.equal(model(ids).logits, expected)
    with model.using("base"):
        assert relative_error(model(ids).logits, expected) > 1e-3, "the adapters do nothing"


@torch.no_grad()
def test_a_merge_is_folded_in(tmp_path):
    model = fused()
    merge = make_merge("core-iso-c")
    report = export_merged(model, tmp_path / "out", merge=merge)
    alone = merge_adapters(model.adapters, merge, dtype=DOUBLE)
    expected = FusedModel.from_adapters(tiny_model(dtype=DOUBLE), {"one": alone.adapter}, "one")
    assert relative_error(load(tmp_path / "out")(random_ids()).logits, expected(random_ids()).logits) < 1e-12
    assert report.folded.from_sum == alone.from_sum
    assert "by the merge `core-iso-c`" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_rounding_is_measured(tmp_path):
    model = fused(dtype=torch.bfloat16, method={"zh": 0.01})
    before = {name: dense_weight(model.base_model.get_submodule(name)) for name in model.adapters[0].modules}
    report = export_merged(model, tmp_path / "out")
    assert report.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    saved, cut, whole = load(tmp_path / "out", torch.bfloat16), 0.0, 0.0
    for name, module in model.adapters[0].modules.items():
        change = 0.01 * module.scaling * module.lora_B.double() @ module.lora_A.double()
        found = saved.get_submodule(name).weight.double()
        cut += (found - before[name].double() - change).square().sum().item()
        whole += change.square().sum().item()
    assert report.rounding.error == pytest.approx((cut / whole) ** 0.5, rel=1e-6)
    # Such small updates are mostly lost in bfloat16, and that is what the report is for.
    assert report.rounding.error > 0.1


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
def test_a_quantised_base_is_written_dequantised(tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    base = tiny_model(hidden_size=64, intermediate_size=64, head_dim=16)
    base.save_pretrained(tmp_path / "base")
    sources = {name: save_adapter(base, tmp_path / name, seed=i) for i, name in enumerate(("zh", "math"))}
    options = BaseOptions(dtype="float32", quantization=quantization)
    model = FusedModel.from_adapters(tmp_path / "base", sources, "average", options=options)
    report = export_merged(model, tmp_path / "out")
    assert report.dequantised is not None
    assert quantization.removeprefix("bnb-") in report.dequantised
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    saved = load(tmp_path / "out", report.dtype)
    for name in model.adapters[0].modules:
        linear = model.base_model.get_submodule(name)
        change = sum(a.modules[name].scaling * a.modules[name].lora_B @ a.modules[name].lora_A for a in model.adapters)
        expected = dense_weight(linear).float() + change / 2
        assert relative_error(saved.get_submodule(name).weight, expected) < (
            1e-6 if report.dtype == torch.float32 else 0.01
        )
    ids = random_ids()
    # 8-bit linears quantise what they read, too.
    tolerance = 1e-4 if quantization == "bnb-4bit" else 0.1
    assert relative_error(saved(ids).logits, model(ids).logits) < tolerance


def test_tokenizer_endings_and_chat_template_come_along(tmp_path):
    tokenizer = chat_tokenizer(template=None)
    base = tiny_model(vocab_size=len(tokenizer))
    adapters = {name: random_adapter(base, name, seed=i) for i, name in enumerate(("zh", "math"))}
    prompt = PromptFormat(chat_template=CHATML, system_prompt="Be brief.")
    model = FusedModel.from_adapters(base, adapters, "average", tokenizer=tokenizer, prompt=prompt)
    report = export_merged(model, tmp_path / "out")
    assert report.prompt == "system prompt"
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.chat_template == CHATML
    assert tokenizer.chat_template is None
    assert saved("1 2")["input_ids"] == tokenizer("1 2")["input_ids"]
    ends = load(tmp_path / "out", torch.float32).generation_config.eos_token_id
    assert set(ends) == set(model.endings.token_ids)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends


def test_what_is_there_is_kept(tmp_path):
    model, out = fused(), tmp_path / "out"
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraflowError, match="file is a file"):
        export_merged(model, tmp_path / "file")
    out.mkdir()
    (out / "notes.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(LoraflowError, match=r"holds 'notes.txt' and no checkpoint"):
            export_merged(model, out, overwrite=overwrite)
    (out / "notes.txt").unlink()
    export_merged(model, out, max_shard_size="20KB")
    with pytest.raises(LoraflowError, match=r"holds a checkpoint already.*`overwrite=True`"):
        export_merged(model, out)
    other = fused(method="zh")
    report = export_merged(other, out, overwrite=True)
    assert report.shards == 1
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    with torch.no_grad():
        assert relative_error(load(out)(random_ids()).logits, other(random_ids()).logits) < 1e-12
    assert {path.name for path in tmp_path.iterdir()} == {"file", "out"}


@pytest.mark.parametrize("name", ["notes.txt", "fusion.safetensors", "adapter_config.json", "README.md"])
def test_what_is_no_checkpoints_keeps_a_directory(tmp_path, name):
    model, out = fused(), tmp_path / "out"
    export_merged(model, out)
    (out / name).write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(LoraflowError, match=rf"holds '{name}' \(1 such\), which is no part of a checkpoint.*Move that"):
        export_merged(model, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_replaced_checkpoint_leaves_nothing_behind(tmp_path):
    model, out = fused(), tmp_path / "out"
    new = export_merged(model, tmp_path / "new").directory
    export_merged(model, out)
    for old in ("chat_template.jinja", "tokenizer.json", "vocab.json", "pytorch_model.bin", "added_tokens.json"):
        (out / old).write_text("{}")
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tool.jinja").write_text("x")
    export_merged(model, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {path.name for path in new.iterdir()}


def test_settings_of_sampling_that_does_not_happen_are_left_out_and_named(tmp_path, monkeypatch):
    model = fused()
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    report = export_merged(model, tmp_path / "out")
    assert report.unsampled == ("temperature",)
    assert "temperature" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert model.generation_config.temperature == 0.6
    assert any("has temperature: left out" in line for line in describe_checkpoint(report))
    # What transformers would refuse at the end is refused before anything is computed.
    model.generation_config.max_new_tokens = -1
    monkeypatch.setattr(checkpoint, "fold", lambda *args, **options: pytest.fail("it was folded"))
    with pytest.raises(
        LoraflowError, match=r"generation configuration cannot be written .*`max_new_tokens`.* Correct it"
    ):
        export_merged(model, tmp_path / "other")


def test_the_card_says_that_weights_are_means(tmp_path):
    tokenizer = chat_tokenizer()
    base = tiny_model(vocab_size=len(tokenizer))
    adapters = {name: random_adapter(base, name, seed=i) for i, name in enumerate(("zh", "math"))}
    model = FusedModel.from_adapters(base, adapters, LoraFlow(), tokenizer=tokenizer)
    report = export_merged(model, tmp_path / "out", mean_weights_on=[{"prompt": "1", "completion": "2"}])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Its weights are the means of that method's on 1 examples. Loss per response token there" in card
    assert f"{report.folded.cost.exported_loss:.4f} with the means. Rounding" in card


def test_the_base_and_the_adapters_are_never_written_to(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    sources = {name: save_adapter(base, tmp_path / name, seed=i) for i, name in enumerate(("zh", "math"))}
    model = FusedModel.from_adapters(tmp_path / "base", sources, "average")
    with pytest.raises(LoraflowError, match="is the base of this fusion, which is never written to"):
        export_merged(model, tmp_path / "base", overwrite=True)
    with pytest.raises(LoraflowError, match="is the adapter 'zh' of this fusion"):
        export_merged(model, tmp_path / "zh", overwrite=True)


def test_what_cannot_be_folded_is_refused(tmp_path):
    with pytest.raises(MethodError, match=r"'lora-flow' weighs every token anew.*`mean_weights_on=examples`"):
        export_merged(fused(method=LoraFlow()), tmp_path / "out")
    with pytest.raises(LoraflowError, match=r"has no bias in LlamaForCausalLM.*Export it as an adapter instead"):
        export_merged(fused(kinds=("lora_bias", "plain")), tmp_path / "out")
    with pytest.raises(LoraflowError, match=r"has values that float16 cannot represent\. Load the base in a wider"):
        export_merged(fused(dtype=torch.float16, method={"zh": 1e6}), tmp_path / "out")
    with pytest.raises(MethodError, match=r"`mean_weights_on` averages a method's weights\. Leave one of them out"):
        export_merged(
            fused(), tmp_path / "out", merge=make_merge("sum"), mean_weights_on=[{"prompt": "", "completion": ""}]
        )
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_all_there_is_refused(tmp_path):
    model = fused()
    head = model.base_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.to("meta"))
    with pytest.raises(LoraflowError, match=r"'lm_head\.weight' of the base is kept away .* \(`device='cpu'`"):
        export_merged(model, tmp_path / "out")
    head.register_parameter("weight", None)
    with pytest.raises(
        LoraflowError, match=r"has no 'lm_head\.weight' in full precision \(1 such\), which a checkpoint"
    ):
        export_merged(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()

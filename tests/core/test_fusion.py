"""What a fusion refuses: adapters of transformers' own around the fused ones, and any use after it was taken out.

And what several threads see of it, while one of them changes who weighs.
"""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from loraflow import Arrow, FusedModel
from loraflow.adapters import load_adapter
from loraflow.core.attach import Attachment
from loraflow.core.fuse import BuiltLayer
from loraflow.errors import ArchitectureError, LoraflowError
from loraflow.methods import Static
from loraflow.training import fit
from tests.tiny import random_ids, save_adapter, tiny_model


@pytest.fixture
def adapter(tmp_path):
    return str(save_adapter(tiny_model(), tmp_path / "a"))


@pytest.fixture
def model(adapter):
    return FusedModel.from_adapters(tiny_model(), {"a": adapter}, "lora-flow")


PEFT_CALLS = {
    "load_adapter": lambda model, path: model.load_adapter(path),
    "add_adapter": lambda model, path: model.add_adapter(LoraConfig(target_modules=["q_proj"])),
    "set_adapter": lambda model, path: model.set_adapter("default"),
    "enable_adapters": lambda model, path: model.enable_adapters(),
    "disable_adapters": lambda model, path: model.disable_adapters(),
    "delete_adapter": lambda model, path: model.delete_adapter("default"),
}


@pytest.mark.parametrize("name", PEFT_CALLS)
def test_adapters_of_transformers_own_are_refused(model, adapter, name):
    with torch.no_grad(), model.using("base"):
        expected = model(random_ids()).logits
    with pytest.raises(LoraflowError, match=rf"`{name}` is of transformers' own adapters.*using\(\"base\"\)"):
        PEFT_CALLS[name](model, adapter)
    with torch.no_grad(), model.using("base"):
        assert torch.equal(model(random_ids()).logits, expected)
        assert torch.equal(expected, tiny_model()(random_ids()).logits)


@pytest.mark.parametrize("how", ["transformers", "peft"])
def test_a_base_with_adapters_in_it_is_refused(adapter, how, tmp_path):
    base = tiny_model()
    if how == "peft":
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    else:
        base.save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.load_adapter(adapter)
    with pytest.raises(LoraflowError, match=r"has PEFT adapters in it already.*name the adapters in"):
        FusedModel.from_adapters(base, {"a": adapter})


USES = {
    "forward": lambda model, path: model(random_ids()),
    "generate": lambda model, path: model.generate(random_ids(), max_new_tokens=1),
    "rows": lambda model, path: model(random_ids(), methods=["a", None]),
    "trace": lambda model, path: model.trace(random_ids()),
    "weigh": lambda model, path: model.weigh(random_ids(), method="qa-flora"),
    "set_method": lambda model, path: model.set_method("average"),
    "fit": lambda model, path: fit(model, [{"prompt": "1", "completion": "2"}]),
    "save": lambda model, path: model.save_pretrained(path),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["transformers", "peft"])
def test_adapters_put_around_the_fused_ones_later_are_refused(model, adapter, tmp_path, how, use):
    if how == "peft":
        get_peft_model(model.base_model, LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM"))
    else:
        model.base_model.load_adapter(adapter)
    with pytest.raises(LoraflowError, match=r"The fused 'self_attn\.[a-z]_proj' is inside a Linear now: something was"):
        USES[use](model, tmp_path / "saved")


@pytest.mark.parametrize("use", USES)
def test_after_unloading_nothing_pretends_to_be_the_fusion(model, tmp_path, use):
    base = model.unload()
    assert model.method.name == "base"
    assert model.gates == model.state_dict() == {}
    with pytest.raises(LoraflowError, match=r"were taken out of this model with `unload\(\)`. Fuse them again"):
        USES[use](model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert torch.equal(base(random_ids()).logits, tiny_model()(random_ids()).logits)


# ---- Turns -------------------------------------------------------------------------------------------------------


def started(call):
    """A call in a thread of its own, which has had time to come as far as it can."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join(0.2)
    return thread, results


CALLS = {
    "forward": lambda model: model(random_ids()).logits.shape[0],
    "generate": lambda model: len(model.generate(random_ids(), max_new_tokens=1)),
    "weigh": lambda model: len(model.weigh(random_ids(), method="qa-flora")),
    "rows": lambda model: model(random_ids(), methods=[{"a": 1.0}, None]).logits.shape[0],
    "gates": lambda model: (model.attachment.make_gates(Static({"a": 1.0})), len(random_ids()))[1],
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_wait_while_adapters_are_exchanged(model, tmp_path, monkeypatch, call):
    both = [*model.adapters, load_adapter("b", str(save_adapter(tiny_model(), tmp_path / "b", seed=1)))]
    again, calls = Attachment.again, []

    def slow(attachment, built):
        calls.append(started(lambda: CALLS[call](model)))
        assert calls[-1][0].is_alive()
        return again(attachment, built)

    monkeypatch.setattr(Attachment, "again", slow)
    model.exchange_adapters(both)
    thread, results = calls[0]
    thread.join(60)
    assert results == [len(random_ids())]


@pytest.mark.parametrize("call", CALLS)
def test_calls_go_on_while_other_adapters_are_built(model, tmp_path, monkeypatch, call):
    model.set_method("base")
    both = [*model.adapters, load_adapter("b", str(save_adapter(tiny_model(), tmp_path / "b", seed=1)))]
    build, calls = Attachment.build, []

    def slow(attachment, adapters):
        built = build(attachment, adapters)
        thread, results = started(lambda: CALLS[call](model))
        thread.join(60)
        calls.append((results, model.adapter_names))
        return built

    monkeypatch.setattr(Attachment, "build", slow)
    model.exchange_adapters(both)
    assert calls == [([len(random_ids())], ["a"])]
    assert model.adapter_names == ["a", "b"]


def test_what_cannot_be_put_in_leaves_the_others(model, tmp_path, monkeypatch):
    model.set_method("base")
    ids, before = random_ids(), model.adapter_names
    other = load_adapter("b", str(save_adapter(tiny_model(), tmp_path / "b", seed=1)))
    with model.using("a"):
        expected = model(ids).logits
    fuse, calls = BuiltLayer.fuse, itertools.count()

    def fails_at_the_second(layer):
        if next(calls) == 1:
            raise ArchitectureError("no room")
        fuse(layer)

    monkeypatch.setattr(BuiltLayer, "fuse", fails_at_the_second)
    with pytest.raises(ArchitectureError, match="no room"):
        model.exchange_adapters([other])
    assert model.adapter_names == before
    with model.using("a"):
        assert torch.equal(model(ids).logits, expected)


def test_who_weighs_changes_between_calls_only(model):
    before = model.method
    with model.attachment.turn():
        thread, _ = started(lambda: model.set_method("average"))
        assert thread.is_alive()
        assert model.method is before
    thread.join(60)
    assert model.method.name == "average"


# ---- As the base ---------------------------------------------------------------------------------------------------


def test_generate_takes_what_transformers_own_takes(model):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = random_ids()
    assert torch.equal(model.generate(ids, config), model.generate(inputs=ids, generation_config=config))
    assert torch.equal(model.generate(ids, config), model.generate(ids, config, methods=[None] * len(ids)))
    # The padding token that the configuration names is no part of a prompt.
    model.generation_config.pad_token_id = None
    ids = torch.cat([torch.zeros_like(ids[:, :2]), ids.clamp(min=1)], dim=1)
    with model.using("qa-flora"):
        assert torch.equal(model.generate(ids, config), model.generate(ids, config, attention_mask=(ids > 0).long()))


def test_gates_that_are_set_aside_move_with_the_model(model):
    with model.using("base"):
        model.to(torch.float64)
    assert {gate.dtype for gate in model.state_dict().values()} == {torch.float64}
    with torch.no_grad():
        assert model(random_ids()).logits.dtype == torch.float64


def test_no_more_gates_are_kept_than_are_of_use(model):
    with torch.no_grad():
        for step in range(20):
            model(random_ids(), methods=[Arrow(temperature=1.0 + step), None])
    assert len(model._choice._made) == 16

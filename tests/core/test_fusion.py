"""What a fusion refuses: adapters of transformers' own around the fused ones, and any use after it was taken out."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loraflow import FusedModel
from loraflow.errors import LoraflowError
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

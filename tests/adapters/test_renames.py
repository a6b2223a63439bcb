"""Adapters saved under old names of modules: read as PEFT reads them with today's transformers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from loraflow import FusedModel
from loraflow.adapters import load_adapter, match_adapter
from loraflow.errors import AdapterError
from tests.adapters.checks import assert_gives_what_peft_gives, refusal
from tests.tiny import edit_config, edit_tensors, random_ids, save_adapter, tiny_model

PREFIX = "base_model.model."
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TARGETS = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def gemma3():
    """A model of text and images."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=TEXT, vision_config=vision, mm_tokens_per_image=4)
    return randomised(AutoModelForImageTextToText.from_config(config))


@pytest.fixture(scope="module")
def nemotron():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "nemotron_h",
        **{**TEXT, "num_hidden_layers": 4},
        hybrid_override_pattern="M*-*",
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
    )
    return randomised(AutoModelForCausalLM.from_config(config))


def rename(old, new, only=""):
    """An edit that puts one part of each key in another's place."""

    def edit(tensors):
        for key in list(tensors):
            if only in key:
                assert old in key
                tensors[key.replace(old, new, 1)] = tensors.pop(key)

    return edit


@pytest.fixture
def multimodal(gemma3, tmp_path):
    return save_adapter(gemma3, tmp_path / "adapter", TARGETS)


OLD = ("model.model.language_model.layers", "model.language_model.model.layers")


def test_an_adapter_by_todays_names_is_as_before(gemma3, multimodal):
    adapter = load_adapter("one", multimodal)
    found = match_adapter(adapter, gemma3).modules
    assert found.keys() == adapter.modules.keys()
    assert all(found[name].lora_A is module.lora_A for name, module in adapter.modules.items())


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "lora_bias"])
def test_an_adapter_from_before_the_move_of_language_models_gives_what_peft_gives(gemma3, tmp_path, config):
    directory = save_adapter(gemma3, tmp_path, TARGETS, **config)
    expected = match_adapter(load_adapter("one", directory), gemma3).modules
    edit_tensors(directory, rename(*OLD))
    found = match_adapter(load_adapter("one", directory), gemma3)
    assert found.modules.keys() == expected.keys()
    assert all(torch.equal(found.modules[name].lora_B, expected[name].lora_B) for name in expected)
    assert_gives_what_peft_gives(gemma3, directory)


def test_patterns_are_taken_by_the_new_names_as_peft_takes_them(gemma3, multimodal):
    edit_tensors(multimodal, rename(*OLD))
    edit_config(
        multimodal,
        alpha_pattern={r"^language_model\.model\.layers\.0\..*": 99, r"^model\.language_model\.layers\.1\..*": 3},
    )
    scalings = {n: m.scaling for n, m in match_adapter(load_adapter("one", multimodal), gemma3).modules.items()}
    assert scalings["model.language_model.layers.0.self_attn.q_proj"] == 8 / 4
    assert scalings["model.language_model.layers.1.self_attn.q_proj"] == 3 / 4
    assert_gives_what_peft_gives(gemma3, multimodal)


def test_an_old_and_a_new_name_of_one_module_are_refused_with_both(gemma3, multimodal):
    new = PREFIX + "model.language_model.layers.0.self_attn.q_proj.lora_B.weight"
    old = PREFIX + "language_model.model.layers.0.self_attn.q_proj"

    def both(tensors):
        tensors[f"{old}.lora_A.weight"] = torch.randn(4, 32)
        tensors[f"{old}.lora_B.weight"] = torch.randn(32, 4)

    edit_tensors(multimodal, both)
    message = refusal(multimodal, gemma3)
    assert f"'{old}.lora_" in message
    assert f"'{new.rpartition('.lora_B')[0]}.lora_" in message
    assert "of Gemma3ForConditionalGeneration, and which of them counts is not said" in message


def test_the_vision_tower_is_never_left_out_in_silence(gemma3, tmp_path):
    directory = save_adapter(gemma3, tmp_path, ["q_proj", "v_proj"])
    assert "targets 'model.vision_tower.encoder.layers.0.self_attn.q_proj', which is outside" in refusal(
        directory, gemma3
    )
    # PEFT renames the language model's keys, and finds no place for the tower's.
    edit_tensors(directory, rename(*OLD, only="language_model"))
    edit_tensors(directory, rename("model.model.vision_tower", "model.vision_tower", only="vision_tower"))
    assert (
        "'base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight' matches no linear"
        in refusal(directory, gemma3)
    )


def test_nemotrons_old_backbone_gives_what_peft_gives(nemotron, tmp_path):
    directory = save_adapter(nemotron, tmp_path, ["q_proj", "v_proj"])
    edit_tensors(directory, rename("model.model.", "model.backbone."))
    assert_gives_what_peft_gives(nemotron, directory)


def test_on_a_text_model_names_of_the_multimodal_one_are_refused_as_peft_finds_none(multimodal):
    message = refusal(multimodal, tiny_model("gemma3_text"))
    assert "matches no linear module of Gemma3ForCausalLM" in message
    assert "The nearest is 'model.layers.0.mlp.down_proj'." in message


class TestTablesOfModels:
    """Models with code of their own bring tables of old names, which PEFT goes by."""

    @pytest.fixture
    def base(self):
        base = tiny_model()
        type(base)._checkpoint_conversion_mapping = {r"^transformer\.(?=h)": "model.", r"^decoder": "model"}
        yield base
        del type(base)._checkpoint_conversion_mapping

    def test_they_are_applied_as_peft_applies_them(self, base, saved):
        edit_tensors(saved, rename("model.model.layers", "model.decoder.layers"))
        assert_gives_what_peft_gives(base, saved)

    def test_two_names_of_one_are_refused(self, base, saved):
        def both(tensors):
            for key in list(tensors):
                tensors[key.replace("model.layers", "decoder.layers")] = tensors[key].clone()

        edit_tensors(saved, both)
        message = refusal(saved, base)
        assert f"'{PREFIX}decoder.layers" in message
        assert f"'{PREFIX}model.layers" in message
        assert "and which of them counts is not said" in message


def test_trouble_with_pefts_renaming_is_reported(gemma3, multimodal, monkeypatch):
    def broken(*_):
        raise ValueError("cannot.")

    monkeypatch.setattr(
        "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers", broken
    )
    adapter = load_adapter("one", multimodal)
    with pytest.raises(AdapterError, match="PEFT cannot rename its keys for Gemma3ForConditionalGeneration: cannot"):
        match_adapter(adapter, gemma3)


@torch.no_grad()
def test_a_fusion_of_a_renamed_adapter_is_saved_and_loaded(gemma3, multimodal, tmp_path):
    edit_tensors(multimodal, rename(*OLD))
    model = FusedModel.from_adapters(copy.deepcopy(gemma3), {"one": multimodal}, "one")
    ids = random_ids()
    expected = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "fusion", copy_adapters=True)
        again = FusedModel.from_pretrained(tmp_path / "fusion", base=copy.deepcopy(gemma3))
    assert torch.equal(again(ids).logits, expected)
    model.unload()

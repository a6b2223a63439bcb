"""Parameters of the base that PEFT saved with an adapter: read where they equal the base's, refused elsewhere."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from loraflow import FusedModel
from loraflow.adapters import load_adapter, match_adapter, uncompared_copies
from tests.adapters.checks import assert_gives_what_peft_gives, refusal
from tests.tiny import edit_tensors, peft_model, random_ids, relative_error, save_adapter, tiny_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save(base, directory, edit=lambda model: None, embeddings=True, **config):
    """A PEFT adapter saved with what it trained of the base, or with the base's embeddings."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **settings}))
        with torch.no_grad():
            edit(model)
        model.save_pretrained(directory, save_embedding_layers=embeddings)
    return str(directory)


def trained(part, rows=3):
    """An edit that trains some rows of the parameters with this in their names."""

    def edit(model):
        for name, parameter in model.named_parameters():
            if part in name and "original_module" not in name and "lora_" not in name:
                parameter[:rows] += 1

    return edit


def keys(directory):
    return {key for key in load_file(Path(directory) / "adapter_model.safetensors") if "lora_" not in key}


@pytest.mark.parametrize("architecture", ["llama", "gemma2"], ids=["untied", "tied"])
def test_embeddings_that_equal_the_bases_are_accepted(tmp_path, architecture):
    base = tiny_model(architecture)
    directory = save(base, tmp_path)
    assert f"base_model.model.{EMBEDDING}" in keys(directory)
    assert_gives_what_peft_gives(base, directory)


@pytest.mark.parametrize("name", ["lm_head", "norm", "input_layernorm", "embed_tokens"])
def test_modules_to_save_that_equal_the_bases_are_accepted(base, tmp_path, name):
    directory = save(base, tmp_path, embeddings=False, modules_to_save=[name])
    assert keys(directory)
    assert_gives_what_peft_gives(base, directory)


@pytest.mark.parametrize("infix", [".modules_to_save", ".modules_to_save.default", ".base_layer"])
def test_copies_by_the_names_inside_pefts_wrappers_are_read(base, saved, infix):
    key = f"base_model.model.lm_head{infix}.weight"
    edit_tensors(saved, lambda tensors: tensors.update({key: base.lm_head.weight.detach().clone()}))
    adapter = match_adapter(load_adapter("one", saved), base)
    assert adapter.copies.keys() == {HEAD}
    edit_tensors(saved, lambda tensors: tensors[key][0].add_(1))
    assert "replaces 'lm_head.weight' of the base: 1 of 64 rows differ" in refusal(saved, base)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_equal_the_bases_are_accepted(tmp_path, bias):
    base = tiny_model("opt")
    directory = save(base, tmp_path, embeddings=False, bias=bias)
    assert keys(directory)
    assert_gives_what_peft_gives(base, directory)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained_are_refused(tmp_path, bias):
    base = tiny_model("opt")
    directory = save(base, tmp_path, trained("q_proj.base_layer.bias"), embeddings=False, bias=bias)
    message = refusal(directory, base)
    assert "replaces 'model.decoder.layers.0.self_attn.q_proj.bias' of the base: 3 of 32 values differ" in message
    assert "Retrain it with `bias='none'`." in message


def test_a_bias_setting_without_biases_is_accepted(base, tmp_path):
    assert_gives_what_peft_gives(base, save_adapter(base, tmp_path, ["q_proj"], bias="lora_only"))


def test_modules_that_were_trained_are_refused(base, tmp_path):
    message = refusal(save(base, tmp_path, trained("norm"), embeddings=False, modules_to_save=["model.norm"]), base)
    assert "replaces 'model.norm.weight' of the base: 3 of 32 values differ" in message
    assert "Retrain it without `modules_to_save`." in message


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_embeddings_that_were_trained_are_refused_with_what_differs(base, tmp_path, name):
    message = refusal(save(base, tmp_path, trained(name), embeddings=False, modules_to_save=[name]), base)
    full = EMBEDDING if name == "embed_tokens" else HEAD
    assert f"replaces '{full}' of the base: 3 of 64 rows differ" in message
    assert f"Make it the base's own, for all adapters: `base.get_parameter('{full}').data.copy_(...)` from" in message


def test_added_tokens_are_refused_as_such_and_the_remedy_works(base, tmp_path):
    larger = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        larger.resize_token_embeddings(66)
    directory = save(larger, tmp_path, trained("embed_tokens"))
    message = refusal(directory, base)
    assert "it has the shape (66, 32), and the base's has (64, 32) (tokens added: 2)" in message
    assert "`base.resize_token_embeddings(66)`, then `base.get_parameter('" in message

    # As it says, for each of the parameters that it names.
    remedied = copy.deepcopy(base)
    remedied.resize_token_embeddings(66)
    file = load_file(Path(directory) / "adapter_model.safetensors")
    for name in (EMBEDDING, HEAD):
        remedied.get_parameter(name).data.copy_(file[f"base_model.model.{name}"])
    assert_gives_what_peft_gives(remedied, directory)


@pytest.mark.parametrize("shape", [(), (64,), (64, 40), (64, 32, 1)], ids=str)
def test_embeddings_of_another_width_are_refused_as_of_another_base(base, saved, shape):
    edit_tensors(saved, lambda tensors: tensors.update({f"base_model.model.{HEAD}": torch.ones(shape)}))
    message = refusal(saved, base)
    assert f"replaces 'lm_head.weight' of the base: it has the shape {shape}, and the base's has (64, 32)." in message
    assert "It was trained on another base: give that base, or another adapter." in message


def test_copies_that_are_integers_are_refused(base, saved):
    tensor = torch.ones(64, 32, dtype=torch.int32)
    edit_tensors(saved, lambda tensors: tensors.update({f"base_model.model.{HEAD}": tensor}))
    message = refusal(saved, base)
    assert f"'lm_head.weight' in {saved}/adapter_model.safetensors is of torch.int32" in message


def test_copies_of_eight_bits_are_compared(base, saved):
    def add(tensors):
        tensors[f"base_model.model.{HEAD}"] = base.lm_head.weight.detach().to(torch.float8_e4m3fn)

    edit_tensors(saved, add)
    match_adapter(load_adapter("one", saved), base)


def test_a_copy_of_nothing_is_refused(base, saved):
    key = "base_model.model.score.weight"
    edit_tensors(saved, lambda tensors: tensors.update({key: torch.randn(2, 32)}))
    message = refusal(saved, base)
    assert "holds 'score.weight', which is neither a LoRA weight nor a parameter of LlamaForCausalLM" in message


@pytest.mark.parametrize(
    ("of_base", "of_file"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_copies_are_compared_in_the_coarser_precision(base, tmp_path, of_base, of_file):
    # As most bases are published, in bfloat16.
    base = copy.deepcopy(base).bfloat16() if torch.float16 in (of_base, of_file) else base
    directory = save(copy.deepcopy(base).to(of_file), tmp_path)
    match_adapter(load_adapter("one", directory), copy.deepcopy(base).to(of_base))
    edit_tensors(directory, lambda tensors: tensors[f"base_model.model.{HEAD}"][5].add_(1))
    assert "1 of 64 rows differ" in refusal(directory, copy.deepcopy(base).to(of_base))


def test_on_the_meta_device_shapes_alone_are_compared_and_that_can_be_told(base, tmp_path):
    directory = save(base, tmp_path, trained("embed_tokens"))
    adapter = match_adapter(load_adapter("one", directory), copy.deepcopy(base).to("meta"))
    assert sorted(uncompared_copies(adapter, copy.deepcopy(base).to("meta"))) == [HEAD, EMBEDDING]
    assert uncompared_copies(adapter, base) == []
    edit_tensors(directory, lambda tensors: tensors.update({f"base_model.model.{HEAD}": torch.randn(65, 32)}))
    assert "(tokens added: 1)" in refusal(directory, copy.deepcopy(base).to("meta"))


def test_copies_are_compared_with_an_offloaded_base(base, tmp_path):
    directory = save(base, tmp_path)
    offloaded = accelerate.cpu_offload(copy.deepcopy(base), execution_device="cpu")
    assert offloaded.lm_head.weight.is_meta
    match_adapter(load_adapter("one", directory), offloaded)
    edit_tensors(directory, lambda tensors: tensors[f"base_model.model.{HEAD}"][5].add_(1))
    assert "1 of 64 rows differ" in refusal(directory, offloaded)


def test_a_quantised_parameter_cannot_be_compared(base, tmp_path):
    quantised = copy.deepcopy(base)
    quantised.lm_head.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    message = refusal(save(base, tmp_path), quantised)
    assert "a copy of 'lm_head.weight', which cannot be compared with the base's, quantised as torch.int8" in message
    assert "Load the base without quantization" in message


@torch.no_grad()
def test_a_saved_fusion_of_an_adapter_with_copies_is_loaded(base, tmp_path):
    directory = save(base, tmp_path / "adapter")
    model = FusedModel.from_adapters(copy.deepcopy(base), {"one": directory}, "one")
    model.save_pretrained(tmp_path / "fusion", copy_adapters=True)
    again = FusedModel.from_pretrained(tmp_path / "fusion", base=copy.deepcopy(base))
    ids = random_ids()
    assert relative_error(again(ids).logits, peft_model(base, directory)(ids).logits) < 1e-5

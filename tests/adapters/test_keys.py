"""The names and values of a file's tensors."""

from __future__ import annotations

import pytest
import torch

from loraflow.adapters import load_adapter, match_adapter
from tests.adapters.checks import Q0, assert_gives_what_peft_gives, refusal
from tests.tiny import ALL_LLAMA, edit_config, edit_tensors, save_adapter

PREFIX = "base_model.model."


def renamed(rename):
    """An edit that gives every tensor of a file another name."""

    def edit(tensors):
        for key in list(tensors):
            tensors[rename(key)] = tensors.pop(key)

    return edit


def with_adapter_name(key, name="default"):
    head, _, leaf = key.rpartition(".")
    return f"{key}.{name}" if leaf == "lora_magnitude_vector" else f"{head}.{name}.{leaf}"


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "lora_bias"])
def test_keys_with_the_adapters_name_in_them_are_read(base, tmp_path, config):
    directory = save_adapter(base, tmp_path, ALL_LLAMA, **config)
    expected = match_adapter(load_adapter("one", directory), base).modules
    edit_tensors(directory, renamed(with_adapter_name))
    found = match_adapter(load_adapter("one", directory), base).modules
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].lora_B, expected[name].lora_B) for name in found)
    if not config.get("use_dora"):  # of DoRA's magnitudes, PEFT finds only those without a name
        assert_gives_what_peft_gives(base, directory)


def test_any_adapters_name_in_keys_is_read(base, saved):
    expected = load_adapter("one", saved).modules
    edit_tensors(saved, renamed(lambda key: with_adapter_name(key, "my-adapter")))
    assert load_adapter("one", saved).modules.keys() == expected.keys()


def test_a_file_of_two_adapters_is_refused(saved):
    edit_tensors(saved, renamed(lambda key: with_adapter_name(key, "zh" if "q_proj" in key else "en")))
    assert "holds weights of 2 adapters, ['en', 'zh']. Save each by itself" in refusal(saved)


def test_keys_without_pefts_prefix_are_read(base, saved):
    expected = load_adapter("one", saved).modules
    edit_tensors(saved, renamed(lambda key: key.removeprefix(PREFIX)))
    found = match_adapter(load_adapter("one", saved), base).modules
    assert found.keys() == expected.keys()


@pytest.mark.parametrize(
    "other",
    [
        lambda key: key.removeprefix(PREFIX),
        with_adapter_name,
        lambda key: with_adapter_name(key.removeprefix(PREFIX)),
    ],
    ids=["prefix", "name", "both"],
)
def test_one_weight_by_two_names_is_refused_with_both(saved, other):
    key = f"{Q0}.lora_B.weight"
    edit_tensors(saved, lambda tensors: tensors.update({other(key): torch.randn(32, 4)}))
    message = refusal(saved)
    assert f"'{key}'" in message
    assert f"'{other(key)}'" in message
    assert "are the same weight by two names, and which of them counts is not said" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_weights_of_any_precision_are_read_as_they_are(base, saved, dtype):
    def cast(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)

    edit_tensors(saved, cast)
    assert_gives_what_peft_gives(base, saved)
    for module in load_adapter("one", saved).modules.values():
        assert torch.equal(module.lora_A.to(dtype).to(module.lora_A.dtype), module.lora_A)


def test_every_value_of_eight_bits_is_kept(saved):
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = bits[torch.isfinite(bits.float())]
    values = finite[: finite.numel() // 4 * 4].view(4, -1)
    edit_tensors(saved, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": values}))
    found = load_adapter("one", saved).modules["model.layers.0.self_attn.q_proj"].lora_A
    assert torch.equal(found.float(), values.float())


def test_the_digest_tells_precisions_apart(saved):
    before = load_adapter("one", saved).digest
    edit_tensors(saved, lambda tensors: tensors.update({k: t.to(torch.float8_e4m3fn) for k, t in tensors.items()}))
    eight_bits = load_adapter("one", saved).digest
    edit_tensors(saved, lambda tensors: tensors.update({k: t.to(torch.bfloat16) for k, t in tensors.items()}))
    assert len({before, eight_bits, load_adapter("one", saved).digest}) == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(saved, dtype):
    edit_tensors(saved, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(4, 32, dtype=dtype)}))
    message = refusal(saved)
    assert f"'model.layers.0.self_attn.q_proj.lora_A' in {saved}/adapter_model.safetensors is of {dtype}" in message
    assert "weights are floating-point numbers of at least 8 bits" in message


@pytest.mark.parametrize("shape", [(0,), (0, 32), (4, 0)])
def test_empty_weights_are_refused(saved, shape):
    edit_tensors(saved, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.empty(shape)}))
    message = refusal(saved)
    assert f"is empty: {shape}. Gather it before saving" in message


@pytest.mark.parametrize("shape", [(4,), (4, 32, 1), (8, 32)])
@pytest.mark.usefixtures("unchecked_shapes")
def test_factors_of_another_shape_are_refused(saved, shape):
    edit_tensors(saved, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(shape)}))
    assert f"has lora_A {shape} and lora_B (32, 4) in" in refusal(saved)


@pytest.mark.parametrize("key", [f"{Q0}.lora_A.bias", f"{Q0}.lora_C.weight", f"{Q0}.lora_A.weight_scale", "lora"])
def test_a_key_that_is_nothing_is_refused(saved, key):
    edit_tensors(saved, lambda tensors: tensors.update({key: torch.ones(4)}))
    assert f"key '{key}' in {saved}/adapter_model.safetensors is not a LoRA weight of a linear module" in refusal(saved)


def test_lora_on_embeddings_is_refused_as_outside_the_layers(base, tmp_path):
    message = refusal(save_adapter(base, tmp_path, ["q_proj", "embed_tokens"]))
    assert "is not a LoRA weight of a linear module: it adapts an embedding, which is outside the decoder" in message
    assert "Retrain it without 'embed_tokens' in `target_modules`." in message


def test_lora_on_the_output_head_is_refused_as_outside_the_layers(base, tmp_path):
    directory = save_adapter(base, tmp_path, ["q_proj", "lm_head"])
    assert "targets 'lm_head', which is outside the decoder layers (model.layers)" in refusal(directory, base)
    # PEFT saves the head itself too, or does not.
    edit_tensors(directory, lambda tensors: tensors.pop("base_model.model.lm_head.base_layer.weight"))
    edit_config(directory, target_modules=None)
    assert "targets 'lm_head', which is outside the decoder layers (model.layers)" in refusal(directory, base)

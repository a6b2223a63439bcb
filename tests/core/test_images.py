"""Bases that read images: loaded by path, and every method sees the image or refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from loraflow import FusedModel, LoraFlow, Static
from loraflow.bases import BaseOptions, load_base, load_empty_base
from loraflow.errors import AdapterError, MethodError
from tests.tiny import peft_model, random_adapter, relative_error, save_adapter, set_random_gates, tiny_model
from tests.zoo.bases import small_config, small_model
from tests.zoo.images import image_reader

reading = pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
TARGETS = r".*language_model.*\.(q_proj|o_proj|up_proj)"


@pytest.fixture
def base(architecture):
    return small_model(architecture)


@pytest.fixture
def adapters(base, tmp_path):
    return {
        name: save_adapter(base.model, tmp_path / name, TARGETS, r=r, seed=r) for name, r in (("one", 2), ("two", 3))
    }


@pytest.fixture
def question(base):
    """A prompt of one image and words, and the same with other pixels."""
    reader = image_reader(base)
    words = torch.randint(5, 40, (1, 6), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([reader.prefix[None], words], dim=1)
    inputs = dict(reader.inputs)
    if reader.types is not None:
        inputs[reader.types] = (ids == reader.image).long()
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1) + 0.5}
    return ids, inputs, other


@reading
@torch.no_grad()
def test_a_base_is_loaded_by_its_path(base, adapters, question, tmp_path):
    ids, inputs, _ = question
    base.model.save_pretrained(tmp_path / "base")
    options = BaseOptions(dtype=base.model.dtype)
    assert type(load_base(tmp_path / "base", options)) is type(base.model)
    assert type(load_empty_base(tmp_path / "base", options)) is type(base.model)
    model = FusedModel.from_adapters(tmp_path / "base", adapters, "one", options=options)
    expected = peft_model(base.model, adapters["one"])(input_ids=ids, **inputs).logits
    assert relative_error(model(input_ids=ids, **inputs).logits, expected) < 1e-5
    assert model.attachment.layers.prefix == "model.language_model.layers"


@reading
@torch.no_grad()
def test_a_base_that_has_answered_before_is_fused_like_any_other(base, adapters, question):
    ids, inputs, _ = question
    fresh = FusedModel.from_adapters(copy.deepcopy(base.model), adapters, "one")
    expected = fresh(input_ids=ids, **inputs).logits
    base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **inputs)
    used = FusedModel.from_adapters(base.model, adapters, "one")
    assert torch.equal(used(input_ids=ids, **inputs).logits, expected)


@reading
@torch.no_grad()
def test_the_image_counts_for_methods_that_weigh_tokens(base, adapters, question):
    ids, inputs, other = question
    model = FusedModel.from_adapters(base.model, adapters, LoraFlow())
    set_random_gates(model)
    trace = model.trace(ids, **inputs)
    assert not torch.allclose(trace.weights, model.trace(ids, **other).weights)
    mask = torch.ones_like(ids)
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, **inputs)
    whole = model.generate(
        ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, use_cache=False, **inputs
    )
    assert torch.equal(answer, whole)


@reading
@torch.no_grad()
def test_methods_that_weigh_prompts_see_the_image(base, adapters, question):
    ids, inputs, other = question
    model = FusedModel.from_adapters(copy.deepcopy(base.model), adapters, "qa-flora")
    seen = model.weigh(ids, **inputs)
    assert not torch.allclose(seen, model.weigh(ids, **other))
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None, **inputs}
    answer = model.generate(ids, **options)
    assert torch.equal(answer, model.generate(ids, fusion_weights=seen, **options))
    torch.testing.assert_close(model.trace(ids, **inputs).weights[0, 0], seen[0].float(), rtol=1e-4, atol=1e-5)
    # Padding on the left is no part of the prompt.
    padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], dim=1)
    kinds = {
        name: torch.cat([value[:, :1], value[:, :1], value], dim=1) if value.shape == ids.shape else value
        for name, value in inputs.items()
    }
    known = torch.cat([torch.zeros_like(mask[:, :2]), mask], dim=1)
    torch.testing.assert_close(model.weigh(padded, known, **kinds), seen)


@reading
@torch.no_grad()
def test_images_of_several_prompts_are_refused_where_prompts_are_weighed(base, adapters, question):
    ids, inputs, _ = question
    model = FusedModel.from_adapters(base.model, adapters, "qa-flora")
    twice = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    options = {"attention_mask": torch.ones_like(ids).repeat(2, 1), "max_new_tokens": 2, **twice}
    with pytest.raises(MethodError, match=r"'qa-flora' reads each prompt by itself, and whose of 2 prompts"):
        model.generate(torch.cat([ids] * 2), **options)
    with model.using(Static({"one": 1.0})):
        model.generate(torch.cat([ids] * 2), **options)


@reading
def test_an_adapter_of_the_vision_tower_is_never_fused_in_part(base, tmp_path):
    linears = [name for name, module in base.model.named_modules() if isinstance(module, torch.nn.Linear)]
    vision = next(name for name in linears if "vis" in name)
    text = next(name for name in linears if "language_model" in name)
    path = save_adapter(base.model, tmp_path / "both", [vision, text])
    with pytest.raises(AdapterError, match=f"targets '{vision}', which is outside the decoder layers"):
        FusedModel.from_adapters(base.model, {"both": path})


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_the_class_that_the_files_name_is_loaded(auto_class, tmp_path):
    base = auto_class.from_config(small_config("qwen3_5"), dtype=torch.float32)
    base.save_pretrained(tmp_path)
    assert type(load_base(tmp_path, BaseOptions(dtype=torch.float32))) is type(base)


@torch.no_grad()
def test_what_is_given_for_each_token_is_each_prompts_own():
    base = tiny_model()
    fused = FusedModel.from_adapters(base, {"a": random_adapter(base, "a"), "b": random_adapter(base, "b")}, "qa-flora")
    ids = torch.randint(5, 40, (2, 6))
    seen = []
    own = base.forward
    base.forward = lambda *args, token_type_ids=None, **kwargs: (seen.append(token_type_ids), own(*args, **kwargs))[1]
    kinds = torch.tensor([[0] * 6, [1] * 6])
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    weights = fused.weigh(ids, mask, token_type_ids=kinds)
    assert {tuple(kind.shape[1:]) for kind in seen} == {(6,), (4,)}
    assert all(len(set(kind.flatten().tolist())) == 1 for kind in seen)
    torch.testing.assert_close(weights, fused.weigh(ids, mask))

"""LoRA-Hub: mixed parameters against explicitly merged matrices, with their cross terms."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraflow import FusedModel
from loraflow.adapters import load_adapter
from loraflow.errors import MethodError
from loraflow.methods import LoraHub
from tests.tiny import (
    ARCHITECTURES,
    exact_loss,
    merged_model,
    random_adapter,
    random_ids,
    relative_error,
    save_adapter,
    tiny_model,
)


def mixed_model(base, adapters, weights):
    """W + (sum w_i s_i B_i)(sum w_j A_j) in every linear, smaller ranks padded with zeros; each bias weighted once."""
    mixed = copy.deepcopy(base)
    with torch.no_grad():
        for name in {module for adapter in adapters for module in adapter.modules}:
            linear = mixed.get_submodule(name)
            weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
            updates = [adapter.modules.get(name) for adapter in adapters]
            rank = max(update.rank for update in updates if update is not None)
            A, B = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
            for w, update in zip(weights, updates, strict=True):
                if update is None:
                    continue
                for place in range(update.rank):
                    A[place] += w * update.lora_A[place].to(A)
                    B[:, place] += w * update.scaling * update.lora_B[:, place].to(B)
                if update.bias is not None:
                    if linear.bias is None:
                        linear.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))
                    linear.bias += w * update.scaling * update.bias.to(weight)
            linear.weight.copy_((weight + B @ A).T if isinstance(linear, Conv1D) else weight + B @ A)
    return mixed


def fuse(base, adapters, method, weights):
    model = FusedModel.from_adapters(copy.deepcopy(base), {a.name: a for a in adapters}, method)
    with torch.no_grad():
        model.gates["model"].weights.copy_(torch.tensor(weights))
    return model


plans = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.sampled_from(["plain", "lora_bias", "rslora"]),
        st.integers(1, 7),
        st.sampled_from([None, [1], [0, 2]]),
        st.sampled_from([-1.5, -0.5, 0.0, 0.25, 0.5, 1.0, 1.25]),
    ),
    min_size=1,
    max_size=4,
)


@torch.no_grad()
@settings(max_examples=60)
@given(architecture=st.sampled_from(["llama", "gpt2", "opt", "gpt_neox", "phi3"]), plan=plans)
def test_parameters_are_mixed_with_their_cross_terms(architecture, plan):
    base, known = tiny_model(architecture, torch.float64), ARCHITECTURES[architecture][1]
    adapters = [
        random_adapter(base, f"a{i}", known[-targets:], r, kind, seed=i, layers=layers)
        for i, (r, kind, targets, layers, _) in enumerate(plan)
    ]
    weights = [weight for *_, weight in plan]
    model = fuse(base, adapters, LoraHub(), weights)
    expected = mixed_model(base, adapters, weights)(random_ids()).logits
    assert relative_error(model(random_ids()).logits, expected) < 1e-9
    # The same with gradients on, which takes another path.
    with torch.enable_grad():
        assert relative_error(model(random_ids()).logits.detach(), expected) < 1e-9


@torch.no_grad()
@settings(max_examples=15)
@given(plan=plans)
def test_outputs_may_be_mixed_instead(plan):
    base = tiny_model(dtype=torch.float64)
    adapters = [
        random_adapter(base, f"a{i}", ARCHITECTURES["llama"][1][-targets:], r, kind, seed=i, layers=layers)
        for i, (r, kind, targets, layers, _) in enumerate(plan)
    ]
    weights = [weight for *_, weight in plan]
    model = fuse(base, adapters, LoraHub("outputs"), weights)
    assert relative_error(model(random_ids()).logits, merged_model(base, adapters, weights)(random_ids()).logits) < 1e-9


@torch.no_grad()
def test_cross_terms_matter():
    base = tiny_model(dtype=torch.float64)
    adapters = [random_adapter(base, f"a{i}", seed=i) for i in range(2)]
    parameters, outputs = (fuse(base, adapters, LoraHub(mixes), [0.5, 0.5]) for mixes in ("parameters", "outputs"))
    assert relative_error(parameters(random_ids()).logits, outputs(random_ids()).logits) > 0.1


@torch.no_grad()
def test_adapters_as_peft_saves_them(tmp_path):
    base = tiny_model(dtype=torch.float64)
    paths = [
        save_adapter(base, tmp_path / "a", r=4, use_rslora=True, seed=1),
        save_adapter(base, tmp_path / "b", r=2, lora_bias=True, seed=2),
        save_adapter(base, tmp_path / "c", r=3, rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 3}, seed=3),
    ]
    adapters, weights = [load_adapter(f"a{i}", path) for i, path in enumerate(paths)], [0.5, -0.25, 1.25]
    expected = mixed_model(base, adapters, weights)(random_ids()).logits
    assert relative_error(fuse(base, adapters, LoraHub(), weights)(random_ids()).logits, expected) < 1e-9


def test_the_gradient_of_mixed_parameters_is_that_of_the_merged_matrices():
    # Llama's norm is float32 whatever the model is, too coarse for differences.
    base = tiny_model("gpt2", torch.float64)
    kinds = ["plain", "lora_bias", "rslora"]
    adapters = [random_adapter(base, kind, r=i + 2, kind=kind, seed=i) for i, kind in enumerate(kinds)]
    weights, ids, step = [0.5, -0.25, 1.25], random_ids(), 1e-5
    model = fuse(base, adapters, LoraHub(), weights)
    exact_loss(model, ids).backward()
    for position, found in enumerate(model.gates["model"].weights.grad.tolist()):
        losses = []
        for sign in (1, -1):
            moved = [w + sign * step * (i == position) for i, w in enumerate(weights)]
            with torch.no_grad():
                losses.append(exact_loss(mixed_model(base, adapters, moved), ids).item())
        assert found == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5)


@torch.no_grad()
def test_before_the_search_the_base_answers():
    base = tiny_model()
    model = FusedModel.from_adapters(tiny_model(), {"a": random_adapter(base, "a")}, "lorahub")
    torch.testing.assert_close(model(random_ids()).logits, base(random_ids()).logits)
    assert model.method.start_weights(["a", "b"], "a") == [0.0, 0.0]


@torch.no_grad()
def test_generation_with_the_cache_is_generation_without():
    base = tiny_model(dtype=torch.float64)
    adapters = [random_adapter(base, f"a{i}", seed=i) for i in range(2)]
    model, ids = fuse(base, adapters, LoraHub(), [0.5, 0.75]), random_ids()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    found = model.generate(ids, **options)
    assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    assert torch.equal(found, mixed_model(base, adapters, [0.5, 0.75]).generate(ids, **options))


def test_a_dora_is_refused_where_parameters_are_mixed():
    base = tiny_model()
    adapters = {"plain": random_adapter(base, "plain"), "doric": random_adapter(base, "doric", kind="dora")}
    with pytest.raises(
        MethodError, match=r"adapter 'doric' is a DoRA, which is more than A and B\. Set `mixes` to \"outputs\""
    ):
        FusedModel.from_adapters(base, adapters, LoraHub())
    FusedModel.from_adapters(base, adapters, LoraHub("outputs"))


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"mixes": "output"}, "`mixes` is unknown: 'output'. Known: 'outputs', 'parameters'. Did you mean 'outputs'?"),
        ({"budget": 0}, "`budget` (=0) must be a whole number of at least 1."),
        ({"budget": 2.5}, "`budget` (=2.5) must be a whole number of at least 1."),
        ({"bound": -1}, "`bound` (=-1) must be a positive number."),
        ({"regularization": -0.1}, "`regularization` (=-0.1) must be a positive number."),
        ({"regularization": float("nan")}, "`regularization` (=nan) must be a positive number."),
    ],
)
def test_settings_that_cannot_be_are_refused(parameters, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        LoraHub(**parameters)


def test_no_regularization_is_fine():
    assert LoraHub(regularization=0).regularization == 0

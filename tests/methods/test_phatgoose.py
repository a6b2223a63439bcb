"""PHATGOOSE: the routing formula, what one expert's training sees, and the gradient of its vector."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel
from loraflow.adapters import LoraModule
from loraflow.errors import MethodError
from loraflow.methods import Phatgoose
from loraflow.methods.base import Site
from tests.tiny import ARCHITECTURES, random_adapter, random_ids, relative_error, set_random_gates, tiny_model

FEATURES = 12


def site(targets):
    updates = tuple(LoraModule(torch.randn(2, FEATURES), torch.randn(5, 2), 1.0) if t else None for t in targets)
    return Site(tuple(f"a{i}" for i in range(len(targets))), FEATURES, 2, 0, "q", {"q": updates})


def random_gate(targets, top_k=None):
    gate = Phatgoose(top_k).gate(site(targets)).double()
    with torch.no_grad():
        gate.vectors.normal_()
    return gate


def slow_weights(x, vectors, targets, top_k):
    """The formula in loops."""

    def standardized(values):
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        return [(value - mean) / deviation for value in values]

    x = standardized(x)
    scores = [
        sum(a * b for a, b in zip(standardized(v), x, strict=True)) / math.sqrt(len(x)) if target else None
        for v, target in zip(vectors, targets, strict=True)
    ]
    kept = sorted((score for score in scores if score is not None), reverse=True)[:top_k]
    exponentials = [math.exp(score) if score in kept else 0.0 for score in scores]
    return [value / sum(exponentials) for value in exponentials]


@settings(max_examples=50)
@given(
    targets=st.lists(st.booleans(), min_size=1, max_size=5).filter(any),
    top_k=st.none() | st.integers(1, 5),
    scale=st.floats(0.1, 1000),
)
def test_routing_is_the_formula(targets, top_k, scale):
    top_k = top_k and min(top_k, len(targets))
    gate, x = random_gate(targets, top_k), scale * torch.randn(2, 3, FEATURES, dtype=torch.float64) + 1
    kept = top_k or min(2, len(targets))
    rows = [slow_weights(row, gate.vectors.tolist(), targets, kept) for row in x.reshape(-1, FEATURES).tolist()]
    torch.testing.assert_close(gate(x), torch.tensor(rows, dtype=torch.float64).reshape(2, 3, -1))


def test_before_training_all_that_are_kept_weigh_the_same():
    gate = Phatgoose().gate(site([True, True]))
    torch.testing.assert_close(gate(torch.randn(4, FEATURES)), torch.full((4, 2), 0.5))


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_an_expert_in_training_is_alone_behind_its_sigmoid(expert):
    gate, x = random_gate([True] * 3), torch.randn(2, 5, FEATURES, dtype=torch.float64, requires_grad=True)
    gate.expert = expert
    expected = torch.zeros(2, 5, 3, dtype=torch.float64)
    expected[..., expert] = 1 / (1 + torch.exp(-(x * gate.vectors[expert]).sum(dim=-1)))
    torch.testing.assert_close(gate(x), expected)
    direction = torch.randn(2, 5, 3, dtype=torch.float64)
    found = torch.autograd.grad(gate(x), (x, gate.vectors), direction)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, gate.vectors), direction))
    others = [i for i in range(3) if i != expert]
    assert not found[1][others].any()
    assert found[1][expert].any()


@torch.no_grad()
def test_in_a_model_an_expert_is_its_adapter_times_the_sigmoid():
    base = tiny_model(dtype=torch.float64)
    adapters = {n: random_adapter(base, n, seed=i, r=i + 2) for i, n in enumerate("abc")}
    model = FusedModel.from_adapters(tiny_model(dtype=torch.float64), adapters, "phatgoose")
    set_random_gates(model)
    for gate in model.gates.values():
        gate.expert = 1
    for name, update in adapters["b"].modules.items():
        v = model.gates[name.removeprefix("model.")].vectors[1]

        def hook(_, args, output, update=update, v=v):
            x = args[0]
            out = x @ update.lora_A.double().T @ update.lora_B.double().T * update.scaling
            return output + out / (1 + torch.exp(-(x @ v)))[..., None]

        base.get_submodule(name).register_forward_hook(hook)
    assert relative_error(model(random_ids()).logits, base(random_ids()).logits) < 1e-9


@torch.no_grad()
@settings(max_examples=15)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    top_k=st.none() | st.integers(1, 4),
    length=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_in_a_model_each_linear_routes_its_own_input(ranks, top_k, length, seed):
    base, top_k = tiny_model(dtype=torch.float64), top_k and min(top_k, len(ranks))
    # Every other adapter targets some of the linears only.
    all_targets = ARCHITECTURES["llama"][1]
    adapters = {
        f"a{i}": random_adapter(base, f"a{i}", all_targets[i % 2 * 3 :], r=r, seed=seed + i)
        for i, r in enumerate(ranks)
    }
    model = FusedModel.from_adapters(tiny_model(dtype=torch.float64), adapters, Phatgoose(top_k))
    set_random_gates(model, seed)
    for site, gate in model.gates.items():
        updates = [adapter.modules.get(f"model.{site}") for adapter in adapters.values()]
        vectors = gate.vectors.tolist()

        def route(_, args, output, updates=updates, vectors=vectors):
            x, kept = args[0], top_k or min(2, len(updates))
            found = [
                slow_weights(row, vectors, [u is not None for u in updates], kept) for row in x.flatten(0, 1).tolist()
            ]
            weights = torch.tensor(found, dtype=x.dtype).view(*x.shape[:-1], -1)
            for i, u in enumerate(updates):
                if u is not None:
                    output = output + weights[..., i : i + 1] * u.scaling * (
                        x @ u.lora_A.double().T @ u.lora_B.double().T
                    )
            return output

        base.get_submodule(f"model.{site}").register_forward_hook(route)
    ids = random_ids(2, length, seed=seed)
    assert relative_error(model(ids).logits, base(ids).logits) < 1e-9


def test_routing_keeps_its_precision_under_autocast():
    gate, x = random_gate([True] * 3).float(), torch.randn(2, 5, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        found = gate(x)
    torch.testing.assert_close(found, gate(x))


def test_the_gate_reads_bfloat16_and_answers_in_its_own_precision():
    gate, x = random_gate([True] * 3).float(), torch.randn(2, 5, FEATURES).bfloat16()
    assert gate(x).dtype == torch.float32
    torch.testing.assert_close(gate(x), gate(x.float()))


def test_constant_inputs_give_finite_weights_and_gradients():
    gate = random_gate([True, True])
    x = torch.ones(3, FEATURES, dtype=torch.float64, requires_grad=True)
    weights = gate(x)
    torch.testing.assert_close(weights, torch.full((3, 2), 0.5, dtype=torch.float64))
    weights[:, 0].sum().backward()
    assert x.grad.isfinite().all()


def test_vectors_are_what_is_learned_and_saved():
    base = tiny_model()
    model = FusedModel.from_adapters(base, {n: random_adapter(base, n, ["q_proj"]) for n in "ab"}, "phatgoose")
    assert model.state_dict().keys() == {f"layers.{i}.self_attn.q_proj.vectors" for i in range(3)}
    assert model.num_learned_parameters() == 3 * 2 * 32


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(MethodError, match=re.escape("`top_k` (=3) must be between 1 and the number of adapters (=2).")):
        Phatgoose(top_k=3).check(["a", "b"])

"""Gates beyond the paper: each variant's formula by hand, its exact start, and what it can learn."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel, LoraFlow
from loraflow.adapters import LoraModule
from loraflow.errors import MethodError
from loraflow.methods.base import Site
from loraflow.methods.flow_gates import ACTIVATIONS, INPUTS, SCORERS
from tests.tiny import random_adapter, random_ids, tiny_model

FEATURES = 12
VARIANTS = [
    LoraFlow(reads=reads, scorer=scorer, activation=activation, width=5)
    for reads, scorer, activation in itertools.product(INPUTS, SCORERS, ACTIVATIONS)
]
variants = pytest.mark.parametrize("method", VARIANTS, ids=lambda m: f"{m.reads}-{m.scorer}-{m.activation}")


def site(adapters=3, features=FEATURES):
    """A layer with two linears; the second reads another width, and the first is not targeted by the last adapter."""
    narrow = [LoraModule(torch.randn(2, features), torch.randn(7, 2), 1.0) for _ in range(adapters)]
    again = [LoraModule(torch.randn(3, features), torch.randn(7, 3), 1.0) for _ in range(adapters)]
    wide = [LoraModule(torch.randn(2, 2 * features), torch.randn(7, 2), 1.0) for _ in range(adapters)]
    updates = {"q": (*narrow[:-1], None), "k": tuple(again), "down": tuple(wide)}
    return Site(tuple(f"a{i}" for i in range(adapters)), features, 2, updates=updates)


def random_gate(method, adapters=3, dtype=torch.float64):
    gate = method.gate(site(adapters)).to(dtype)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    return gate


def slow_weights(method, gate, x):
    """One position's weights by the formula, in loops."""

    def times(matrix, vector):
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    values = {name: tensor.tolist() for name, tensor in [*gate.named_parameters(), *gate.named_buffers()]}
    if method.reads == "normalized":
        rms = math.sqrt(sum(value**2 for value in x) / len(x) + 1e-6)
        x = [value / rms for value in x]
    if method.scorer == "linear":
        scores = times(values["weight"], x)
    elif method.scorer == "low-rank":
        scores = times(values["weight"], times(values["down"], x))
    elif method.scorer == "two-layer":
        hidden = [h + c for h, c in zip(times(values["down"], x), values["down_bias"], strict=True)]
        scores = times(values["weight"], [h / (1 + math.exp(-h)) for h in hidden])
    else:
        query, keys = times(values["weight"], x), [times(values["key"], e) for e in values["embeddings"]]
        scores = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(method.width) for key in keys]
    scores = [score / method.temperature for score in scores]
    if method.activation == "softmax":
        exponentials = [math.exp(score - max(scores)) for score in scores]
        weights = [value / sum(exponentials) for value in exponentials]
    else:
        weights = [1 / (1 + math.exp(-score)) if score > -700 else 0.0 for score in scores]
    weights = [w + b for w, b in zip(weights, values["bias"], strict=True)]
    kept = sorted(map(abs, weights), reverse=True)[: method.top_k or len(weights)]
    return [w if abs(w) in kept else 0.0 for w in weights]


# ---- The formulas --------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    reads=st.sampled_from(INPUTS),
    scorer=st.sampled_from(list(SCORERS)),
    activation=st.sampled_from(ACTIVATIONS),
    adapters=st.integers(1, 5),
    width=st.integers(1, 6),
    temperature=st.floats(0.5, 10),
    top_k=st.none() | st.integers(1, 5),
    scale=st.floats(0.1, 5),
)
def test_each_variant_is_its_formula(reads, scorer, activation, adapters, width, temperature, top_k, scale):
    top_k = top_k and min(top_k, adapters)
    method = LoraFlow("layer", temperature, "average", reads, scorer, width, activation, top_k)
    gate = random_gate(method, adapters)
    x = scale * torch.randn(2, 3, FEATURES, dtype=torch.float64)
    expected = [slow_weights(method, gate, row) for row in x.reshape(-1, FEATURES).tolist()]
    torch.testing.assert_close(gate(x), torch.tensor(expected).double().reshape(2, 3, -1), rtol=1e-6, atol=1e-7)


def test_normalized_gates_do_not_see_the_scale_of_their_input():
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    for scorer in SCORERS:
        gate = random_gate(LoraFlow(reads="normalized", scorer=scorer))
        torch.testing.assert_close(gate(100 * x), gate(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(random_gate(LoraFlow(scorer=scorer))(100 * x), gate(x), atol=1e-2)


def test_adapters_stand_for_the_main_axis_of_their_updates():
    found = LoraFlow(scorer="attention").gate(place := site()).embeddings
    for i, embedding in enumerate(found):
        # Only linears of the gate's own width can say which of its inputs they answer.
        updates = [place.updates[name][i] for name in ("q", "k") if place.updates[name][i] is not None]
        axes = torch.stack([torch.linalg.svd(u.lora_B @ u.lora_A).Vh[0] for u in updates])
        values, vectors = torch.linalg.eigh(axes.T @ axes)
        assert values[-1] > 1 - 1e-4
        assert (vectors[:, -1] @ embedding).abs() > 1 - 1e-4


def test_what_stands_for_an_adapter_does_not_hang_on_signs_that_svd_chooses(monkeypatch):
    before = LoraFlow(scorer="attention").gate(place := site()).embeddings
    svd = torch.linalg.svd

    def flipped(*args, **kwargs):
        found = svd(*args, **kwargs)
        return type("Svd", (), {"U": -found.U, "S": found.S, "Vh": -found.Vh})

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert torch.equal(LoraFlow(scorer="attention").gate(place).embeddings, before)


@pytest.mark.parametrize("adapters", [2, 7])
def test_attention_learns_as_much_for_any_number_of_adapters_but_for_the_bias(adapters):
    gate = LoraFlow(scorer="attention", width=5).gate(site(adapters))
    assert sum(parameter.numel() for parameter in gate.parameters()) == 2 * 5 * FEATURES + adapters


# ---- The start -----------------------------------------------------------------------------------------------------


@variants
def test_an_untrained_gate_gives_exactly_the_start_weights(method):
    weights = [0.7, -2.0, 0.0]
    start = {f"a{i}": weight for i, weight in enumerate(weights)}
    gate = LoraFlow(**{**method.parameters(), "start": start}).gate(site())
    x = 100 * torch.randn(2, 3, FEATURES)
    torch.testing.assert_close(gate(x), torch.tensor(weights).expand(2, 3, -1), rtol=0, atol=5e-7)


@variants
def test_starting_again_forgets_what_was_learned(method):
    gate = random_gate(method, dtype=torch.float32)
    gate.start_at([0.0, 1.0, 0.0])
    expected = torch.tensor([0.0, 1.0, 0.0]).expand(4, 3)
    torch.testing.assert_close(gate(torch.randn(4, FEATURES)), expected, rtol=0, atol=5e-7)


# ---- Learning ------------------------------------------------------------------------------------------------------


@variants
def test_gradients_are_those_of_finite_differences(method):
    gate, x = random_gate(method), torch.randn(3, FEATURES, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: gate(x), (x, *gate.parameters()), fast_mode=True)


@variants
@pytest.mark.parametrize("granularity", ["step", "layer", "module"])
def test_from_the_start_training_can_move_every_gate(method, granularity):
    base = tiny_model()
    adapters = {n: random_adapter(base, n, r=i + 2, seed=i) for i, n in enumerate("abc")}
    method = LoraFlow(**{**method.parameters(), "granularity": granularity, "start": "average"})
    model, ids = FusedModel.from_adapters(base, adapters, method), random_ids()
    model(ids, labels=ids).loss.backward()
    for site_name, gate in model.gates.items():
        for name, parameter in gate.named_parameters():
            assert parameter.grad.isfinite().all(), (site_name, name)
            # Scores are zero at first: what lies below them moves once the scores' own matrix has.
            if name in ("weight", "bias"):
                assert parameter.grad.any(), (site_name, name)
    with torch.no_grad():
        for gate in model.gates.values():
            gate.weight.normal_()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for gate in model.gates.values() for parameter in gate.parameters())


@variants
def test_zero_inputs_give_finite_weights_and_gradients(method):
    gate = random_gate(method, dtype=torch.float32)
    x = torch.zeros(2, FEATURES, requires_grad=True)
    gate(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in gate.parameters())


@variants
def test_gates_keep_their_precision_under_autocast(method):
    gate, x = random_gate(method, dtype=torch.float32), torch.randn(2, 5, FEATURES, requires_grad=True)
    direction, wanted = torch.randn(2, 5, 3), (x, *gate.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        weights = gate(x)
    expected = gate(x)
    torch.testing.assert_close(weights, expected)
    # As trainers do: the backward runs outside.
    found = torch.autograd.grad(weights, wanted, direction)
    torch.testing.assert_close(found, torch.autograd.grad(expected, wanted, direction))


@variants
def test_gates_read_bfloat16_and_answer_in_their_own_precision(method):
    gate, x = random_gate(method, dtype=torch.float32), torch.randn(2, 5, FEATURES).bfloat16()
    assert gate(x).dtype == torch.float32
    torch.testing.assert_close(gate(x), gate(x.float()), rtol=0.05, atol=0.05)


# ---- What cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_attention_needs_an_update_of_each_adapter(granularity):
    base = tiny_model()
    adapters = {
        "a": random_adapter(base, "a", ["q_proj"]),
        # Of the layer's linears only those that read the layer's width count; one adapter leaves out the last layer.
        "b": random_adapter(base, "b", ["q_proj"], layers=[0, 1], seed=2),
    }
    where = "layer 2" if granularity == "layer" else "self_attn.q_proj"
    message = f"needs an update of each at {where}; 'b' has none there. Take another `scorer` or `granularity`."
    with pytest.raises(MethodError, match=re.escape(message)):
        FusedModel.from_adapters(base, adapters, LoraFlow(granularity, scorer="attention"))
    FusedModel.from_adapters(base, adapters, LoraFlow("step", scorer="attention"))


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"reads": "norm"}, "`reads` is unknown: 'norm'. Known: 'normalized', 'raw'."),
        ({"scorer": "lowrank"}, "Known: 'attention', 'linear', 'low-rank', 'two-layer'. Did you mean 'low-rank'?"),
        ({"activation": "relu"}, "`activation` is unknown: 'relu'. Known: 'sigmoid', 'softmax'."),
        ({"width": 0}, "`width` (=0) must be a whole number of at least 1."),
        ({"width": 1.5}, "`width` (=1.5) must be a whole number of at least 1."),
        ({"width": True}, "`width` (=True) must be a whole number of at least 1."),
    ],
)
def test_settings_that_cannot_be_are_refused(parameters, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        LoraFlow(**parameters)


def test_top_k_is_checked_against_the_adapters():
    with pytest.raises(MethodError, match=re.escape("`top_k` (=3) must be between 1 and the number of adapters (=2).")):
        LoraFlow(top_k=3).check(["a", "b"])

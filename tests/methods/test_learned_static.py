"""Learned constant weights: what they give, where they start, and their gradient."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from loraflow import FitConfig, FusedModel, LoraFlow, Static
from loraflow.errors import MethodError
from loraflow.methods import LearnedStatic
from loraflow.methods.base import Site
from tests.tiny import exact_loss, merged_model, random_adapter, random_ids, relative_error, tiny_model

NAMES = ("zh", "math", "code")


def fused(method, architecture="llama"):
    base = tiny_model(architecture, torch.float64)
    adapters = {name: random_adapter(base, name, r=i + 1, seed=i) for i, name in enumerate(NAMES)}
    return base, list(adapters.values()), FusedModel.from_adapters(copy.deepcopy(base), adapters, method)


@torch.no_grad()
@pytest.mark.parametrize(("granularity", "gates"), [("task", 1), ("layer", 3), ("module", 21)])
def test_weights_are_those_of_the_merged_model(granularity, gates):
    base, adapters, model = fused(LearnedStatic(granularity))
    assert len(model.gates) == gates
    assert model.num_learned_parameters() == 3 * gates
    rows = [[0.5, -1.0, 0.2], [0.0, 1.5, 0.3], [-0.2, 0.1, 0.9]]
    for name, gate in model.gates.items():
        layer = 0 if granularity == "task" else int(name.split(".")[1])
        gate.weights.copy_(torch.tensor(rows[layer]))
    rows = [rows[0]] * 3 if granularity == "task" else rows
    expected = merged_model(base, adapters, rows)(random_ids()).logits
    # Weights are set as float32 numbers.
    assert relative_error(model(random_ids()).logits, expected) < 1e-6


@torch.no_grad()
def test_each_module_may_have_weights_of_its_own():
    base, adapters, model = fused(LearnedStatic("module"))
    for name, gate in model.gates.items():
        gate.weights.copy_(torch.tensor([2.0, 0.0, -1.0]) if name == "layers.1.mlp.up_proj" else torch.zeros(3))
    chosen = [
        type(adapter)(
            adapter.name,
            adapter.source,
            adapter.config,
            {name: update for name, update in adapter.modules.items() if name == "model.layers.1.mlp.up_proj"},
            adapter.digest,
        )
        for adapter in adapters
    ]
    expected = merged_model(base, chosen, [2.0, 0.0, -1.0])(random_ids()).logits
    assert relative_error(model(random_ids()).logits, expected) < 1e-9


@pytest.mark.parametrize("granularity", ["task", "layer", "module"])
def test_the_gradient_is_that_of_finite_differences(granularity):
    # Llama's norm is float32 whatever the model is, too coarse for differences.
    _, _, model = fused(LearnedStatic(granularity), "gpt2")
    ids, gate = random_ids(), list(model.gates.values())[-1]
    exact_loss(model, ids).backward()
    step = 1e-5
    for position in range(3):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                gate.weights[position] += sign * step
                losses.append(exact_loss(model, ids).item())
                gate.weights[position] -= sign * step
        expected = (losses[0] - losses[1]) / (2 * step)
        assert gate.weights.grad[position].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("start", "best", "expected"),
    [
        ("best", None, [1 / 3, 1 / 3, 1 / 3]),
        ("best", "math", [0, 1, 0]),
        ("average", "math", [1 / 3, 1 / 3, 1 / 3]),
        ("code", "math", [0, 0, 1]),
        ({"zh": 0.7, "code": -2}, "math", [0.7, 0, -2]),
    ],
)
def test_it_starts_as_lora_flow_does(start, best, expected):
    method = LearnedStatic(start=start)
    assert method.start_weights(NAMES, best) == pytest.approx(expected)
    assert method.start_weights(NAMES, best) == LoraFlow(start=start).start_weights(NAMES, best)
    alone = {"zh": [1, 0, 0], "math": [0, 1, 0], "code": [0, 0, 1]}
    assert method.starts(NAMES) == (alone if start == "best" else {})
    gate = method.gate(Site(NAMES, 8, 2))
    gate.start_at(method.start_weights(NAMES, best))
    assert gate(torch.randn(2, 5, 8)).tolist() == pytest.approx(expected)


@torch.no_grad()
def test_an_untrained_one_is_the_static_method_of_its_start():
    _, _, model = fused(LearnedStatic("layer", {"zh": 0.5, "code": -1.0}))
    found = model(random_ids()).logits
    with model.using(Static({"zh": 0.5, "code": -1.0})):
        assert torch.equal(model(random_ids()).logits, found)


CAT = LearnedStatic("module", "average", "softmax")


def test_cat_is_a_softmax_of_one_scalar_for_each_linear_and_adapter():
    base, adapters, model = fused(CAT)
    assert len(model.gates) == 21
    ids = random_ids()
    with torch.no_grad():
        start = model(ids).logits
        assert relative_error(start, merged_model(base, adapters, [1 / 3] * 3)(ids).logits) < 1e-6
        generator = torch.Generator().manual_seed(1)
        logits = {name: torch.randn(3, generator=generator) for name in model.gates}
        expected = copy.deepcopy(base)
        for name, gate in model.gates.items():
            gate.weights.copy_(logits[name])
            raised = [math.exp(value) for value in logits[name].tolist()]
            linear = expected.get_submodule(f"model.{name}")
            for adapter, one in zip(adapters, raised, strict=True):
                update = adapter.modules[f"model.{name}"]
                linear.weight += one / sum(raised) * update.scaling * update.lora_B.double() @ update.lora_A.double()
        assert relative_error(model(ids).logits, expected(ids).logits) < 1e-6
    exact_loss(model, ids).backward()
    # The weights sum to 1 whatever the logits are, so raising all of them alike changes nothing.
    assert all(abs(gate.weights.grad.sum()) < 1e-6 < gate.weights.grad.abs().max() for gate in model.gates.values())


def test_cat_learns_by_its_own_recipe():
    config = FitConfig.for_method(CAT)
    assert (config.learning_rate, config.epochs, config.weight_decay) == (1e-4, 1, 0.0)
    # 100 steps of one epoch over 10,000 examples.
    assert config.warmup * 10_000 / config.batch_size == 100
    gate = LearnedStatic("module", {"zh": 0.5, "math": 0.25, "code": 0.25}, "softmax").gate(Site(NAMES, 8, 2))
    assert gate(torch.randn(2, 8)).tolist() == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: LearnedStatic(activation="tanh"), "`activation` is unknown: 'tanh'. Known: 'none', 'softmax'."),
        (lambda: LearnedStatic(activation="softmax").check(NAMES), "`start` (='best') is nothing that"),
        (lambda: LearnedStatic(start="zh", activation="softmax").check(NAMES), "`start` (='zh') is nothing that"),
        (
            lambda: LearnedStatic(start={"zh": 0.5, "math": 0.5}, activation="softmax").check(NAMES),
            "weights above 0, of all adapters, that sum to 1. Give `start='average'`, or such weights by name.",
        ),
        (lambda: LearnedStatic("step"), "`granularity` is unknown: 'step'. Known: 'layer', 'module', 'task'."),
        (lambda: LearnedStatic(start="mth").check(NAMES), "`start` is unknown: 'mth'."),
        (lambda: LearnedStatic(start={"mth": 1}).check(NAMES), "`start` names the unknown adapter 'mth'."),
    ],
)
def test_settings_that_cannot_be_are_refused(make, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        make()


@pytest.mark.parametrize("granularity", ["task", "layer", "module"])
def test_a_logit_of_zero_is_a_weight(granularity):
    base = tiny_model()
    method = LearnedStatic(granularity=granularity, activation="softmax", start="average")
    model = FusedModel.from_adapters(
        base, {"a": random_adapter(base, "a"), "b": random_adapter(base, "b", seed=2)}, method
    )
    for gate in model.gates.values():
        gate.start_at([0.5, 0.5])
        with torch.no_grad():
            gate.weights.sub_(gate.weights[0].clone()).add_(torch.tensor([0.0, 1.0]))
        assert torch.equal(gate.known_weights(), gate(torch.zeros(1, 1, 1)))
    ids = random_ids()
    learning = model(ids).logits
    with torch.no_grad():
        assert relative_error(model(ids).logits, learning) < 1e-6

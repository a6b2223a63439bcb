"""LoRA-Flow's gates: the formula, its gradient and what it keeps, where training starts, sizes as in the paper."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from loraflow import FusedModel, LoraFlow
from loraflow.adapters import Adapter, AdapterSource, LoraModule
from loraflow.core.reference import reference_gate
from loraflow.errors import MethodError
from loraflow.methods.base import Site
from loraflow.methods.flow_gates import FlowGate, GateShape

FEATURES = 12


def random_gate(adapters=3, temperature=1.0, dtype=torch.float64):
    gate = FlowGate(site(range(adapters)), GateShape(temperature)).to(dtype)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    return gate


def site(adapters=("zh", "math"), features=FEATURES):
    return Site(tuple(adapters), features, layers=2)


# ---- The gate ------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(adapters=st.integers(1, 6), temperature=st.floats(0.1, 10), shape=st.sampled_from([(), (5,), (2, 3), (2, 0)]))
def test_the_gate_is_the_papers_formula(adapters, temperature, shape):
    gate, x = random_gate(adapters, temperature), torch.randn(*shape, FEATURES, dtype=torch.float64)
    if not shape:
        x = x[None]
    torch.testing.assert_close(gate(x), reference_gate(x, gate.weight, gate.bias, temperature))


@pytest.mark.parametrize("temperature", [1.0, 1.1])
def test_gradients_are_those_of_the_formula(temperature):
    gate, x = random_gate(temperature=temperature), torch.randn(2, 5, FEATURES, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 5, 3, dtype=torch.float64)
    wanted = (x, gate.weight, gate.bias)
    found = torch.autograd.grad(gate(x), wanted, direction)
    expected = torch.autograd.grad(reference_gate(x, gate.weight, gate.bias, temperature), wanted, direction)
    torch.testing.assert_close(found, expected)


def test_the_gate_reads_bfloat16_and_answers_in_its_own_precision():
    gate, x = random_gate(dtype=torch.float32), torch.randn(2, 5, FEATURES).bfloat16()
    weights = gate(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, reference_gate(x, gate.weight, gate.bias))


def test_the_gate_keeps_its_precision_under_autocast():
    gate, x = random_gate(dtype=torch.float32), torch.randn(2, 5, FEATURES, requires_grad=True)
    direction, wanted = torch.randn(2, 5, 3), (x, gate.weight, gate.bias)
    with torch.autocast("cpu", torch.bfloat16):
        weights = gate(x)
    torch.testing.assert_close(weights, reference_gate(x, gate.weight, gate.bias))
    # As trainers do: the backward runs outside.
    found = torch.autograd.grad(weights, wanted, direction)
    expected = torch.autograd.grad(reference_gate(x, gate.weight, gate.bias), wanted, direction)
    torch.testing.assert_close(found, expected)


def test_no_float32_copy_of_the_input_is_kept():
    gate, x = random_gate(dtype=torch.float32), torch.randn(2, 50, FEATURES).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gate(x).sum().backward()
    wide = [t for t in kept if t.shape[-1] == FEATURES and t.data_ptr() != gate.weight.data_ptr()]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()]
    assert x.grad.dtype == torch.bfloat16


def test_weights_may_be_negative_and_need_not_sum_to_one():
    gate = FlowGate(site(), GateShape())
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([-1.0, 0.25]))
    torch.testing.assert_close(gate(torch.randn(4, FEATURES)), torch.tensor([-0.5, 0.75]).expand(4, 2))


# ---- Where training starts -----------------------------------------------------------------------------------------


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
def test_start_weights(start, best, expected):
    assert LoraFlow(start=start).start_weights(["zh", "math", "code"], best) == pytest.approx(expected)


@settings(max_examples=30)
@given(weights=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6), temperature=st.floats(0.1, 10))
def test_an_untrained_gate_gives_exactly_the_start_weights(weights, temperature):
    names = [f"adapter{i}" for i in range(len(weights))]
    gate = LoraFlow(temperature=temperature, start=dict(zip(names, weights, strict=True))).gate(site(names))
    x = 100 * torch.randn(2, 3, FEATURES)
    torch.testing.assert_close(gate(x), torch.tensor(weights).expand(2, 3, -1), rtol=0, atol=5e-7)


def test_starting_again_forgets_what_was_learned():
    gate = random_gate(dtype=torch.float32)
    gate.start_at([0.0, 1.0, 0.0])
    torch.testing.assert_close(gate(torch.randn(4, FEATURES)), torch.tensor([0.0, 1.0, 0.0]).expand(4, 3))


# ---- Parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("granularity", "place"), [("step", "model"), ("layer", "layer"), ("module", "module")])
def test_granularity_is_where_the_gates_stand(granularity, place):
    assert LoraFlow(granularity=granularity).place == place


def test_parameters_are_json_and_give_an_equal_method():
    method = LoraFlow("module", 1.1, {"zh": 0.5})
    changed = {"granularity": "module", "temperature": 1.1, "start": {"zh": 0.5}}
    assert method.parameters() == {**LoraFlow().parameters(), **changed}
    assert LoraFlow(**method.parameters()) == method


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"granularity": "token"}, "`granularity` is unknown: 'token'. Known: 'layer', 'module', 'step'."),
        ({"granularity": "layers"}, "Did you mean 'layer'?"),
        ({"temperature": 0}, "`temperature` (=0) must be a positive number."),
        ({"temperature": -1.0}, "`temperature` (=-1.0) must be a positive number."),
        ({"temperature": float("inf")}, "`temperature` (=inf) must be a positive number."),
        ({"temperature": float("nan")}, "`temperature` (=nan) must be a positive number."),
    ],
)
def test_settings_that_cannot_be_are_refused(parameters, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        LoraFlow(**parameters)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("mth", "`start` is unknown: 'mth'. Known: 'average', 'best', 'math', 'zh'. Did you mean 'math'?"),
        ({"mth": 1.0}, "`start` names the unknown adapter 'mth'. Known: 'math', 'zh'. Did you mean 'math'?"),
        ({"math": float("nan")}, "`start` gives adapter 'math' the weight nan; it must be a finite number."),
    ],
)
def test_a_start_must_be_one_of_the_fusions(start, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        LoraFlow(start=start).check(["zh", "math"])


@pytest.mark.parametrize("start", ["best", "average", "math", {}, {"zh": -1}])
def test_starts_of_the_fusion_are_fine(start):
    LoraFlow(start=start).check(["zh", "math"])


# ---- Sizes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_2_7b():
    """Llama-2-7B without its weights, with two adapters of rank 1 on all of its linears."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)
    modules = {
        name: LoraModule(torch.zeros(1, linear.in_features), torch.zeros(linear.out_features, 1), 1.0)
        for name, linear in base.named_modules()
        if isinstance(linear, torch.nn.Linear) and name != "lm_head"
    }
    config = LoraConfig(r=1, target_modules=list(modules))
    return FusedModel.from_adapters(
        base, {n: Adapter(n, AdapterSource(n), config, modules, "none") for n in ("zh", "math")}
    )


@pytest.mark.parametrize(
    ("granularity", "gates", "learned"), [("step", 1, 8_194), ("layer", 32, 262_208), ("module", 224, 2_277_824)]
)
def test_two_adapters_on_llama_2_7b_learn_as_many_values_as_in_the_paper(llama_2_7b, granularity, gates, learned):
    llama_2_7b.set_method(LoraFlow(granularity=granularity))
    assert len(llama_2_7b.gates) == gates
    assert llama_2_7b.num_learned_parameters() == learned
    assert sum(p.numel() for p in llama_2_7b.parameters() if p.requires_grad) == learned
    assert sum(value.numel() for value in llama_2_7b.state_dict().values()) == learned

"""Adapters on top of a fusion: their weight is 1 with any method below, and what cannot be below is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraflow import FusedModel
from loraflow.core.reference import reference_linear
from loraflow.errors import MethodError
from loraflow.export import constant_weights
from loraflow.methods import (
    AdapterCore,
    Average,
    Base,
    LearnedStatic,
    LoraFlow,
    LoraHub,
    Method,
    OnTop,
    Phatgoose,
    QaFlora,
    Static,
    make_method,
)
from loraflow.methods.base import FewWeights, KnownWeights, Site
from loraflow.methods.on_top import OnTopGate, put_on_top
from loraflow.methods.static import ConstantGate
from loraflow.training.learners import learner_of
from tests.tiny import merged_model, random_adapter, random_ids, relative_error, set_random_gates, tiny_model

GATED = [
    LoraFlow(),
    LoraFlow(granularity="step"),
    LoraFlow(granularity="module"),
    LoraFlow(top_k=1, activation="softmax"),
    LearnedStatic("module"),
    Average(),
]


def fused(method: Method | str, k: int, architecture: str = "llama", kind: str = "plain") -> FusedModel:
    """A fusion of k adapters and one more, of unlike ranks and targets, in float64."""
    base = tiny_model(architecture, torch.float64)
    targets = (
        [["q_proj", "v_proj"], None, ["down_proj"], ["o_proj", "up_proj"]] if architecture == "llama" else [None] * 4
    )
    own = {name: random_adapter(base, name, targets[i], r=i + 1, seed=i) for i, name in enumerate("abcd"[:k])}
    own["top"] = random_adapter(
        base, "top", ["q_proj", "gate_proj"] if architecture == "llama" else None, 3, kind, seed=9
    )
    model = FusedModel.from_adapters(base, own, method)
    set_random_gates(model)
    return model


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("below", GATED, ids=repr)
def test_each_linear_is_the_loop_over_the_adapters(below: Method, k: int) -> None:
    model = fused(OnTop(below, ("top",)), k)
    prefix, seen = model.attachment.layers.prefix, []

    def note(linear: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen.append((linear, args[0], output.clone()))

    names = list(model.attachment.sites["module"])
    linears = {name: model.base_model.get_submodule(f"{prefix}.{name.removeprefix('layers.')}") for name in names}
    handles = [linear.register_forward_hook(note) for linear in linears.values()]
    ids = random_ids()
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    trace = model.trace(ids)
    assert len(seen) == len(linears)
    for linear, x, output in seen:
        (name,) = (name for name, one in linears.items() if one is linear)
        layer = int(name.split(".")[1])
        weights = trace.module_weights.get(name, trace.weights[:, :, layer]).double()
        assert torch.equal(weights[..., -1], torch.ones_like(weights[..., -1]))
        modules = [adapter.modules.get(f"{prefix}.{name.removeprefix('layers.')}") for adapter in model.adapters]
        expected = reference_linear(x, linear.weight, linear.bias, modules, weights)
        # Weights are noted in float32.
        assert relative_error(output, expected) < 1e-6


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "plain"), ("llama", "dora"), ("gpt2", "rslora")])
def test_constant_weights_are_those_of_a_merged_base(architecture: str, kind: str) -> None:
    model = fused(OnTop(Average(), ("top",)), 2, architecture, kind)
    merged = merged_model(tiny_model(architecture, torch.float64), model.adapters, [0.5, 0.5, 1.0])
    with torch.no_grad():
        assert relative_error(model(random_ids()).logits, merged(random_ids()).logits) < 1e-9
    found = constant_weights(model)
    assert all(weights.tolist() == [0.5, 0.5, 1.0] for weights in found.values())


def test_no_weight_below_leaves_what_is_on_top() -> None:
    model = fused(OnTop(LearnedStatic("module"), ("top",)), 2)
    with torch.no_grad():
        for gate in model.gates.values():
            for parameter in gate.parameters():
                parameter.zero_()
        alone = merged_model(tiny_model(dtype=torch.float64), model.adapters, [0.0, 0.0, 1.0])
        assert relative_error(model(random_ids()).logits, alone(random_ids()).logits) < 1e-9


def test_several_on_top_of_each_other() -> None:
    twice = put_on_top(put_on_top(LoraFlow(), "x"), "y")
    assert twice == OnTop(LoraFlow(), ("x", "y"))
    assert put_on_top(Static({"a": 0.5}), "x") == Static({"a": 0.5, "x": 1.0})
    layers = put_on_top(Static([{"a": 0.5}, {"a": 2.0}]), "x")
    assert layers == Static([{"a": 0.5, "x": 1.0}, {"a": 2.0, "x": 1.0}])


@given(
    st.sampled_from([LoraFlow("module"), Phatgoose(), LearnedStatic("layer"), Average()]),
    st.lists(st.text(min_size=1), min_size=1, max_size=3, unique=True),
)
def test_parameters_make_an_equal_method(below: Method, names: list[str]) -> None:
    method = OnTop(below, tuple(names))
    assert make_method(method.name, method.parameters()) == method
    assert pickle.loads(pickle.dumps(method)) == method == copy.deepcopy(method)
    assert (method.name, method.level, method.place) == (below.name, below.level, below.place)
    assert (method.learns is None) == (below.learns is None)


def test_gates_say_what_they_use() -> None:
    site = Site(("a", "b", "c"), 4, 1)
    assert isinstance(OnTop(LearnedStatic("layer"), ("c",)).gate(site), KnownWeights)
    few = OnTop(LoraFlow(top_k=1, activation="softmax"), ("c",)).gate(site)
    assert isinstance(few, FewWeights)
    assert few.most == 2


def test_a_batch_mixes_fusions_with_and_without() -> None:
    model = fused(OnTop(LoraFlow(granularity="module"), ("top",)), 2)
    ids = random_ids(3)
    rows = [None, {"a": 0.5, "top": 2.0}, "base"]
    with torch.no_grad():
        together = model(ids, methods=rows).logits
        own = model(ids[:1]).logits
        with model.using(rows[1]):
            given = model(ids[1:2]).logits
        with model.using("base"):
            bare = model(ids[2:]).logits
    assert relative_error(together, torch.cat([own, given, bare])) < 1e-9


REFUSED = {
    "query": (QaFlora(), r"'qa-flora' reads whole prompts .* takes no adapter on top \(`on_top` = \['x'\]\)"),
    "adds": (AdapterCore("a"), r"'adapter-core' adds updates of its own, .*Export the fusion as one adapter"),
    "mixes": (LoraHub(), r"'lorahub' mixes parameters, .*Export the fusion as one adapter"),
    "base": (Base(), r"'base' has no adapters at work"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nothing_can_be_on_top_of(case: str) -> None:
    below, message = REFUSED[case]
    with pytest.raises(MethodError, match=message):
        put_on_top(below, "x")


def test_wrong_names_are_refused() -> None:
    for names, message in (("x", "must be a list"), ([], "at least one"), (["x", "x"], "twice"), ([1], "a list of")):
        with pytest.raises(MethodError, match=message):
            make_method("lora-flow", {"on_top": names})
    with pytest.raises(MethodError, match=r"Static weights take no `on_top` \(=\['x'\]\)"):
        make_method("static", {"weights": {"a": 1.0}, "on_top": ["x"]})
    method = OnTop(Average(), ("x",))
    for adapters in (["x"], ["x", "a"], ["a", "b"]):
        with pytest.raises(MethodError, match=r"`on_top` \(=\['x'\]\) must name the last of the adapters"):
            method.check(adapters)
    method.check(["a", "x"])


def test_gates_below_are_not_fitted_again() -> None:
    with pytest.raises(MethodError, match="The fusion has 'x' on top of 'lora-flow', trained over its gates"):
        learner_of(OnTop(LoraFlow(), ("x",)))


def test_weights_of_rows_are_widened_too() -> None:
    gate = OnTopGate(ConstantGate([0.5, 2.0]), 2)
    assert gate(torch.zeros(5, 3, 4)).tolist() == [0.5, 2.0, 1.0, 1.0]
    assert gate.widened(torch.zeros(5, 2)).tolist() == [[0.0, 0.0, 1.0, 1.0]] * 5

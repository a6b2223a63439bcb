"""Constant fusion weights, and how methods are found by name."""

from __future__ import annotations

import re

import pytest
import torch

from loraflow import Average, Base, LoraFlow, Static
from loraflow.errors import MethodError
from loraflow.methods import METHODS, Method, get_method
from loraflow.methods.base import Site

NAMES = ("zh", "math", "code")
SITE = Site(NAMES, features=8, layers=2)
ALL = [Base(), Average(), Static({"zh": 0.5, "code": -1}), LoraFlow()]


def weights_of(method):
    return method.gate(SITE)(torch.randn(2, 5, 8))


def test_average():
    torch.testing.assert_close(weights_of(Average()), torch.full((3,), 1 / 3))


def test_static_gives_unnamed_adapters_nothing():
    assert weights_of(Static({"code": -1, "zh": 0.5})).tolist() == [0.5, 0, -1]
    assert weights_of(Static()).tolist() == [0, 0, 0]


def test_base_has_no_gate():
    assert Base().gate(SITE) is None


@pytest.mark.parametrize("method", [Average(), Static({"zh": 1})])
def test_constants_are_neither_learned_nor_saved(method):
    gate = method.gate(SITE)
    assert not method.learns
    assert list(gate.parameters()) == []
    assert gate.state_dict() == {}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (
            {"maths": 1.0},
            "`weights` names the unknown adapter 'maths'. Known: 'code', 'math', 'zh'. Did you mean 'math'?",
        ),
        ({"zh": float("nan")}, "`weights` gives adapter 'zh' the weight nan; it must be a finite number."),
        ({"zh": float("-inf")}, "`weights` gives adapter 'zh' the weight -inf; it must be a finite number."),
    ],
)
def test_weights_must_be_finite_and_of_the_fusions_adapters(weights, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        Static(weights).check(NAMES)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_the_registry_gives_an_equal_method_from_the_saved_parameters(method):
    assert METHODS[method.name] is type(method)
    assert get_method(method.name, NAMES, method.parameters()) == method


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_methods_keep_the_contract(method):
    assert isinstance(method, Method)
    assert method.place in ("model", "layer", "module")
    gate = method.gate(SITE)
    if gate is not None:
        assert gate(torch.randn(2, 5, 8)).shape in [(3,), (2, 5, 3)]
        assert (method.learns is not None) == any(True for _ in gate.parameters())


def test_a_method_object_is_taken_as_it_is():
    method = Static({"zh": 1.0})
    assert get_method(method, NAMES) is method


def test_an_adapters_name_is_that_adapter_alone():
    assert get_method("math", NAMES) == Static({"math": 1.0})
    assert weights_of(get_method("math", NAMES)).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        (
            "averag",
            {},
            "Unknown method 'averag'. Known: 'adapter-core', 'arrow', 'average', 'base', 'centroid', 'code', ",
        ),
        (
            "lora-flow",
            {"temprature": 2},
            "Method 'lora-flow' has no parameter 'temprature'. Known: 'activation', 'granularity', 'reads', 'scorer', ",
        ),
        ("average", {"weights": {}}, "Method 'average' has no parameter 'weights'. Known: none."),
        ("math", {"weights": {}}, "'math'"),
        (Average(), {"x": 1}, "Parameters ['x'] were given beside a method object. Set them on the object."),
        (Static({"xx": 1}), {}, "`weights` names the unknown adapter 'xx'."),
        ("lora-flow", {"start": "xx"}, "`start` is unknown: 'xx'."),
    ],
)
def test_methods_that_cannot_be_are_refused(method, parameters, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        get_method(method, NAMES, parameters)

"""Arrow: directions and routing by the formula, and against PEFT's own router."""

from __future__ import annotations

import copy
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import ArrowConfig, create_arrow_model

from loraflow import FusedModel
from loraflow.adapters import LoraModule
from loraflow.errors import MethodError
from loraflow.methods import Arrow
from loraflow.methods._shared.scores import main_input_direction
from loraflow.methods.base import Site
from tests.tiny import edit_tensors, random_adapter, random_ids, relative_error, save_adapter, tiny_model

FEATURES = 12


def update(r, features=FEATURES, out_features=9):
    return LoraModule(torch.randn(r, features), torch.randn(out_features, r), 1.0)


def slow_weights(x, directions, top_k, temperature):
    """The formula in loops; None where an adapter does not target the linear."""
    scores = [None if v is None else abs(sum(a * b for a, b in zip(x, v, strict=True))) for v in directions]
    kept = sorted((score for score in scores if score is not None), reverse=True)[:top_k]
    exponentials = [math.exp((s - kept[0]) / temperature) if s in kept else 0.0 for s in scores]
    return [value / sum(exponentials) for value in exponentials]


@settings(max_examples=60)
@given(
    ranks=st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=5).filter(any),
    top_k=st.none() | st.integers(1, 5),
    temperature=st.floats(0.1, 10),
    shape=st.sampled_from([(4,), (2, 3), (2, 0)]),
)
def test_the_gate_is_the_formula(ranks, top_k, temperature, shape):
    updates = tuple(r and update(r) for r in ranks)
    site = Site(tuple(f"a{i}" for i in range(len(ranks))), FEATURES, 2, 0, "q", {"q": updates})
    top_k = top_k and min(top_k, len(ranks))
    gate = Arrow(top_k, temperature).gate(site).double()
    x = torch.randn(*shape, FEATURES, dtype=torch.float64)
    directions = [
        m and torch.linalg.svd(m.lora_B.double() @ m.lora_A.double(), full_matrices=False).Vh[0].tolist()
        for m in updates
    ]
    rows = [
        slow_weights(row, directions, top_k or min(3, len(ranks)), temperature)
        for row in x.reshape(-1, FEATURES).tolist()
    ]
    expected = torch.tensor(rows, dtype=torch.float64).reshape(*shape, len(ranks))
    torch.testing.assert_close(gate(x), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(r=st.integers(1, 20), features=st.integers(1, 15), out_features=st.integers(1, 15))
def test_the_main_direction_is_the_top_right_singular_vector(r, features, out_features):
    module = update(r, features, out_features)
    expected = torch.linalg.svd(module.lora_B @ module.lora_A).Vh[0]
    found = main_input_direction(module)
    torch.testing.assert_close(found.norm(), torch.tensor(1.0))
    torch.testing.assert_close(found * (found @ expected).sign(), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_each_linear_routes_its_own_input(architecture):
    base = tiny_model(architecture, torch.float64)
    adapters = [random_adapter(base, f"a{i}", r=i + 1, seed=i) for i in range(4)]
    model = FusedModel.from_adapters(copy.deepcopy(base), {a.name: a for a in adapters}, Arrow(2, 0.5))
    prefix, ids = model.attachment.layers.prefix, random_ids()

    def route(linear, args, output, name):
        x = args[0]
        updates = [adapter.modules[name] for adapter in adapters]
        directions = [torch.linalg.svd(m.lora_B.double() @ m.lora_A.double()).Vh[0].tolist() for m in updates]
        rows = [slow_weights(row, directions, 2, 0.5) for row in x.reshape(-1, x.shape[-1]).tolist()]
        w = torch.tensor(rows, dtype=x.dtype).reshape(*x.shape[:-1], 4)
        for i, m in enumerate(updates):
            output = output + w[..., i : i + 1] * m.scaling * (x @ m.lora_A.double().T @ m.lora_B.double().T)
        return output

    for name in adapters[0].modules:
        assert name.startswith(prefix)
        base.get_submodule(name).register_forward_hook(
            lambda linear, args, output, name=name: route(linear, args, output, name)
        )
    assert relative_error(model(ids).logits, base(ids).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (3, 0.3)])
def test_routing_is_that_of_peft(top_k, temperature, tmp_path):
    base = tiny_model()

    def dominate(tensors):
        # PEFT's power iteration stops early; one direction that stands out is found all the same.
        for name, tensor in tensors.items():
            if "lora_A" in name:
                tensor[0] *= 6

    paths = []
    for seed in range(3):
        paths.append(save_adapter(base, tmp_path / f"a{seed}", seed=seed, r=4, lora_alpha=2 + 4 * seed))
        edit_tensors(paths[-1], dominate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
        theirs = create_arrow_model(copy.deepcopy(base), paths, config).eval()
    adapters = dict(zip("abc", paths, strict=True))
    ours = FusedModel.from_adapters(copy.deepcopy(base), adapters, Arrow(top_k, temperature))
    expected = theirs(random_ids()).logits
    assert relative_error(ours(random_ids()).logits, expected) < 1e-3
    with ours.using("average"):
        assert relative_error(ours(random_ids()).logits, expected) > 0.05


def test_directions_are_neither_learned_nor_saved():
    base = tiny_model()
    model = FusedModel.from_adapters(base, {"a": random_adapter(base, "a")}, "arrow")
    assert model.state_dict() == {}
    assert model.num_learned_parameters() == 0


@pytest.mark.parametrize(("adapters", "expected"), [(1, 1), (2, 2), (5, 3)])
def test_the_papers_three_or_all_where_there_are_fewer(adapters, expected):
    site = Site(
        tuple(f"a{i}" for i in range(adapters)), FEATURES, 1, 0, "q", {"q": tuple(update(2) for _ in range(adapters))}
    )
    weights = Arrow().gate(site)(torch.randn(7, FEATURES))
    assert ((weights > 0).sum(dim=-1) == expected).all()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Arrow(temperature=-1), "`temperature` (=-1) must be a positive number."),
        (lambda: Arrow(top_k=3).check(["a", "b"]), "`top_k` (=3) must be between 1 and the number of adapters (=2)."),
        (lambda: Arrow(top_k=True).check(["a", "b"]), "`top_k` (=True) must be between 1"),
        (lambda: Arrow(top_k=1.5).check(["a", "b"]), "`top_k` (=1.5) must be between 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        make()

"""Scores from what adapters have read: those of the input, for any ranks, and none where rounding would tell."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import Arrow, Lag, NormMax, SpectR
from loraflow.adapters import LoraModule
from loraflow.errors import MethodError
from loraflow.methods._shared.projections import MOST_AMPLIFIED, output_length, right_singular
from loraflow.methods.base import Site
from loraflow.methods.slots import Shortlists, WeighsSlots
from tests.methods.routers import singular, slow_weights

FEATURES, OUT = 12, 9
NAMES = [f"a{i}" for i in range(5)]
METHODS = [
    Arrow(2, 0.5),
    SpectR(2),
    SpectR(2, True, "softmax", 0.5),
    NormMax(),
    NormMax(2, "softmax", 0.3),
    Lag(1),
    Lag(2, {"x": NAMES[:2], "y": NAMES[2:]}),
]
methods = pytest.mark.parametrize("method", METHODS, ids=str)
KINDS = ["plain", "deficient A", "deficient B", "zero B", "zero A", "no scaling", "negative", "dora", "bias", "absent"]


def update(kind, rank=3, features=FEATURES):
    """One adapter's update of a linear, of a kind that a folder of adapters may hold."""
    A, B = torch.randn(rank, features).double(), torch.randn(OUT, rank).double()
    if kind == "absent":
        return None
    if kind == "deficient A" and rank > 1:
        A[1] = 2 * A[0]
    if kind == "deficient B" and rank > 1:
        B[:, 1] = -B[:, 0]
    if kind == "zero B":
        B.zero_()
    if kind == "zero A":
        A.zero_()
    scaling = {"no scaling": 0.0, "negative": -1.5}.get(kind, 0.7)
    return LoraModule(
        A,
        B,
        scaling,
        bias=torch.randn(OUT).double() if kind == "bias" else None,
        magnitude=torch.rand(OUT).double() if kind == "dora" else None,
    )


def site_of(updates):
    return Site(tuple(NAMES[: len(updates)]), FEATURES, 2, 0, "q", {"q": tuple(updates)})


def read(updates, x):
    """What the fused pass has: A x of all adapters side by side, 1 where there is a `lora_bias`."""
    parts, starts = [], []
    for found in updates:
        starts.append(sum(part.shape[-1] for part in parts))
        if found is not None:
            parts.append(x @ found.lora_A.T)
            if found.bias is not None:
                parts.append(x.new_ones(*x.shape[:-1], 1))
    return torch.cat(parts, dim=-1), tuple(starts)


def slow(method, x, updates):
    rows = [slow_weights(method, row, updates, NAMES) for row in x.reshape(-1, FEATURES)]
    return torch.tensor(rows, dtype=torch.float64).reshape(*x.shape[:-1], len(updates))


@methods
@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 14)), min_size=5, max_size=5).filter(
        lambda kinds: any(kind != "absent" for kind, _ in kinds)
    ),
    shape=st.sampled_from([(4,), (2, 3), (2, 0)]),
    seed=st.integers(0, 9999),
)
def test_weights_are_the_formula_from_the_input_and_from_what_was_read(method, kinds, shape, seed):
    torch.manual_seed(seed)
    updates, x = [update(*kind) for kind in kinds], torch.randn(*shape, FEATURES, dtype=torch.float64)
    gate, expected = method.gate(site_of(updates)), slow(method, x, updates)
    torch.testing.assert_close(gate(x), expected, rtol=1e-8, atol=1e-8)
    if gate.by_slots:
        torch.testing.assert_close(gate.weigh_slots(*read(updates, x)), expected, rtol=1e-8, atol=1e-8)
    assert ((expected != 0).sum(dim=-1) <= gate.most).all()


@methods
def test_nothing_as_wide_as_the_input_is_kept_while_it_is_not_needed(method):
    gate = method.gate(site_of([update("plain") for _ in NAMES]))
    assert isinstance(gate, WeighsSlots)
    assert isinstance(gate, Shortlists) == isinstance(method, Lag)
    assert gate.by_slots
    assert all(FEATURES not in buffer.shape for buffer in gate.buffers())
    assert not gate.state_dict()
    gate(torch.randn(1, FEATURES, dtype=torch.float64))
    assert any(FEATURES in buffer.shape for buffer in gate.buffers())


def test_the_rows_are_the_singular_vectors():
    for kind in KINDS[:5]:
        found = right_singular(update(kind))
        module = update(kind)
        found, (S, Vh) = right_singular(module), singular(module)
        assert found.rows.shape == Vh.shape, kind
        torch.testing.assert_close(found.small @ module.lora_A, found.rows)
        torch.testing.assert_close((found.rows @ Vh.T).abs(), torch.eye(len(S), dtype=torch.float64))


@given(rank=st.integers(1, 14), factor=st.floats(-3, 3), seed=st.integers(0, 99))
def test_the_length_of_an_output_is_that_of_the_product(rank, factor, seed):
    torch.manual_seed(seed)
    module, x = update("plain", rank), torch.randn(FEATURES, dtype=torch.float64)
    found = output_length(module, factor)
    expected = abs(factor) * torch.linalg.vector_norm(module.lora_B @ (module.lora_A @ x))
    torch.testing.assert_close(torch.linalg.vector_norm(found.rows @ x), expected)
    torch.testing.assert_close(torch.linalg.vector_norm(found.small @ (module.lora_A @ x)), expected)


def conditioned(number):
    """An update whose A has this condition number, and whose B A answers most where A is weakest."""
    module = update("plain")
    U, _, Vh = torch.linalg.svd(module.lora_A, full_matrices=False)
    S = torch.tensor([1.0, 1.0, 1 / number], dtype=torch.float64)
    B = module.lora_B @ torch.diag(1 / S**2) @ U.T
    return dataclasses.replace(module, lora_A=U @ torch.diag(S) @ Vh, lora_B=B)


@pytest.mark.parametrize("method", [Arrow(1), SpectR(1), Lag(1)], ids=str)
def test_where_rounding_would_be_amplified_the_input_is_scored(method):
    torch.manual_seed(0)
    assert right_singular(conditioned(20)).amplifies(conditioned(20).lora_A) == pytest.approx(20)
    x = torch.randn(5, FEATURES, dtype=torch.float64)
    for number, by_slots in [(0.5 * MOST_AMPLIFIED, True), (2 * MOST_AMPLIFIED, False), (1e5, False)]:
        updates = [conditioned(number), update("plain")]
        gate = method.gate(site_of(updates))
        assert gate.by_slots is by_slots
        torch.testing.assert_close(gate(x), slow(method, x, updates), rtol=1e-7, atol=1e-7)
        if not by_slots:
            # It is ready for graphs, which cannot make anything.
            assert gate.rows is not None
            single = method.gate(site_of(updates)).float()
            assert torch.equal(single(x.float()) > 0, gate(x) > 0)


@methods
def test_single_precision_amplifies_rounding_a_little_at_most(method):
    torch.manual_seed(1)
    updates = [update("plain", 4) for _ in NAMES]
    gate, x = method.gate(site_of(updates)).float(), torch.randn(50, FEATURES)
    u, starts = read([dataclasses.replace(m, lora_A=m.lora_A.float()) for m in updates], x)
    found, expected = gate.weigh_slots(u, starts), slow(method, x.double(), updates)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gate.weigh_slots(u, starts), found)
        torch.testing.assert_close(gate(x), found, rtol=1e-3, atol=1e-4)


@methods
@pytest.mark.parametrize("kind", ["zero A", "zero B", "no scaling"])
def test_adapters_that_add_nothing_are_never_chosen_and_give_finite_gradients(method, kind):
    updates = [update(kind), update("plain"), update(kind), update("plain"), update("plain")]
    gate = method.gate(site_of(updates))
    for x in (torch.randn(6, FEATURES, dtype=torch.float64), torch.zeros(2, FEATURES, dtype=torch.float64)):
        x.requires_grad_()
        weights = gate(x)
        assert not weights[:, [0, 2]].any()
        assert (weights.sum(dim=-1) > 0).all()
        if weights.requires_grad:
            (weights * torch.randn_like(weights)).sum().backward()
            assert x.grad.isfinite().all()
    nobody = method.gate(site_of([update(kind) for _ in NAMES]))
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    assert torch.equal(nobody(x), torch.zeros(2, 3, 5, dtype=torch.float64))
    assert torch.equal(nobody.weigh_slots(*read(nobody.updates, x)), torch.zeros(2, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("method", [SpectR(), NormMax(), Lag()], ids=str)
def test_experts_are_refused(method):
    experts = LoraModule(torch.randn(4, FEATURES), torch.randn(OUT, 4), 1.0, experts=2)
    expected = rf"'q' of decoder layer 0 are matrices of experts, .*The method '{method.name}' takes adapters of linear"
    with pytest.raises(MethodError, match=expected):
        method.gate(site_of([experts, update("plain")]))


def test_arrow_takes_experts_by_their_input():
    experts = LoraModule(torch.randn(4, FEATURES), torch.randn(OUT, 4), 1.0, experts=2)
    gate = Arrow(1).gate(site_of([experts, update("plain")]))
    assert not gate.by_slots
    assert (gate(torch.randn(3, FEATURES).double()) > 0).sum() == 3

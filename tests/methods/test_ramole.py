"""RAMoLE: the router's formula, its gradients, adapters that join later, and those that are left out in training."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel
from loraflow.adapters import LoraModule
from loraflow.errors import MethodError
from loraflow.methods import Ramole
from loraflow.methods.base import Site
from tests.tiny import (
    ARCHITECTURES,
    block_outputs,
    random_adapter,
    random_ids,
    relative_error,
    set_random_gates,
    tiny_model,
)

FEATURES, WIDTH = 12, 7


def update(rank, kind="plain", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    bias = random(WIDTH) if kind == "lora_bias" else None
    return LoraModule(random(rank, FEATURES), random(WIDTH, rank), 3 / rank, bias)


def site(updates):
    return Site(tuple(f"a{i}" for i in range(len(updates))), FEATURES, 2, 0, "q", {"q": tuple(updates)})


def random_gate(updates, rank=3, seed=0):
    gate = Ramole(rank).gate(site(updates)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in gate.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return gate


def slow_weights(x, updates, lora_A, lora_B):
    """The formula in loops, for one input; an adapter that is None has no part."""

    def times(matrix, vector):
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix.tolist()]

    query = times(lora_A, x)
    scores = []
    for one in updates:
        if one is None:
            scores.append(None)
            continue
        said = times(one.lora_B.double(), times(one.lora_A.double(), x))
        added = [0.0] * len(said) if one.bias is None else one.bias.tolist()
        said = [one.scaling * (value + more) for value, more in zip(said, added, strict=True)]
        key = times(lora_B.T, said)
        scores.append(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)))
    top = max((score for score in scores if score is not None), default=0.0)
    exponentials = [0.0 if score is None else math.exp(score - top) for score in scores]
    total = sum(exponentials) or 1.0
    return [value / total for value in exponentials]


def expected_weights(x, updates, gate):
    rows = [slow_weights(row, updates, gate.lora_A, gate.lora_B) for row in x.reshape(-1, FEATURES).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(*x.shape[:-1], -1)


KINDS = st.sampled_from(["plain", "lora_bias", None])


@settings(max_examples=25)
@given(
    adapters=st.lists(st.tuples(KINDS, st.integers(1, 6)), min_size=1, max_size=5).filter(
        lambda several: any(kind for kind, _ in several)
    ),
    rank=st.integers(1, 9),
    shape=st.sampled_from([(2, 3), (4,), (1, 1)]),
    scale=st.floats(0.01, 30),
)
def test_routing_is_the_formula(adapters, rank, shape, scale):
    updates = [kind and update(r, kind, seed) for seed, (kind, r) in enumerate(adapters)]
    gate, x = random_gate(updates, rank), scale * torch.randn(*shape, FEATURES, dtype=torch.float64)
    expected = expected_weights(x, updates, gate)
    torch.testing.assert_close(gate(x), expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        # What is kept between calls gives the same.
        for _ in range(2):
            torch.testing.assert_close(gate(x), expected, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_the_formula():
    updates = [update(2), update(3, "lora_bias", 1), None]
    gate = random_gate(updates)
    x = torch.randn(4, FEATURES, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(4, 3, dtype=torch.float64)
    said = torch.stack(
        [u.scaling * (x @ u.lora_A.T @ u.lora_B.T + (0 if u.bias is None else u.bias)) for u in updates if u], dim=1
    )
    scores = torch.einsum("tr,tir->ti", x @ gate.lora_A.T, said @ gate.lora_B) / 3**0.5
    plain = torch.cat([scores.softmax(dim=-1), torch.zeros(4, 1, dtype=torch.float64)], dim=-1)
    of = (x, gate.lora_A, gate.lora_B)
    torch.testing.assert_close(
        torch.autograd.grad(gate(x), of, direction), torch.autograd.grad(plain, of, direction), rtol=1e-9, atol=1e-12
    )


def test_before_training_all_that_target_a_linear_weigh_the_same():
    gate = Ramole().gate(site([update(2), None, update(3)]))
    torch.testing.assert_close(gate(torch.randn(4, FEATURES)), torch.tensor([0.5, 0, 0.5]).expand(4, -1))


def test_an_adapter_that_is_zero_has_score_zero():
    nothing = LoraModule(torch.randn(2, FEATURES), torch.zeros(WIDTH, 2), 1.0)
    gate = random_gate([update(2), nothing])
    x = torch.randn(5, FEATURES, dtype=torch.float64)
    torch.testing.assert_close(gate(x), expected_weights(x, [update(2), nothing], gate), rtol=1e-9, atol=1e-12)
    assert gate(x).isfinite().all()


@pytest.mark.parametrize("among", [[True, True, False], [False, False, True], [False, True, False]])
def test_among_some_the_others_count_as_if_they_were_not_there(among):
    updates = [update(2), update(3, seed=1), None]
    gate, x = random_gate(updates), torch.randn(2, 4, FEATURES, dtype=torch.float64, requires_grad=True)
    gate.among = torch.tensor(among)
    alone = [one if there else None for one, there in zip(updates, among, strict=True)]
    torch.testing.assert_close(gate(x), expected_weights(x, alone, gate), rtol=1e-9, atol=1e-12)
    # Where none of them targets the linear, the base answers, and nothing is learned.
    found = torch.autograd.grad(gate(x)[..., :2].square().sum(), (x, gate.lora_A, gate.lora_B))
    assert all(gradient.isfinite().all() for gradient in found)


def test_what_is_kept_between_calls_follows_what_is_learned():
    gate, x = random_gate([update(2), update(3, seed=1)]), torch.randn(3, FEATURES, dtype=torch.float64)
    with torch.inference_mode():
        before = gate(x)
    with torch.no_grad():
        gate.lora_B.mul_(-2)
        after = gate(x)
    assert relative_error(after, before) > 0.01
    torch.testing.assert_close(after, gate(x).detach())
    other = random_gate([update(2), update(3, seed=1)], seed=4)
    gate.load_state_dict(other.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(gate(x), other(x))
        for copied in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
            torch.testing.assert_close(copied(x), other(x))
            copied.lora_B.zero_()
            torch.testing.assert_close(copied(x), torch.full((3, 2), 0.5, dtype=torch.float64))
            torch.testing.assert_close(gate(x), other(x))


@torch.no_grad()
@settings(max_examples=8)
@given(
    architecture=st.sampled_from(["llama", "gpt2", "opt"]),
    kinds=st.lists(st.sampled_from(["plain", "rslora", "lora_bias"]), min_size=1, max_size=4),
    rank=st.integers(1, 5),
    length=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_in_a_model_each_linear_asks_the_adapters_of_its_own_input(architecture, kinds, rank, length, seed):
    base = tiny_model(architecture, torch.float64)
    all_targets = ARCHITECTURES[architecture][1]
    # Every other adapter targets some of the linears only.
    adapters = {
        f"a{i}": random_adapter(base, f"a{i}", all_targets[i % 2 * 2 :], r=i + 1, kind=kind, seed=seed + i)
        for i, kind in enumerate(kinds)
    }
    model = FusedModel.from_adapters(tiny_model(architecture, torch.float64), adapters, Ramole(rank))
    set_random_gates(model, seed)
    sites = model.attachment.sites["module"]
    prefix = next(iter(adapters["a0"].modules)).partition("layers.")[0] if architecture != "gpt2" else "transformer."
    for name, gate in model.gates.items():
        updates = sites[name].updates[sites[name].module]
        module = name.replace("layers.", "h.") if architecture == "gpt2" else name

        def route(_, args, output, updates=updates, gate=gate):
            x = args[0]
            rows = [slow_weights(row, updates, gate.lora_A, gate.lora_B) for row in x.flatten(0, -2).tolist()]
            weights = torch.tensor(rows, dtype=x.dtype).view(*x.shape[:-1], -1)
            for i, u in enumerate(updates):
                if u is not None:
                    said = x @ u.lora_A.double().T @ u.lora_B.double().T + (0 if u.bias is None else u.bias.double())
                    output = output + weights[..., i : i + 1] * u.scaling * said
            return output

        base.get_submodule(f"{prefix}{module}").register_forward_hook(route)
    ids = random_ids(2, length, seed=seed)
    assert relative_error(model(ids).logits, base(ids).logits) < 1e-9


@torch.no_grad()
def test_adapters_that_join_later_are_weighed_untrained():
    base = tiny_model(dtype=torch.float64)
    adapters = {n: random_adapter(base, n, r=i + 1, seed=i) for i, n in enumerate("abcde")}
    first = FusedModel.from_adapters(copy.deepcopy(base), {n: adapters[n] for n in "abc"}, Ramole(3))
    set_random_gates(first)
    learned = first.state_dict()
    joined = FusedModel.from_adapters(copy.deepcopy(base), adapters, Ramole(3))
    joined.load_state_dict(learned)
    assert first.num_learned_parameters() == joined.num_learned_parameters() == sum(v.numel() for v in learned.values())
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    for name, gate in joined.gates.items():
        if gate.lora_A.shape[1] != 32:
            continue
        updates = [adapter.modules[f"model.{name}"] for adapter in adapters.values()]
        rows = [slow_weights(row, updates, gate.lora_A, gate.lora_B) for row in x.reshape(-1, 32).tolist()]
        found = gate(x)
        torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64).view(2, 3, 5), rtol=1e-9, atol=1e-12)
        # Among the first three, the shares are what they were.
        among_first = found[..., :3] / found[..., :3].sum(dim=-1, keepdim=True)
        torch.testing.assert_close(first.gates[name](x), among_first, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_generation_does_not_depend_on_the_batch_or_its_padding():
    base = tiny_model(dtype=torch.float64)
    model = FusedModel.from_adapters(base, {n: random_adapter(base, n, seed=i) for i, n in enumerate("abc")}, "ramole")
    set_random_gates(model)
    ids = random_ids(1, 6)
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 6:]
    padded = torch.cat([torch.nn.functional.pad(ids, (3, 0)), random_ids(1, 9, seed=3)])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[0, 9:], alone)
    beside = model.generate(padded, attention_mask=mask, methods=[None, "b"], **options)
    assert torch.equal(beside[0, 9:], alone)


# ---- Over what is retrieved ----------------------------------------------------------------------------------------


def unit(vector):
    return vector / vector.norm()


@torch.no_grad()
@settings(max_examples=10, deadline=None)
@given(retrieve=st.integers(1, 4), layer=st.integers(-3, 2), seed=st.integers(0, 99))
def test_the_adapters_nearest_to_a_prompt_are_weighed_alone(retrieve, layer, seed):
    base = tiny_model(dtype=torch.float64)
    adapters = {n: random_adapter(base, n, ["q_proj"], seed=i) for i, n in enumerate("abcd")}
    model = FusedModel.from_adapters(copy.deepcopy(base), adapters, Ramole(3, retrieve=retrieve, layer=layer))
    set_random_gates(model, seed)
    samples = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model.gates["model"].set_samples(samples.unbind())
    ids, lengths = random_ids(2, 5, seed=seed), (2, 4)
    mask = torch.tensor([[int(i < n) for i in range(5)] for n in lengths])
    traced = model.trace(ids, prompt_mask=mask)
    centroids = samples.mean(dim=1)
    for row, length in enumerate(lengths):
        # In a pass of the base over the prompt alone.
        states = block_outputs(base, ids[row : row + 1, :length])[layer, 0]
        query, origin = unit(states.mean(dim=0)), centroids.mean(dim=0)
        scores = [float((query - origin) @ (c - origin)) for c in centroids]
        nearest = sorted(range(4), key=lambda i: -scores[i])[:retrieve]
        weights = traced.module_weights["layers.0.self_attn.q_proj"][row]
        assert [bool(used) for used in (weights > 0).any(dim=0)] == [i in nearest for i in range(4)]
        gate = model.gates["layers.0.self_attn.q_proj"]
        updates = [
            adapter.modules["model.layers.0.self_attn.q_proj"] if i in nearest else None
            for i, adapter in enumerate(adapters.values())
        ]
        seen = []
        hook = base.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][0])
        )
        base(ids[row : row + 1])
        hook.remove()
        rows = [slow_weights(x, updates, gate.lora_A, gate.lora_B) for x in seen[0].tolist()]
        torch.testing.assert_close(weights.double(), torch.tensor(rows, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_each_request_of_a_batch_has_what_was_retrieved_for_it():
    base = tiny_model(dtype=torch.float64)
    adapters = {n: random_adapter(base, n, seed=i) for i, n in enumerate("abcd")}
    model = FusedModel.from_adapters(base, adapters, Ramole(3, retrieve=2))
    set_random_gates(model)
    model.gates["model"].set_samples(torch.randn(4, 3, 32).unbind())
    ids = random_ids(1, 6)
    options = {"max_new_tokens": 5, "do_sample": False}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 6:]
    padded = torch.cat([torch.nn.functional.pad(ids, (3, 0)), random_ids(2, 9, seed=3)])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[0, 9:], alone)


def test_retrieval_wants_a_prompt_and_vectors():
    base = tiny_model()
    model = FusedModel.from_adapters(base, {n: random_adapter(base, n) for n in "abc"}, Ramole(retrieve=2))
    ids = random_ids()
    with pytest.raises(MethodError, match=r"a bare forward does not say what the prompt is\. Call `generate`, or give"):
        model(ids)
    with pytest.raises(MethodError, match=r"The centroids are not made yet\. Fit the method on samples"):
        model(ids, prompt_mask=torch.ones_like(ids))
    assert "model.centroids" in model.state_dict()


def test_the_gate_reads_bfloat16_and_answers_in_its_own_precision():
    gate, x = random_gate([update(2), update(3, seed=1)]).float(), torch.randn(2, 5, FEATURES).bfloat16()
    assert gate(x).dtype == torch.float32
    torch.testing.assert_close(gate(x), gate(x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gate(x.float()), gate(x.float()))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Ramole(rank=0), "`rank` (=0) must be a whole number of at least 1."),
        (
            lambda: Ramole(layer=1),
            "`layer` (=1) says how adapters are retrieved, and `retrieve` is None, which weighs all. Set that, or "
            "leave it out.",
        ),
        (lambda: Ramole(encoder="x"), "`encoder` (='x') says how adapters are retrieved"),
        (lambda: Ramole(retrieve=1, instruction="x"), "`instruction` (='x') is for encoders of texts"),
        (
            lambda: Ramole(retrieve=3).check(["a", "b"]),
            "`retrieve` (=3) must be between 1 and the number of adapters (=2).",
        ),
        (lambda: Ramole(retrieve=0).check(["a"]), "`retrieve` (=0) must be between 1 and the number of adapters (=1)."),
        (lambda: Ramole(retrieve=1, layer=2).keeper(site([update(2)])), "`layer` (=2) must be between -2 and 1."),
        (lambda: Ramole(drop=1), "`drop` (=1) must be at least 0 and less than 1."),
        (lambda: Ramole(drop=-0.1), "`drop` (=-0.1) must be at least 0 and less than 1."),
        (lambda: Ramole(drop="half"), "`drop` (='half') must be at least 0 and less than 1."),
        (
            lambda: Ramole().gate(site([LoraModule(torch.randn(4, FEATURES), torch.randn(WIDTH, 4), 1.0, experts=2)])),
            "'q' of decoder layer 0 are matrices of experts, which read only what is sent to them. The method 'ramole' "
            "takes adapters of linear modules; take another method.",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        make()

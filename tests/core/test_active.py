"""Only the adapters that a batch uses take part: the same answers as with all of them, from what was cut out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from loraflow import Arrow, FusedModel, LearnedStatic, LoraFlow, LoraHub
from loraflow.core.active import EVERYTHING, Use, use_of
from loraflow.core.cuts import Cuts
from loraflow.core.fuse import fused_parts
from loraflow.core.lanes import Lane, Lanes, RowGate
from loraflow.core.picks import Plan
from loraflow.methods.static import ConstantGate
from tests.tiny import ALL_LLAMA, merged_model, random_adapter, random_ids, relative_error, set_random_gates, tiny_model

KINDS = ["plain", "lora_bias", "dora", "plain", "rslora", "plain"]
NAMES = [f"a{i}" for i in range(len(KINDS))]
PAIR = {"a1": 0.75, "a3": -0.5}


@torch.no_grad()
def fused_model(architecture="llama", method="base", dtype=torch.float64, kinds=KINDS, **changes):
    """A fusion of adapters of unequal ranks, targets and kinds."""
    base = tiny_model(architecture, dtype, **changes)
    targets = ALL_LLAMA if architecture == "llama" else None
    adapters = {
        f"a{i}": random_adapter(base, f"a{i}", targets and targets[i % 3 :], r=i + 2, kind=kind, seed=i)
        for i, kind in enumerate(kinds)
    }
    return FusedModel.from_adapters(base, adapters, method)


@pytest.fixture(scope="module")
def model():
    return fused_model()


def linears(model):
    return [part for layer in model.attachment.layers.layers for part in fused_parts(layer)]


def read_slots(model, ids, **options):
    """The number of slots that each product with a stacked A had in a forward."""
    groups, seen = {id(linear.fused.group): linear.fused.group for linear in linears(model)}, []
    original = type(next(iter(groups.values()))).reading

    def reading(group, active):
        found = original(group, active)
        seen.append(len(found.lora_A))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraflow.core.group.InputGroup.reading", reading)
        model(ids, **options)
    return seen


@torch.no_grad()
def test_adapters_without_weight_take_no_part(model):
    ids = random_ids()
    with model.using(PAIR):
        seen = read_slots(model, ids)
        found = model(ids).logits
    # Of q, k and v together; one of the two has a `lora_bias`.
    assert max(seen) <= 3 * (3 + 1 + 5)
    whole = sum(linear.fused.group.lora_A.shape[0] for linear in linears(model) if not linear.fused.member)
    assert sum(seen) < whole / 2
    merged = merged_model(tiny_model(dtype=torch.float64), model.adapters, [PAIR.get(name, 0.0) for name in NAMES])
    assert relative_error(found, merged(ids).logits) < 1e-12


@torch.no_grad()
def test_rows_of_a_batch_use_their_union_and_answer_as_alone(model):
    ids = random_ids(batch=4)
    methods = [PAIR, {"a0": 1.0, "a5": 0.5}, "base", "a2"]
    found = model(ids, methods=methods).logits
    for row, method in enumerate(methods):
        with model.using(method):
            assert relative_error(found[row], model(ids[row : row + 1]).logits[0]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("way", ["all", "gathered", "grouped"])
@pytest.mark.parametrize(
    "method", [Arrow(top_k=2), LoraFlow(top_k=2), "rows"], ids=["each linear", "each token", "each row"]
)
def test_picked_updates_are_those_of_all(model, monkeypatch, way, method):
    ids, options = random_ids(batch=3), {}
    if method == "rows":
        options["methods"] = [PAIR, {"a0": 1.0, "a5": 0.5}, {"a2": 0.3}]
    elif isinstance(method, LoraFlow):
        model.set_method(method)
        set_random_gates(model)
    else:
        options["methods"] = [method] * 3
    monkeypatch.setattr("loraflow.core.context.use_of", lambda *_, **__: EVERYTHING)
    expected = model.generate(ids, max_new_tokens=4, output_logits=True, return_dict_in_generate=True, **options)
    monkeypatch.setattr("loraflow.core.context.use_of", use_of)
    ways = []
    monkeypatch.setattr("loraflow.core.group.cheapest", lambda sizes: ways.append(sizes) or way)
    by_input = Plan("input", way, way)
    monkeypatch.setattr("loraflow.core.group.cheapest_plan", lambda *_: by_input)
    for group in model.attachment.groups:
        group.forget()
    found = model.generate(ids, max_new_tokens=4, output_logits=True, return_dict_in_generate=True, **options)
    assert ways
    assert {sizes.span for sizes in ways} == ({1, ids.shape[1]} if method == "rows" else {1})
    assert torch.equal(found.sequences, expected.sequences)
    for each, other in zip(found.logits, expected.logits, strict=True):
        assert relative_error(each, other) < 1e-12
    for group in model.attachment.groups:
        group.forget()
    model.set_method("base")


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_carry_the_adapters_of_their_request(model, options):
    ids, methods = random_ids(), [PAIR, {"a0": 1.0, "a5": 0.5}]
    found = model.generate(ids, methods=methods, max_new_tokens=5, **options)
    count = options.get("num_return_sequences", 1)
    for row, method in enumerate(methods):
        with model.using(method):
            alone = model.generate(ids[row : row + 1], max_new_tokens=5, **options)
        length = alone.shape[1]
        assert torch.equal(found[row * count : (row + 1) * count, :length], alone)


def test_zero_weights_that_learn_have_their_gradients(model, monkeypatch):
    model.set_method(LearnedStatic(start={"a1": 0.5}))
    ids = random_ids()
    model(ids, labels=ids).loss.backward()
    gradient = model.gates["model"].weights.grad.clone()
    model.zero_grad()
    monkeypatch.setattr("loraflow.core.context.use_of", lambda *_, **__: EVERYTHING)
    model(ids, labels=ids).loss.backward()
    assert (gradient != 0).all()
    assert relative_error(gradient, model.gates["model"].weights.grad) < 1e-6
    model.set_method("base")


@torch.no_grad()
def test_learned_weights_are_read_again_in_each_forward(model):
    model.set_method(LearnedStatic(start={"a1": 0.5}))
    ids = random_ids()
    model(ids)
    # As optimisers of sharded training write, past the version counter.
    model.gates["model"].weights.data.copy_(torch.tensor([0.0, 0.0, 0.9, 0.0, 0.0, 0.4]))
    found = model(ids).logits
    model.set_method("base")
    with model.using({"a2": 0.9, "a5": 0.4}):
        assert relative_error(found, model(ids).logits) < 1e-6


def test_what_was_cut_in_inference_mode_serves_a_backward(model):
    ids = random_ids()
    weights = torch.zeros(2, len(NAMES), dtype=torch.float64)
    weights[:, 1] = 0.5
    with torch.inference_mode():
        expected = model(ids, fusion_weights=weights).logits
    embeddings = model.get_input_embeddings()(ids).clone().requires_grad_()
    found = model(inputs_embeds=embeddings, fusion_weights=weights).logits
    found.sum().backward()
    assert relative_error(found, expected) < 1e-12
    merged = merged_model(tiny_model(dtype=torch.float64), model.adapters, [0.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    other = embeddings.detach().clone().requires_grad_()
    merged(inputs_embeds=other).logits.sum().backward()
    assert relative_error(embeddings.grad, other.grad) < 1e-10


@torch.no_grad()
def test_parameters_are_mixed_among_those_that_are_used():
    model = fused_model(kinds=["plain"] * 4, method=LoraHub())
    model.gates["model"].start_at([0.0, 0.5, 0.0, -0.3])
    ids = random_ids()
    found = model(ids).logits
    adapters = {adapter.name: adapter for adapter in model.adapters if adapter.name in ("a1", "a3")}
    few = FusedModel.from_adapters(tiny_model(dtype=torch.float64), adapters, LoraHub())
    few.gates["model"].start_at([0.5, -0.3])
    assert relative_error(found, few(ids).logits) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["deepseek_v3", "gpt2", "mixtral"])
def test_other_architectures(architecture):
    model = fused_model(architecture, kinds=["plain"] * 4)
    ids = random_ids()
    with model.using({"a2": 0.8}):
        found = model.generate(ids, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    one = FusedModel.from_adapters(tiny_model(architecture, torch.float64), {"a2": model.adapters[2]}, {"a2": 0.8})
    expected = one.generate(ids, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    for each, other in zip(found.logits, expected.logits, strict=True):
        assert relative_error(each, other) < 1e-12


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_fixed_set_compiles_without_a_graph_break():
    model = fused_model(dtype=torch.float32)
    model.set_method(PAIR)
    ids = random_ids()
    torch.compiler.reset()
    seen = []

    def backend(graph, inputs):
        seen.extend(tuple(tensor.shape) for tensor in inputs if isinstance(tensor, torch.Tensor))
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    whole = {tuple(linear.fused.group.lora_A.shape) for linear in linears(model)}
    assert seen
    assert not whole & set(seen)


# ---- What is kept --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cuts_are_kept_while_they_fit_and_dropped_when_the_model_moves():
    model = fused_model(dtype=torch.float32)
    ids = random_ids()
    for name in (*NAMES, "a0", "a1"):
        with model.using(name):
            model(ids)
    for linear in linears(model):
        assert 0 < linear.lora_cuts.nbytes <= linear.lora_B.nbytes + linear.writing((4,)).nbytes
    with model.using(PAIR):
        narrow = model(ids).logits
        model.double()
        assert all(linear.lora_cuts.nbytes == 0 for linear in linears(model))
        assert relative_error(narrow, model(ids).logits) < 1e-5
        assert all(linear.writing((1, 3)).lora_B.dtype == torch.float64 for linear in linears(model))
    copied = copy.deepcopy(model)
    assert all(linear.lora_cuts.nbytes == 0 for linear in linears(copied))
    assert relative_error(copied(ids, methods=[PAIR] * 2).logits, model(ids, methods=[PAIR] * 2).logits) < 1e-12


class Part:
    def __init__(self, nbytes):
        self.nbytes = nbytes


def test_the_least_recently_used_cut_leaves():
    cuts, stack, made = Cuts(), torch.zeros(25), []

    def cut(active):
        made.append(active)
        return Part(40)

    for active in ((0,), (1,), (0,), (2,), (0,), (1,)):
        cuts.of(active, stack, cut)
    assert made == [(0,), (1,), (2,), (1,)]
    assert cuts.nbytes == 80
    cuts.of((0,), stack.clone(), cut)
    assert cuts.nbytes == 40


# ---- What is known of use ------------------------------------------------------------------------------------------


def lanes_of(*lanes, flat=False):
    return Lanes(4, lanes, flat=flat)


def given(*rows):
    return {"layers.0": RowGate(torch.tensor(rows, dtype=torch.float32))}


@pytest.mark.parametrize(
    ("lanes", "active", "most", "by_row"),
    [
        (lanes_of(Lane((0,), "layer", {})), (), None, True),
        (lanes_of(Lane((0, 1), "layer", given([0, 1, 0, 0, 2], [0, 1, 0, 0, 0]))), (1, 4), None, True),
        (lanes_of(Lane((0, 1), "layer", given([0, 1, 0, 0, 2], [1, 0, 0, 3, 0]))), (0, 1, 3, 4), 2, True),
        (lanes_of(Lane((0,), "layer", {"layers.0": ConstantGate([0, float("nan")])}, among=(2, 4))), (4,), None, True),
        (lanes_of(Lane((0,), "layer", {"layers.0": nn.Identity()}, among=(3, 1))), (1, 3), None, False),
        (lanes_of(Lane((0,), "layer", {"layers.0": nn.Identity()})), None, None, False),
        (lanes_of(Lane((0,), "layer", {"layers.0": RowGate(torch.zeros(1, 5, device="meta"))})), None, None, True),
        (
            lanes_of(
                Lane((0,), "layer", {"layers.0": nn.Identity()}, among=(3, 1)),
                Lane((1,), "layer", given([0, 0, 0, 0, 1])),
                Lane((2, 3), "layer", {}),
                flat=True,
            ),
            (1, 3, 4),
            2,
            False,
        ),
    ],
)
def test_what_lanes_use(lanes, active, most, by_row):
    assert use_of(lanes, 5, first=True) == Use(active, most, by_row)

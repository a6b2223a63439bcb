"""Rows of one batch with different methods, or with weights of their own: each as it is alone."""

from __future__ import annotations

import copy
import re
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from transformers import GenerationConfig

from loraflow import FusedModel, LoraFlow, Static
from loraflow.errors import LoraflowError, MethodError
from loraflow.methods import (
    AdapterCore,
    Arrow,
    Centroid,
    Lag,
    LearnedStatic,
    Logo,
    LoraHub,
    NormMax,
    Phatgoose,
    QaFlora,
    SpectR,
)
from loraflow.methods.base import Mixing
from tests.tiny import (
    ARCHITECTURES,
    exact_loss,
    merged_model,
    random_adapter,
    random_ids,
    relative_error,
    set_random_gates,
    tiny_model,
    use_reference,
)

NAMES = ("a", "b", "c")
LAYERED = [{"a": 0.5}, {"b": -1.0, "c": 0.3}, {"a": 1.0, "b": 1.0, "c": 1.0}]


@dataclass(frozen=True)
class Mixed(Static):
    """Given weights, with cross terms."""

    name: ClassVar[str] = "mixed"

    @property
    def mixing(self) -> Mixing:
        return "parameters"


@dataclass(frozen=True)
class Doubled(Static):
    """Gates that give one row of weights for each row of the batch."""

    name: ClassVar[str] = "doubled"

    def gate(self, site):
        class ByRow(torch.nn.Module):
            def forward(self, x):
                return 2 * x.new_ones(x.shape[0], len(site.adapters))

        return ByRow()


OWN = [
    LoraFlow("step"),
    LoraFlow("layer"),
    LoraFlow("module"),
    LoraFlow("layer", reads="normalized", scorer="two-layer", width=3, activation="sigmoid", top_k=2),
    LearnedStatic("module"),
    LoraHub(),
    Phatgoose(),
    AdapterCore(),
]
# None is the fusion's own.
OTHERS = [
    None,
    "base",
    "average",
    "b",
    {"a": 0.7, "c": -1.2},
    Static(LAYERED),
    Arrow(),
    Arrow(1, 0.3),
    SpectR(2),
    NormMax(),
    Lag(1),
    Mixed({"a": 0.5, "b": 0.75}),
    Mixed([{"a": 1.0, "c": 0.5}, {"b": 2.0}, {}]),
    Doubled({"a": 1.0}),
]
QUERIES = [QaFlora(), QaFlora("cosine", "all"), Logo()]


def fuse(architecture="llama", method="average", dtype=torch.float64, kinds=("plain", "lora_bias", "rslora")):
    base, targets = tiny_model(architecture, dtype), ARCHITECTURES[architecture][1]
    adapters = [
        random_adapter(base, name, targets[i % 2 :], r=2 * i + 2, kind=kind, seed=i)
        for i, (name, kind) in enumerate(zip(NAMES, kinds, strict=True))
    ]
    model = FusedModel.from_adapters(copy.deepcopy(base), dict(zip(NAMES, adapters, strict=True)), method)
    set_random_gates(model)
    return base, adapters, model


def logits_alone(model, method, *args, **kwargs):
    if method is None:
        return model(*args, **kwargs).logits
    with model.using(method):
        return model(*args, **kwargs).logits


def padded(lengths, side):
    rows = [random_ids(1, length, seed=10 + i)[0] for i, length in enumerate(lengths)]
    width = max(lengths)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, span], mask[i, span] = row, 1
    return rows, ids, mask


# ---- Forwards ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@settings(max_examples=60)
@given(
    architecture=st.sampled_from(["llama", "gpt2", "opt", "gemma2", "falcon"]),
    own=st.sampled_from(OWN),
    methods=st.lists(st.sampled_from(OTHERS), min_size=1, max_size=6),
    learning=st.booleans(),
)
def test_each_row_is_as_with_its_method_alone(architecture, own, methods, learning):
    _, _, model = fuse(architecture, own)
    ids = random_ids(len(methods))
    with torch.set_grad_enabled(learning):
        found = model(ids, methods=methods).logits.detach()
        for row, method in enumerate(methods):
            expected = logits_alone(model, method, ids).detach()[row]
            assert relative_error(found[row], expected) < 1e-9, method


@torch.no_grad()
@pytest.mark.parametrize("own", [LoraFlow("step"), LoraFlow("module")], ids=["step", "module"])
@pytest.mark.parametrize("kinds", [("dora", "plain", "dora"), ("lora_bias", "dora", "plain")])
def test_doras_too(own, kinds):
    _, _, model = fuse(method=own, kinds=kinds)
    methods, ids = [None, "base", "b", {"a": 0.7, "c": -1.2}, Arrow()], random_ids(5)
    found = model(ids, methods=methods).logits
    for row, method in enumerate(methods):
        assert relative_error(found[row], logits_alone(model, method, ids)[row]) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_padded_rows_are_the_rows_alone(architecture, side):
    _, _, model = fuse(architecture, LoraFlow("layer"))
    methods = [None, "base", Arrow(), "a", Mixed({"a": 0.5, "b": 0.75})]
    rows, ids, mask = padded((4, 9, 1, 7, 9), side)
    positions = {} if architecture == "opt" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    found = model(ids, attention_mask=mask, methods=methods, **positions).logits
    for i, (row, method) in enumerate(zip(rows, methods, strict=True)):
        expected = logits_alone(model, method, row[None])[0]
        assert relative_error(found[i][mask[i].bool()], expected) < 1e-6


@torch.no_grad()
def test_the_order_of_requests_does_not_matter():
    _, _, model = fuse(method=LoraFlow("module"))
    methods, ids = [None, "base", Arrow(), {"b": 2.0}, None, "a"], random_ids(6)
    order = [4, 2, 0, 5, 1, 3]
    found = model(ids[order], methods=[methods[i] for i in order]).logits
    assert relative_error(found, model(ids, methods=methods).logits[order]) < 1e-12


@torch.no_grad()
def test_one_forward_leaves_nothing_for_the_next():
    _, _, model = fuse(method=LoraFlow("step"))
    ids = random_ids()
    expected = model(ids).logits
    model(ids, methods=["a", None])
    model(ids, fusion_weights=torch.ones(2, 3))
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(TypeError):
        model(ids, methods=["a", None], no_such_argument=1, input_ids=ids)
    assert torch.equal(model(ids).logits, expected)
    assert all(c.lanes is c.own and c.embeddings is None for c in model.attachment.contexts)


@torch.no_grad()
def test_all_rows_of_the_base_are_the_base():
    base, _, model = fuse()
    torch.testing.assert_close(model(random_ids(), methods=["base", "base"]).logits, base(random_ids()).logits)


# ---- Given weights -------------------------------------------------------------------------------------------------


@torch.no_grad()
@settings(max_examples=20)
@given(
    architecture=st.sampled_from(["llama", "gpt2", "opt"]),
    batch=st.integers(1, 4),
    by_layer=st.booleans(),
    own=st.sampled_from(["base", LoraFlow("module"), LoraHub()]),
)
def test_given_weights_are_those_of_the_merged_models(architecture, batch, by_layer, own):
    kinds = ("plain", "rslora", "lora_bias") if own == LoraHub() else ("plain", "dora", "lora_bias")
    base, adapters, model = fuse(architecture, own, kinds=kinds)
    weights = torch.randn(batch, 3, 3) if by_layer else torch.randn(batch, 3)
    ids = random_ids(batch)
    found = model(ids, fusion_weights=weights).logits
    for row in range(batch):
        expected = merged_model(base, adapters, weights[row].tolist())(ids[row : row + 1]).logits[0]
        assert relative_error(found[row], expected) < 1e-7


def merged_losses(base, adapters, weights, ids):
    """The mean loss of rows, each through W + sum_i w_i dW_i of its own: plain autograd, no fused code."""
    losses = []
    for row in range(len(ids)):
        merged = {}
        for name in adapters[0].modules:
            layer = int(re.search(r"\.(\d+)\.", name)[1])
            merged[f"{name}.weight"] = base.get_submodule(name).weight + sum(
                w * a.modules[name].scaling * a.modules[name].lora_B.double() @ a.modules[name].lora_A.double()
                for w, a in zip(weights[row, layer], adapters, strict=True)
            )
        logits = functional_call(base, merged, (ids[row : row + 1],)).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[row, 1:]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("by_layer", [True, False])
def test_the_gradient_of_given_weights_is_that_of_the_merged_models(by_layer):
    base = tiny_model(dtype=torch.float64).requires_grad_(False)
    adapters = [random_adapter(base, name, r=i + 2, seed=i) for i, name in enumerate(NAMES)]
    model = FusedModel.from_adapters(copy.deepcopy(base), dict(zip(NAMES, adapters, strict=True)), "average")
    ids, shape = random_ids(), (2, 3, 3) if by_layer else (2, 3)
    weights = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(exact_loss(model, ids, fusion_weights=weights), weights)
    per_layer = weights if by_layer else weights[:, None].expand(-1, 3, -1)
    (expected,) = torch.autograd.grad(merged_losses(base, adapters, per_layer, ids), weights)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("kinds", [("plain", "dora", "lora_bias"), ("plain", "rslora", "plain")])
def test_the_gradient_of_given_weights_is_that_of_the_slow_reference(kinds, monkeypatch):
    _, _, model = fuse(kinds=kinds)
    weights, ids = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True), random_ids()
    (found,) = torch.autograd.grad(exact_loss(model, ids, fusion_weights=weights), weights)
    use_reference(model, monkeypatch)
    (expected,) = torch.autograd.grad(exact_loss(model, ids, fusion_weights=weights), weights)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_given_weights_have_the_same_gradient_under_checkpointing(reentrant):
    _, _, model = fuse()
    weights, ids = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True), random_ids()
    (expected,) = torch.autograd.grad(exact_loss(model, ids, fusion_weights=weights), weights)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    exact_loss(model, ids, fusion_weights=weights, use_cache=False).backward()
    assert relative_error(weights.grad, expected) < 1e-6


@pytest.mark.parametrize("own", OWN, ids=lambda method: f"{method.name}-{method.place}")
@pytest.mark.parametrize("reentrant", [True, False])
def test_lanes_have_the_same_gradient_under_checkpointing(own, reentrant):
    _, _, model = fuse(method=own)
    methods, ids = [None, "average", "base", None, Arrow()], random_ids(5)

    def gradients(**kwargs):
        model.zero_grad()
        exact_loss(model, ids, methods=methods, **kwargs).backward()
        return {
            f"{site}.{name}": parameter.grad.clone()
            for site, gate in model.gates.items()
            for name, parameter in gate.named_parameters()
            if parameter.grad is not None
        }

    expected = gradients()
    assert expected
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    found = gradients(use_cache=False)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_only_a_gates_own_rows_give_it_a_gradient():
    _, _, model = fuse(method=LoraFlow("layer"))
    ids = random_ids(2)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return model.gates["layers.1"].weight.grad.clone()

    alone = gradient(exact_loss(model, ids[:1])) / 2
    torch.testing.assert_close(gradient(exact_loss(model, ids, methods=[None, "a"])), alone, rtol=1e-5, atol=1e-9)


# ---- Generation ----------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"use_cache": False},
    {"num_beams": 2, "num_return_sequences": 2, "use_cache": False},
]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "greedy")
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_each_request_is_answered_as_alone(architecture, options):
    _, _, model = fuse(architecture, LoraFlow("layer"))
    methods = [None, "base", QaFlora(), Mixed({"a": 0.5, "b": 0.75}), Arrow(), Logo(), Static(LAYERED)]
    rows, ids, mask = padded((4, 9, 6, 7, 9, 2, 5), "left")
    options = {**options, "do_sample": False, "max_new_tokens": 5}
    found = model.generate(ids, attention_mask=mask, methods=methods, **options)[:, 9:]
    sequences = options.get("num_return_sequences", 1)
    for i, (row, method) in enumerate(zip(rows, methods, strict=True)):
        only = {"attention_mask": torch.ones(1, len(row), dtype=torch.long), **options}
        if method is None:
            expected = model.generate(row[None], **only)
        else:
            with model.using(method):
                expected = model.generate(row[None], **only)
        for j in range(sequences):
            answer = expected[j, len(row) :].tolist()
            assert found[i * sequences + j, : len(answer)].tolist() == answer, method


@torch.no_grad()
@pytest.mark.parametrize("own", [*OWN, *QUERIES], ids=lambda method: f"{method.name}-{method.place}")
def test_with_the_fusions_own_method_each_request_is_answered_as_alone(own):
    _, _, model = fuse(method=own)
    rows, ids, mask = padded((4, 9, 6), "left")
    options = {"do_sample": False, "max_new_tokens": 5}
    found = model.generate(ids, attention_mask=mask, methods=["base", None, None], **options)[:, 9:]
    together = model.generate(ids, attention_mask=mask, **options)[:, 9:]
    for i in (1, 2):
        answer = model.generate(rows[i][None], attention_mask=torch.ones(1, len(rows[i])).long(), **options)
        answer = answer[0, len(rows[i]) :].tolist()
        assert found[i, : len(answer)].tolist() == together[i, : len(answer)].tolist() == answer


@torch.no_grad()
@pytest.mark.parametrize("method", QUERIES, ids=lambda method: method.name)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "greedy")
def test_the_weights_of_a_query_stay_with_it(method, options):
    base, adapters, model = fuse(method=method)
    rows, ids, mask = padded((4, 9, 6), "left")
    options = {**options, "do_sample": False, "max_new_tokens": 5}
    weights = model.weigh(ids, mask)
    found = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, fusion_weights=weights, **options), found)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options), found)
    sequences = options.get("num_return_sequences", 1)
    for i, row in enumerate(rows):
        merged = merged_model(base, adapters, weights[i].tolist())
        expected = merged.generate(row[None], attention_mask=torch.ones(1, len(row)).long(), **options)
        for j in range(sequences):
            answer = expected[j, len(row) :].tolist()
            assert found[i * sequences + j, 9 : 9 + len(answer)].tolist() == answer


@torch.no_grad()
def test_padding_without_a_mask_is_told_as_generate_tells_it():
    _, _, model = fuse(method=QaFlora("js", "all"))
    _, ids, mask = padded((4, 9), "left")
    options = {"do_sample": False, "max_new_tokens": 5}
    expected = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, **options), expected)


@torch.no_grad()
def test_a_trace_of_a_query_method_shows_the_weights_of_its_prompt():
    _, _, model = fuse(method=QaFlora(), dtype=torch.float32)
    _, ids, mask = padded((4, 9), "left")
    weights = model.weigh(ids[:, :7], mask[:, :7])
    trace = model.trace(ids, mask, prompt_length=7)
    torch.testing.assert_close(trace.weights, weights[:, None].expand(-1, 9, -1, -1))


# ---- What cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m, ids: m.generate(ids, methods=["a"]),
            LoraflowError,
            "`methods` names 1, and must name one for each of the 2 rows. For one method use `using`.",
        ),
        (
            lambda m, ids: m.generate(ids, methods="a"),
            LoraflowError,
            "`methods` names one, and must name one for each of the 2 rows.",
        ),
        (
            lambda m, ids: m(ids, methods="a"),
            LoraflowError,
            "`methods` names one, and must name one for each of the 2 rows.",
        ),
        (
            lambda m, ids: m(ids, methods=["a", "b", "c"]),
            LoraflowError,
            "`methods` names 3, and must name one for each of the 2 rows. For one method use `using`.",
        ),
        (
            lambda m, ids: m(ids, fusion_weights=torch.ones(3, 3)),
            LoraflowError,
            "`fusion_weights` has the shape (3, 3, 3). Give (2, 3) or (2, 3, 3): batch, layers where they differ, and",
        ),
        (
            lambda m, ids: m(ids, fusion_weights=torch.ones(2, 4)),
            LoraflowError,
            "`fusion_weights` has the shape (2, 3, 4). Give (2, 3) or (2, 3, 3): batch, layers where they differ, and",
        ),
        (
            lambda m, ids: m(ids, fusion_weights=torch.ones(2, 2, 3)),
            LoraflowError,
            "`fusion_weights` has the shape (2, 2, 3). Give (2, 3) or (2, 3, 3): batch, layers where they differ, and",
        ),
        (lambda m, ids: m(ids, fusion_weights=torch.ones(3)), LoraflowError, "has the shape (3,)."),
        (
            lambda m, ids: m(ids, methods=["a", "b"], fusion_weights=torch.ones(2, 3)),
            LoraflowError,
            "`methods` and `fusion_weights` exclude each other. Give one of them.",
        ),
        (
            lambda m, ids: m(ids, methods=["a", LoraFlow()]),
            MethodError,
            "The method 'lora-flow' must be fitted first, and what is fitted here is 'average' with {}.",
        ),
        (
            lambda m, ids: m(ids, methods=["a", Centroid()]),
            MethodError,
            "The method 'centroid' must be fitted first",
        ),
        (
            lambda m, ids: m(ids, methods=["a", "qa-flora"]),
            MethodError,
            "The method 'qa-flora' weighs a whole prompt before it is answered, and a bare forward does not say what",
        ),
        (lambda m, ids: m(ids, methods=["a", "d"]), MethodError, "Unknown method 'd'."),
        (lambda m, ids: m(ids, methods=["a", {"d": 1.0}]), MethodError, "`weights` names the unknown adapter 'd'."),
        (
            lambda m, ids: m.weigh(ids),
            MethodError,
            "The method 'average' does not weigh whole prompts. `trace` shows the weights that it gives.",
        ),
        (
            lambda m, ids: m.weigh(ids, torch.zeros_like(ids), "logo"),
            MethodError,
            "Row 0 has no tokens. Give every prompt at least one.",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, error, message):
    _, _, model = fuse(dtype=torch.float32)
    with pytest.raises(error, match=re.escape(message)):
        call(model, random_ids())
    assert model(random_ids()).logits.isfinite().all()


def test_a_query_method_refuses_a_bare_forward_and_generation_without_ids():
    _, _, model = fuse(method=QaFlora(), dtype=torch.float32)
    with pytest.raises(MethodError, match=r"bare forward does not say what the prompt is\. Call `generate`"):
        model(random_ids())
    with pytest.raises(MethodError, match="'qa-flora' reads the prompt, and `input_ids` is missing"):
        model.generate(max_new_tokens=2)
    with pytest.raises(MethodError, match=r"give `fusion_weights=model\.weigh\(prompt_ids\)`"):
        model(random_ids(), methods=[None, "a"])


def test_after_unloading_there_are_no_lanes():
    _, _, model = fuse()
    model.unload()
    for given_rows in ({"methods": ["a", "b"]}, {"fusion_weights": torch.ones(2, 3)}):
        with pytest.raises(LoraflowError, match="were taken out"):
            model(random_ids(), **given_rows)


# ---- One call at a time, and nothing left behind -------------------------------------------------------------------


def test_a_callers_configuration_does_not_hide_the_padding():
    _, _, model = fuse(method="qa-flora")
    model.generation_config.pad_token_id = 0
    ids = torch.nn.functional.pad(random_ids(2, 6), (3, 0))
    settings = {"max_new_tokens": 4, "do_sample": False}
    told = model.generate(ids, attention_mask=(ids != 0).long(), **settings)
    assert torch.equal(model.generate(ids, generation_config=GenerationConfig(**settings)), told)


def test_given_weights_are_counted_against_embeddings():
    _, _, model = fuse()
    embeddings = model.get_input_embeddings()(random_ids(4))
    with pytest.raises(LoraflowError, match=re.escape("Give (4, 3) or (4, 3, 3)")):
        model.generate(inputs_embeds=embeddings, fusion_weights=torch.ones(2, 3), max_new_tokens=1)
    with pytest.raises(LoraflowError, match="names 2, and must name one for each of the 4 rows"):
        model.generate(inputs_embeds=embeddings, methods=["base", "base"], max_new_tokens=1)


def test_calls_of_two_threads_take_turns():
    _, _, model = fuse()
    inside, go_on, order = threading.Event(), threading.Event(), []

    def hold(*_):
        inside.set()
        go_on.wait(20)

    def first():
        handle = model.base_model.lm_head.register_forward_hook(hold)
        model(random_ids(), fusion_weights=torch.ones(2, 3))
        handle.remove()
        order.append("first")

    def second():
        found.append(model(random_ids(), methods=["base", "base"]).logits)
        order.append("second")

    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    time.sleep(0.2)
    assert not found
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert order == ["first", "second"]
    assert all(context.lanes is context.own for context in model.attachment.contexts)
    with model.disable_adapter():
        torch.testing.assert_close(found[0], model(random_ids()).logits)


def test_a_copied_model_has_a_turn_of_its_own():
    _, _, model = fuse()
    copied = copy.deepcopy(model)
    assert copied.attachment.turn() is not model.attachment.turn()
    weights = torch.randn(2, 3)
    assert torch.equal(
        copied(random_ids(), fusion_weights=weights).logits, model(random_ids(), fusion_weights=weights).logits
    )


def test_modes_are_as_before_after_an_error_too():
    _, _, model = fuse(method="qa-flora")
    model.train()
    model.base_model.lm_head.eval()
    with pytest.raises(MethodError, match="Row 0 has no tokens"):
        model.trace(random_ids(1), torch.zeros(1, 9, dtype=torch.long))
    model.weigh(random_ids())
    assert model.training
    assert not model.base_model.lm_head.training


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": [1, 2]}, MethodError, "1 is no method. Give a name"),
        ({"fusion_weights": [[0.0, 1.0, float("nan")]] * 2}, LoraflowError, "not finite"),
    ],
)
def test_what_is_no_method_and_no_weight_is_refused(options, error, message):
    _, _, model = fuse()
    with pytest.raises(error, match=message):
        model(random_ids(), **options)


def test_weights_may_be_a_list():
    _, _, model = fuse()
    rows = [[0.5, 0.0, 1.0], [0.0, 1.0, 0.0]]
    given = model(random_ids(), fusion_weights=torch.tensor(rows)).logits
    assert torch.equal(model(random_ids(), fusion_weights=rows).logits, given)


def test_equal_methods_are_made_once(monkeypatch):
    _, _, model = fuse()
    made, real = [], model.attachment.make_gates
    monkeypatch.setattr(model.attachment, "make_gates", lambda method: made.append(method) or real(method))
    model(random_ids(6), methods=[{NAMES[0]: 0.5}, "average", {NAMES[0]: 0.5}, "average", NAMES[1], NAMES[1]])
    assert len(made) == 3

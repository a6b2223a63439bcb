"""Gates that weigh by what adapters have read: every plan gives what slow loops over the formulas give."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from loraflow import Arrow, FusedModel, Lag, NormMax, SpectR
from loraflow.core.picks import Plan, Scoring, Sizes, cheapest_plan
from tests.methods.routers import slow_weights
from tests.tiny import ARCHITECTURES, random_adapter, random_ids, relative_error, tiny_model

NAMES = [f"a{i}" for i in range(6)]
LIBRARIES = {"tasks": ["a4", "a1"], "knowledge": ["a0", "a5", "a2", "a3"]}
METHODS = [
    Arrow(2, 0.5),
    SpectR(3),
    SpectR(2, True, "softmax", 0.7),
    NormMax(),
    Lag(2),
    Lag(1, LIBRARIES),
]
PLANS = [
    Plan("slots", "all", "all"),
    Plan("slots", "all", "gathered"),
    Plan("slots", "all", "grouped"),
    Plan("input", "gathered", "gathered"),
    Plan("list", "gathered", "grouped"),
    Plan("list", "grouped", "gathered"),
]


def routed_base(base, adapters, method):
    """The base with every adapter's update added in loops, by weights from the formulas."""
    base = copy.deepcopy(base)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        updates = [adapter.modules.get(name) for adapter in adapters]

        def route(_, args, output, updates=updates):
            x = args[0]
            names = [adapter.name for adapter in adapters]
            rows = [slow_weights(method, row, updates, names) for row in x.reshape(-1, x.shape[-1])]
            weights = torch.tensor(rows, dtype=x.dtype).view(*x.shape[:-1], -1)
            for i, m in enumerate(updates):
                if m is not None:
                    update = m.scaling * (x @ m.lora_A.double().T @ m.lora_B.double().T)
                    output = output + weights[..., i : i + 1] * update
            return output

        base.get_submodule(name).register_forward_hook(route)
    return base


def adapters_for(base, architecture="llama", ranks=(3, 3, 3, 3, 3, 3)):
    # Every third adapter targets some of the linears only.
    every = ARCHITECTURES[architecture][1]
    return [
        random_adapter(base, name, every[1:] if i % 3 == 2 else every, r=r, seed=i)
        for i, (name, r) in enumerate(zip(NAMES, ranks, strict=True))
    ]


@torch.no_grad()
@pytest.mark.parametrize("ranks", [(3,) * 6, (1, 4, 2, 4, 3, 4)], ids=["equal ranks", "unlike ranks"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_plan_gives_the_formula(method, ranks, monkeypatch):
    base, plans = tiny_model(dtype=torch.float64), []
    adapters = adapters_for(base, ranks=ranks)
    ids = random_ids(2, 5)
    expected = routed_base(base, adapters, method)(ids).logits
    model = FusedModel.from_adapters(base, {a.name: a for a in adapters}, method)
    for plan in PLANS:

        def planned(sizes, scoring, plan=plan):
            lists = plan.source != "list" or scoring.list_rows
            plans.append(plan if lists else Plan("slots", "all", plan.write))
            return plans[-1]

        monkeypatch.setattr("loraflow.core.group.cheapest_plan", planned)
        for group in model.attachment.groups:
            group.forget()
        assert relative_error(model(ids).logits, expected) < 1e-9, plan
    assert {plan.source for plan in plans} >= {"slots", "input"}
    if ranks == (3,) * 6 and isinstance(method, Lag):
        assert "list" in {plan.source for plan in plans}


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_other_architectures_give_the_formula(architecture):
    base = tiny_model(architecture, torch.float64)
    linears = ARCHITECTURES[architecture][1]
    adapters = [random_adapter(base, name, linears, r=2 + i, seed=i) for i, name in enumerate(NAMES[:3])]
    for method in (Arrow(2), SpectR(2), NormMax(), Lag(2)):
        expected = routed_base(base, adapters, method)(random_ids(2, 5)).logits
        model = FusedModel.from_adapters(copy.deepcopy(base), {a.name: a for a in adapters}, method)
        assert relative_error(model(random_ids(2, 5)).logits, expected) < 1e-9, method


def fused(method, dtype=torch.float64, ranks=(3,) * 6):
    base = tiny_model(dtype=dtype)
    return FusedModel.from_adapters(base, {a.name: a for a in adapters_for(base, ranks=ranks)}, method)


@torch.no_grad()
@pytest.mark.parametrize("method", [Arrow(2, 0.5), SpectR(2, True, "softmax"), Lag(1, LIBRARIES)], ids=str)
def test_answers_with_a_cache_in_a_padded_batch_are_those_alone(method):
    model, lengths = fused(method), (9, 4)
    ids = random_ids(2, 9)
    mask = torch.stack([(torch.arange(9) >= 9 - length).long() for length in lengths])
    found = model.generate(ids * mask, attention_mask=mask, max_new_tokens=3, do_sample=False)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, 9 - length :]
        for _ in range(3):
            step = model(alone, use_cache=False).logits[:, -1:].argmax(dim=-1)
            alone = torch.cat([alone, step], dim=1)
        assert torch.equal(found[row, 9 - length :], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("plan", [Plan("slots", "all", "all"), Plan("slots", "all", "gathered")], ids=str)
def test_rows_of_a_batch_with_routers_of_their_own_answer_as_alone(plan, monkeypatch):
    monkeypatch.setattr("loraflow.core.group.cheapest_plan", lambda *_: plan)
    model, ids = fused("average", ranks=(1, 4, 2, 4, 3, 4)), random_ids(7, 5)
    methods = [*METHODS, {"a2": 0.5}]
    together = model(ids, methods=methods).logits
    for row, method in enumerate(methods):
        with model.using(method):
            assert relative_error(together[row : row + 1], model(ids[row : row + 1]).logits) < 1e-9, method


@torch.no_grad()
def test_copies_and_pickles_weigh_alike():
    model, ids = fused(Lag(2)), random_ids()
    expected = model(ids).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(ids).logits, expected)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("method", "ranks"), [(Lag(2), (3,) * 6), (SpectR(2), (1, 4, 2, 4, 3, 4))], ids=["equal ranks", "unlike ranks"]
)
def test_routers_compile_without_a_graph_break(method, ranks):
    model, ids = fused(method, torch.float32, ranks), random_ids()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_input_as_in_loops():
    for method in (Arrow(2, 0.5), SpectR(2, True, "softmax")):
        base = tiny_model(dtype=torch.float64)
        adapters = adapters_for(base)
        model = FusedModel.from_adapters(copy.deepcopy(base), {a.name: a for a in adapters}, method)
        grads = []
        for forward in ("slots", "input"):
            for gate in model.gates.values():
                gate.by_slots = forward == "slots"
            embeds = model.get_input_embeddings()(random_ids(1, 4)).detach().requires_grad_()
            model(inputs_embeds=embeds).logits.square().sum().backward()
            grads.append(embeds.grad)
        assert relative_error(*grads) < 1e-9


def test_adapters_under_dropout_are_scored_by_the_whole_input():
    model, ids = fused(NormMax()), random_ids()
    expected = model.trace(ids).weights
    model.train()
    with model.attachment.dropping(0.5), model.attachment.recording() as recorded, torch.no_grad():
        model(ids)
    model.eval()
    found = recorded[0]["self_attn.q_proj"]
    with model.attachment.recording() as recorded, torch.no_grad():
        model(ids)
    assert torch.equal(found, recorded[0]["self_attn.q_proj"])
    assert expected.shape[:2] == ids.shape


# ---- Which plan ----------------------------------------------------------------------------------------------------


def plan_for(method, adapters, tokens, most=1, rank=16, width=512, linears=3):
    sizes = Sizes(tokens, 1, adapters, most, width, (rank,) * linears, (width,) * linears, itemsize=4)
    listed = (linears * adapters, min(20, adapters)) if method == "lag" and adapters > 20 else (0, 0)
    return cheapest_plan(sizes, Scoring(linears * adapters if method == "arrow" else 0, *listed))


def test_few_adapters_are_all_read_and_many_only_where_they_are_chosen():
    # One product with few rows is less work to start than small matrices by adapter.
    assert plan_for("arrow", 3, 1, most=3) == Plan("input", "all", "all")
    assert plan_for("arrow", 64, 1, most=3) == Plan("input", "gathered", "gathered")
    assert plan_for("arrow", 16, 4096, most=16, width=4096) == Plan("slots", "all", "all")
    assert plan_for("spectr", 3, 1, most=3) == Plan("slots", "all", "all")
    for tokens in (1, 256):
        # Scores need every A, but not every B.
        assert plan_for("spectr", 64, tokens, most=4).source == "slots"
    assert plan_for("spectr", 64, 1, most=4).write != "all"
    assert plan_for("lag", 1000, 1).source == "list"
    assert plan_for("lag", 16, 1).source == "slots"

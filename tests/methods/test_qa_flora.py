"""qa-FLoRA: the formula from models with one adapter merged into each, whatever shares the batch, and what it costs."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel
from loraflow.errors import MethodError
from loraflow.methods import QaFlora
from tests.tiny import (
    ARCHITECTURES,
    block_outputs,
    merged_model,
    peft_model,
    random_adapter,
    random_ids,
    relative_error,
    save_adapter,
    tiny_model,
)

# Where each architecture has its final norm and its head.
LENS = {
    "llama": ("model.norm", "lm_head"),
    "gemma2": ("model.norm", "lm_head"),
    "gpt2": ("transformer.ln_f", "lm_head"),
    "gpt_neox": ("gpt_neox.final_layer_norm", "lm_head"),
    "opt": ("model.decoder.final_layer_norm", "lm_head"),
}
DISTANCES = ("kl", "js", "cosine", "euclidean")
METHODS = [QaFlora(distance, tokens) for distance in DISTANCES for tokens in ("last", "all")]


def slow_weights(method, base, alone, ids):
    """The formula in loops: `base` and `alone` are models, the base and the base with one adapter each."""
    norm, head = (base.get_submodule(name) for name in LENS[base.config.model_type])
    cap = getattr(base.config, "final_logit_softcapping", None)

    def distribution(state):
        logits = head(norm(state) if method.final_norm else state)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()

    def kl(p, q):
        return (p * torch.log(p / q)).sum()

    def distance(a, b):
        if method.distance == "cosine":
            return 1 - (a @ b) / (a.norm() * b.norm())
        if method.distance == "euclidean":
            return ((a - b) ** 2).sum().sqrt()
        p, q = distribution(a), distribution(b)
        if method.distance == "js":
            return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
        return kl(p, q)

    states, others = block_outputs(base, ids[None])[:, 0], [block_outputs(model, ids[None])[:, 0] for model in alone]
    rows = []
    with torch.no_grad():
        for layer in range(len(states)):
            positions = range(len(ids)) if method.tokens == "all" else [len(ids) - 1]
            found = [sum(distance(states[layer, t], o[layer, t]) for t in positions) / len(positions) for o in others]
            found = [value + method.epsilon for value in found]
            rows.append(torch.stack([value / sum(found) for value in found]))
    return torch.stack(rows)


def one_hot(position, adapters):
    return [float(i == position) for i in range(adapters)]


def fused(architecture, adapters, dtype=torch.float64, **changes):
    base = tiny_model(architecture, dtype, **changes)
    return FusedModel.from_adapters(base, {adapter.name: adapter for adapter in adapters}, QaFlora())


# ---- The formula ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    architecture=st.sampled_from(sorted(LENS)),
    plan=st.lists(
        st.tuples(
            st.integers(1, 5),
            st.sampled_from(["plain", "dora", "lora_bias", "rslora"]),
            st.integers(1, 7),
            st.sampled_from([None, [1], [0, 2]]),
        ),
        min_size=1,
        max_size=3,
    ),
    method=st.sampled_from(METHODS),
    final_norm=st.booleans(),
    length=st.integers(1, 6),
)
def test_any_adapters_and_prompt_give_the_formula(architecture, plan, method, final_norm, length):
    base, known = tiny_model(architecture, torch.float64), ARCHITECTURES[architecture][1]
    adapters = [
        random_adapter(base, f"a{i}", known[:targets], r, kind, seed=i, layers=layers)
        for i, (r, kind, targets, layers) in enumerate(plan)
    ]
    method = QaFlora(method.distance, method.tokens, final_norm)
    ids = random_ids(1, length)[0]
    alone = [merged_model(base, adapters, one_hot(i, len(plan))) for i in range(len(plan))]
    found = fused(architecture, adapters).weigh(ids[None], method=method)
    assert found.shape == (1, 3, len(plan))
    torch.testing.assert_close(found[0], slow_weights(method, base, alone, ids), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 3, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("architecture", LENS)
@pytest.mark.parametrize("method", [QaFlora(), QaFlora("js", "all")], ids=["kl", "js"])
def test_the_passes_are_those_of_peft(architecture, method, tmp_path):
    base, targets = tiny_model(architecture), ARCHITECTURES[architecture][1]
    paths = {
        "dora": save_adapter(base, tmp_path / "dora", targets[1:], r=3, use_dora=True, seed=1),
        "bias": save_adapter(base, tmp_path / "bias", targets[:2], r=2, lora_bias=True, seed=2),
        "rslora": save_adapter(base, tmp_path / "rslora", targets, r=5, use_rslora=True, seed=3),
    }
    model, ids = FusedModel.from_adapters(copy.deepcopy(base), paths, method), random_ids(1)
    expected = slow_weights(method, base, [peft_model(base, path) for path in paths.values()], ids[0])
    found = model.weigh(ids)[0]
    assert relative_error(found, expected) < 1e-3
    assert expected.std() > 0.01, "weights that hardly differ would hide errors"


def test_a_softcap_is_part_of_the_lens():
    base = tiny_model("gemma2", torch.float64)
    adapters = [random_adapter(base, f"a{i}", seed=i) for i in range(2)]
    ids = random_ids(1)
    weights = [fused("gemma2", adapters, final_logit_softcapping=cap).weigh(ids) for cap in (0.5, 30.0)]
    assert relative_error(*weights) > 1e-3


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.distance}-{method.tokens}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_equal_where_nothing_differs(method, dtype):
    base = tiny_model()
    adapters = [random_adapter(base, f"a{i}", seed=i, layers=[2], r=i + 1) for i in range(3)]
    found = fused("llama", adapters, dtype).weigh(random_ids(), method=method)
    torch.testing.assert_close(found[:, :2], torch.full((2, 2, 3), 1 / 3), rtol=0, atol=1e-6)
    assert (found[:, 2] - 1 / 3).abs().max() > 0.01


def test_an_adapter_that_changes_nothing_weighs_nothing():
    base = tiny_model(dtype=torch.float64)
    silent, other = random_adapter(base, "silent"), random_adapter(base, "other", seed=2)
    for module in silent.modules.values():
        module.lora_B.zero_()
    found = fused("llama", [silent, other]).weigh(random_ids(1))
    assert found[..., 0].abs().max() < 1e-6
    torch.testing.assert_close(found[..., 1], torch.ones(1, 3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_half_precision_is_near_the_float64_truth():
    adapters = [random_adapter(tiny_model(), f"a{i}", seed=i) for i in range(3)]
    truth, ids = fused("llama", adapters).weigh(random_ids()), random_ids()
    assert relative_error(fused("llama", adapters, torch.float32).weigh(ids), truth) < 1e-4
    assert relative_error(fused("llama", adapters, torch.bfloat16).weigh(ids), truth) < 0.1


# ---- One request at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("budget", [1, 7, 20])
def test_passes_may_be_split(tokens, budget, monkeypatch):
    base = tiny_model(dtype=torch.float64)
    kinds = ["plain", "dora", "lora_bias", "rslora"]
    model = fused("llama", [random_adapter(base, kind, kind=kind, seed=i) for i, kind in enumerate(kinds)])
    method = QaFlora(tokens=tokens)
    whole, ids = model.weigh(random_ids(), method=method), random_ids()
    calls = []
    handle = model.base_model.model.layers[0].register_forward_hook(lambda _, args, __: calls.append(args[0].shape[0]))
    monkeypatch.setattr("loraflow.core.probe.TOKENS_A_PASS", budget)
    torch.testing.assert_close(model.weigh(ids, method=method), whole)
    handle.remove()
    rows = max(1, budget // 9)
    assert calls == 2 * [min(rows, 5 - start) for start in range(0, 5, rows)]


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_the_lens_may_be_split_too(tokens, monkeypatch):
    base = tiny_model(dtype=torch.float64)
    model = fused("llama", [random_adapter(base, f"a{i}", seed=i) for i in range(2)])
    whole = model.weigh(random_ids(), method=QaFlora(tokens=tokens))
    monkeypatch.setattr("loraflow.methods.qa_flora._LENS_VALUES", 400)
    torch.testing.assert_close(model.weigh(random_ids(), method=QaFlora(tokens=tokens)), whole)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.distance}-{method.tokens}")
def test_weights_do_not_depend_on_who_shares_the_batch(side, method):
    base = tiny_model()
    model = fused("llama", [random_adapter(base, f"a{i}", r=i + 1, seed=i) for i in range(3)], torch.float32)
    rows = [random_ids(1, length, seed=length)[0] for length in (4, 9, 1, 9)]
    ids, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, span], mask[i, span] = row, 1
    together = model.weigh(ids, mask, method)
    for i, row in enumerate(rows):
        assert torch.equal(together[i], model.weigh(row[None], method=method)[0])
    turned = model.weigh(ids.flip(0), mask.flip(0), method)
    assert torch.equal(turned, together.flip(0))


def test_the_pass_stops_before_the_head(monkeypatch):
    base = tiny_model(dtype=torch.float64)
    model = fused("llama", [random_adapter(base, f"a{i}", seed=i) for i in range(2)])
    heads, norms = [], []
    model.base_model.lm_head.register_forward_hook(lambda _, args, __: heads.append(args[0].shape[:-1].numel()))
    model.base_model.model.norm.register_forward_hook(lambda _, args, __: norms.append(args[0].shape[:-1].numel()))
    model.weigh(random_ids(1))
    # The lens reads one token of each of the three passes in each layer; never the nine of the prompt.
    assert heads
    assert max(heads) <= 3
    assert max(norms) <= 3
    heads.clear()
    norms.clear()
    model.weigh(random_ids(1), method=QaFlora("cosine"))
    assert heads == norms == []


def test_reading_a_prompt_leaves_the_model_as_it_was():
    base = tiny_model()
    model = fused("llama", [random_adapter(base, f"a{i}", seed=i) for i in range(2)], torch.float32)
    ids = random_ids()
    with model.using("average"):
        before = model(ids, output_hidden_states=True)
        model.train()
        model.weigh(ids, method=QaFlora())
        assert model.training
        model.eval()
        after = model(ids, output_hidden_states=True)
    assert torch.equal(after.logits, before.logits)
    assert all(torch.equal(a, b) for a, b in zip(after.hidden_states, before.hidden_states, strict=True))


# ---- Parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (
            {"distance": "cosin"},
            "`distance` is unknown: 'cosin'. Known: 'cosine', 'euclidean', 'js', 'kl'. Did you mean 'cosine'?",
        ),
        ({"tokens": "first"}, "`tokens` is unknown: 'first'. Known: 'all', 'last'."),
        ({"epsilon": 0}, "`epsilon` (=0) must be a positive number."),
    ],
)
def test_settings_that_cannot_be_are_refused(parameters, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        QaFlora(**parameters)

"""LoGo: scores from the base's own pass by the formula, whatever came before and shares the batch."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel
from loraflow.errors import MethodError
from loraflow.methods import Logo
from tests.tiny import ARCHITECTURES, random_adapter, random_ids, tiny_model


def slow_weights(method, base, adapters, ids, module):
    """The formula in loops, with the input of the base's own linear noted by a hook."""
    seen = []
    handle = base.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        base(ids[None])
    handle.remove()
    x = seen[0].reshape(len(ids), -1)[-1]
    scores = []
    for adapter in adapters:
        update = adapter.modules[module]
        u = [sum(a * b for a, b in zip(row, x.tolist(), strict=True)) for row in update.lora_A.tolist()]
        o = [update.scaling * sum(a * b for a, b in zip(row, u, strict=True)) for row in update.lora_B.tolist()]
        if method.score == "norm":
            scores.append(math.sqrt(sum(value**2 for value in o)))
        else:
            total = sum(math.exp(value) for value in o)
            p = [math.exp(value) / total for value in o]
            scores.append(1 / -sum(value * math.log(value) for value in p))
    kept = sorted(scores, reverse=True)[: method.top_k or len(scores)]
    return [score / sum(kept) if score in kept else 0.0 for score in scores]


def fused(base, adapters, method="average"):
    return FusedModel.from_adapters(base, {adapter.name: adapter for adapter in adapters}, method)


@settings(max_examples=40)
@given(
    place=st.sampled_from(
        [
            ("llama", "model.layers.2.self_attn.q_proj"),
            ("gpt2", "transformer.h.2.attn.c_attn"),
            ("gpt_neox", "gpt_neox.layers.2.attention.query_key_value"),
            ("opt", "model.decoder.layers.2.self_attn.q_proj"),
        ]
    ),
    plan=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from(["plain", "lora_bias", "rslora"]), st.integers(1, 3)),
        min_size=1,
        max_size=4,
    ),
    score=st.sampled_from(["norm", "entropy"]),
    top_k=st.none() | st.integers(1, 4),
    length=st.integers(1, 6),
)
def test_any_adapters_and_prompt_give_the_formula(place, plan, score, top_k, length):
    (architecture, module), top_k = place, top_k and min(top_k, len(plan))
    base, known = tiny_model(architecture, torch.float64), ARCHITECTURES[architecture][1]
    # q first: all have it; the rest of their targets differs.
    first = "q_proj" if "q_proj" in known else known[0]
    adapters = [
        random_adapter(base, f"a{i}", [first, *known[:more]], r, kind, seed=i) for i, (r, kind, more) in enumerate(plan)
    ]
    method, ids = Logo(score, top_k), random_ids(1, length)[0]
    expected = slow_weights(method, base, adapters, ids, module)
    found = fused(base, adapters).weigh(ids[None], method=method)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).expand(1, 3, -1))


def test_without_the_query_projection_the_first_linear_that_all_adapters_target_is_probed():
    base = tiny_model(dtype=torch.float64)
    adapters = [
        random_adapter(base, "a", ["q_proj", "o_proj", "up_proj"], seed=1),
        random_adapter(base, "b", ["up_proj", "o_proj"], seed=2),
    ]
    ids, model = random_ids(1)[0], fused(base, adapters, Logo())
    for module, name in ((None, "self_attn.o_proj"), ("mlp.up_proj", "mlp.up_proj")):
        expected = slow_weights(Logo(), tiny_model(dtype=torch.float64), adapters, ids, f"model.layers.2.{name}")
        found = model.weigh(ids[None], method=Logo(module=module))[0, 0]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_weights_do_not_depend_on_the_request_before():
    # The official code probes with the adapters of the request before.
    base = tiny_model()
    model = fused(base, [random_adapter(base, f"a{i}", seed=i) for i in range(3)], Logo())
    first, second = random_ids(1, seed=1), random_ids(1, seed=2)
    expected = model.weigh(second)
    model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=3, do_sample=False)
    assert torch.equal(model.weigh(second), expected)
    with model.using({"a0": 5.0}):
        assert torch.equal(model.weigh(second, method=Logo()), expected)


@pytest.mark.parametrize("score", ["norm", "entropy"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_weights_do_not_depend_on_who_shares_the_batch(score, side):
    base = tiny_model()
    model = fused(base, [random_adapter(base, f"a{i}", seed=i) for i in range(3)], Logo(score))
    rows = [random_ids(1, length, seed=length)[0] for length in (4, 9, 1)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, span], mask[i, span] = row, 1
    for found, row in zip(model.weigh(ids, mask), rows, strict=True):
        assert torch.equal(found, model.weigh(row[None])[0])


def test_where_no_adapter_answers_all_weigh_the_same():
    base = tiny_model()
    adapters = [random_adapter(base, f"a{i}", seed=i) for i in range(3)]
    for adapter in adapters:
        for update in adapter.modules.values():
            update.lora_B.zero_()
    found = fused(base, adapters, Logo()).weigh(random_ids(1))
    torch.testing.assert_close(found, torch.full((1, 3, 3), 1 / 3))


def test_the_pass_stops_at_the_probed_linear():
    base = tiny_model()
    model = fused(base, [random_adapter(base, "a")], Logo())
    ran = []
    for name in ("model.layers.2.self_attn.o_proj", "model.norm", "lm_head"):
        model.base_model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model.weigh(random_ids(1))
    assert ran == []


def test_adapters_without_a_linear_in_common_are_refused():
    base = tiny_model()
    adapters = [random_adapter(base, "a", ["q_proj"]), random_adapter(base, "b", ["up_proj"])]
    with pytest.raises(MethodError, match=r"there is none that all of them target\. Leave the odd adapter out"):
        fused(base, adapters, Logo())
    adapters = [random_adapter(base, "a", ["q_proj", "v_proj"]), random_adapter(base, "b", ["q_proj"], layers=[0])]
    with pytest.raises(MethodError, match="one linear of the last layer"):
        fused(base, adapters, Logo())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Logo("norms"), "`score` is unknown: 'norms'. Known: 'entropy', 'norm'. Did you mean 'norm'?"),
        (lambda: Logo(top_k=3).check(["a", "b"]), "`top_k` (=3) must be between 1 and the number of adapters (=2)."),
        (
            lambda: fused(
                tiny_model(), [random_adapter(tiny_model(), "a", ["q_proj"])], Logo(module="self_attn.k_proj")
            ),
            "`module` is not one that all adapters target: 'self_attn.k_proj'. Known: 'self_attn.q_proj'.",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        make()

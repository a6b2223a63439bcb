"""LoraRetriever: who is retrieved, by loops over the formula; what is done with them, against merged matrices."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel, LoraRetriever
from loraflow.core.probe import Prompt
from loraflow.errors import MethodError
from loraflow.training import answer_loss
from tests.methods.test_lorahub import mixed_model
from tests.tiny import block_outputs, merged_model, random_adapter, random_ids, relative_error, tiny_model

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def fused(base, adapters, method, samples=None):
    model = FusedModel.from_adapters(copy.deepcopy(base), {one.name: one for one in adapters}, method)
    if samples is not None:
        model.gates["model"].set_samples(samples)
    return model


def same_adapters(base, count=3, **options):
    return [random_adapter(base, name, seed=i, **options) for i, name in enumerate("abcde"[:count])]


def slow_weights(query, samples, count, center):
    """The formula in loops, from vectors of length 1."""
    vectors = [[sum(column) / len(column) for column in zip(*of_one, strict=True)] for of_one in samples]
    if center:
        origin = [sum(column) / len(column) for column in zip(*vectors, strict=True)]
        query = [a - b for a, b in zip(query, origin, strict=True)]
        vectors = [[a - b for a, b in zip(vector, origin, strict=True)] for vector in vectors]
    scores = [sum(a * b for a, b in zip(query, vector, strict=True)) for vector in vectors]
    nearest = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    return [1 / count if i in nearest else 0.0 for i in range(len(scores))]


@settings(max_examples=15)
@given(
    architecture=st.sampled_from(["llama", "gpt2"]),
    layer=st.integers(-3, 2),
    mode=st.sampled_from(["mixture", "selection"]),
    center=st.none() | st.booleans(),
    samples=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    top_k=st.none() | st.integers(1, 5),
    length=st.integers(1, 6),
)
def test_any_samples_and_prompt_give_the_formula(architecture, layer, mode, center, samples, top_k, length):
    base = tiny_model(architecture, torch.float64)
    top_k = None if mode == "selection" or top_k is None else min(top_k, len(samples))
    method = LoraRetriever(mode, top_k, center=center, layer=layer)
    vectors = [torch.nn.functional.normalize(torch.randn(count, 32), dim=1) for count in samples]
    ids = random_ids(1, length)
    mean = block_outputs(base, ids)[layer, 0].float().mean(dim=0).double()
    count = 1 if mode == "selection" else top_k or min(3, len(samples))
    model = fused(base, same_adapters(base, len(samples)), method, vectors)
    kept = [[row.mean(dim=0).double().tolist()] for row in vectors]
    expected = slow_weights((mean / mean.norm()).tolist(), kept, count, center is not False)
    assert torch.equal(model.weigh(ids), torch.tensor(expected).double().expand(1, 3, -1))


def test_of_equal_adapters_the_first_is_retrieved():
    base = tiny_model()
    model = fused(base, same_adapters(base), LoraRetriever("selection", center=False), [torch.ones(1, 32)] * 3)
    assert model.weigh(random_ids())[:, 0].tolist() == [[1.0, 0.0, 0.0]] * 2


# ---- What is done with the retrieved -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", ["mixture", "selection", "fusion"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_are_answered_by_what_each_has_retrieved(mode, architecture):
    base = tiny_model(architecture, torch.float64)
    adapters = [
        random_adapter(base, name, seed=i, kind=kind)
        for i, (name, kind) in enumerate(zip("abcd", ["plain", "rslora", "lora_bias", "plain"], strict=True))
    ]
    method = LoraRetriever(mode, None if mode == "selection" else 2)
    ids = random_ids(3)
    # Each row has an adapter of its own.
    means = [block_outputs(base, row[None])[-1].float().mean(dim=1) for row in (*ids, random_ids(1, seed=9)[0])]
    model = fused(base, adapters, method, [torch.nn.functional.normalize(mean) for mean in means])
    weights = model.weigh(ids)[:, 0]
    assert all(row[i] > 0 for i, row in enumerate(weights))
    assert len({tuple(row.tolist()) for row in weights}) > 1
    merge = mixed_model if mode == "fusion" else merged_model
    expected = [merge(base, adapters, row.tolist())(ids[i : i + 1]).logits[0] for i, row in enumerate(weights)]
    assert relative_error(model(ids, fusion_weights=model.weigh(ids)).logits, torch.stack(expected)) < 1e-9
    # Beside rows of other methods, and padded on the left, each has what it has alone.
    options = {"attention_mask": torch.ones_like(ids), **GREEDY}
    found = model.generate(ids, **options)
    beside = model.generate(ids, methods=[None, "b", None], **options)
    assert torch.equal(beside[0], found[0])
    assert torch.equal(beside[2], found[2])
    padded = torch.nn.functional.pad(ids[:1], (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids[:1]), (4, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[0, 4:], found[0])
    for i, row in enumerate(weights):
        alone = merge(base, adapters, row.tolist()).generate(ids[i : i + 1], attention_mask=mask[:, 4:], **GREEDY)
        assert torch.equal(alone[0], found[i])
    traced = model.trace(found, prompt_length=ids.shape[1])
    torch.testing.assert_close(traced.weights[:, 0, 0].double(), weights)


def test_a_fusion_of_two_is_not_their_mixture():
    base = tiny_model(dtype=torch.float64)
    adapters, samples = same_adapters(base, 2), [torch.ones(1, 32), -torch.ones(1, 32)]
    ids = random_ids(1)
    mixture, fusion = (
        (model := fused(base, adapters, LoraRetriever(mode), samples))(ids, fusion_weights=model.weigh(ids)).logits
        for mode in ("mixture", "fusion")
    )
    assert relative_error(mixture, fusion) > 0.01
    # By hand, at one linear.
    x = torch.randn(4, 32, dtype=torch.float64)
    name = next(iter(adapters[0].modules))
    updates = [one.modules[name] for one in adapters]
    A = sum(update.lora_A.double() for update in updates) / 2
    B = sum(update.scaling * update.lora_B.double() for update in updates) / 2
    linear = mixed_model(base, adapters, [0.5, 0.5]).get_submodule(name)
    torch.testing.assert_close(linear(x), base.get_submodule(name)(x) + x @ A.T @ B.T)


@torch.no_grad()
def test_the_loss_of_an_answer_is_that_of_the_merged_matrices():
    base = tiny_model(dtype=torch.float64)
    adapters = same_adapters(base)
    model = fused(base, adapters, LoraRetriever("fusion"), torch.randn(3, 1, 32).unbind())
    ids = random_ids(1)
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    merged = mixed_model(base, adapters, [1 / 3] * 3)
    torch.testing.assert_close(
        answer_loss(model, input_ids=ids, labels=labels), answer_loss(merged, input_ids=ids, labels=labels)
    )


# ---- What cannot be ------------------------------------------------------------------------------------------------


def test_without_samples_there_is_nothing_to_retrieve_by():
    base = tiny_model()
    with pytest.raises(MethodError, match=r"The centroids are not made yet\. Fit the method on samples"):
        fused(base, same_adapters(base), LoraRetriever()).weigh(random_ids())


@pytest.mark.parametrize("mode", ["mixture", "selection"])
def test_unequal_ranks_are_mixed_but_not_fused(mode):
    base = tiny_model()
    adapters = [random_adapter(base, "a", r=4), random_adapter(base, "b", r=2)]
    fused(base, adapters, LoraRetriever(mode))
    with pytest.raises(MethodError, match=r"at 'layers\.0\.self_attn\.q_proj', 'a' has 4 and 'b' has 2\. Set `mode`"):
        fused(base, adapters, LoraRetriever("fusion"))
    adapters[1] = random_adapter(base, "b", ["q_proj", "v_proj"])
    with pytest.raises(MethodError, match=r"'a' has 4 and 'b' has 0\. .* or leave the odd adapter out\."):
        fused(base, adapters, LoraRetriever("fusion"))


def test_a_dora_is_mixed_but_not_fused():
    base = tiny_model()
    adapters = [random_adapter(base, "a"), random_adapter(base, "b", kind="dora")]
    fused(base, adapters, LoraRetriever())
    with pytest.raises(MethodError, match=r"LoraRetriever's fusion mixes A and B, and adapter 'b' is a DoRA"):
        fused(base, adapters, LoraRetriever("fusion"))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: LoraRetriever("mix"), "`mode` is unknown: 'mix'. Known: 'fusion', 'mixture', 'selection'."),
        (lambda: LoraRetriever("selection", 2), '`top_k` (=2) must be 1 where `mode` is "selection"'),
        (lambda: LoraRetriever(top_k=4).check("abc"), "`top_k` (=4) must be between 1 and the number of adapters (=3)"),
        (lambda: LoraRetriever(instruction="I: "), "`instruction` (='I: ') is for encoders of texts"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        make()


def test_vectors_are_of_length_one():
    base = tiny_model()
    model = fused(base, same_adapters(base), LoraRetriever("selection", center=False))
    embedded = model.method.embed(Prompt(model.attachment, random_ids(1)[0]), model.gates["model"])
    torch.testing.assert_close(embedded.norm(), torch.tensor(1.0))

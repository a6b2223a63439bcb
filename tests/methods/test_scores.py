"""Scores of query-level methods: by slow loops, and the weights of those that are left of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel
from loraflow.core.probe import Prompt
from loraflow.methods import METHODS, Centroid, Logo, QaFlora, QueryMethod, ScoredMethod
from tests.tiny import block_outputs, merged_model, random_adapter, random_ids, tiny_model

NAMES = ("a", "b", "c")
IDS = random_ids(1, 7)[0]


@pytest.fixture(scope="module")
def adapters():
    base = tiny_model(dtype=torch.float64)
    return {name: random_adapter(base, name, r=i + 1, seed=i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def fused(adapters):
    return FusedModel.from_adapters(tiny_model(dtype=torch.float64), adapters)


@torch.no_grad()
def scores_of(fused, method, samples=None):
    """What a method scores the prompt with."""
    gates = fused.attachment.make_gates(method)
    if samples is not None:
        gates["model"].set_samples(samples)
    prompt = Prompt(fused.attachment, IDS)
    found = method.scores(prompt, gates["model"])
    assert torch.equal(method.weigh(prompt, gates["model"]), method.weights_of(found))
    return found


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


# ---- By slow loops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["norm", "entropy"])
def test_logos_are_those_of_the_updates_outputs(fused, adapters, score):
    base, seen = tiny_model(dtype=torch.float64), []
    linear = base.model.layers[-1].self_attn.q_proj
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1].tolist()))
    with torch.no_grad():
        base(IDS[None])
    expected = []
    for adapter in adapters.values():
        update = adapter.modules["model.layers.2.self_attn.q_proj"]
        u = [sum(a * b for a, b in zip(row, seen[0], strict=True)) for row in update.lora_A.tolist()]
        o = [update.scaling * sum(a * b for a, b in zip(row, u, strict=True)) for row in update.lora_B.tolist()]
        entropy = -sum(p * math.log(p) for p in softmax(o))
        expected.append(math.sqrt(sum(value**2 for value in o)) if score == "norm" else 1 / entropy)
    assert scores_of(fused, Logo(score, top_k=1)).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("center", [True, False])
def test_centroids_are_cosines(fused, center):
    samples = [torch.randn(count, 32) for count in (1, 2, 3)]
    centroids = [[sum(column) / len(of_one) for column in zip(*of_one.tolist(), strict=True)] for of_one in samples]
    query = block_outputs(tiny_model(dtype=torch.float64), IDS[None])[-1, 0].mean(dim=0).tolist()
    if center:
        origin = [sum(column) / 3 for column in zip(*centroids, strict=True)]
        query = [a - b for a, b in zip(query, origin, strict=True)]
        centroids = [[a - b for a, b in zip(one, origin, strict=True)] for one in centroids]
    expected = [
        sum(a * b for a, b in zip(query, one, strict=True)) / (math.hypot(*query) * math.hypot(*one))
        for one in centroids
    ]
    # Embeddings are float32.
    found = scores_of(fused, Centroid(center=center, top_k=2), samples)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("distance", ["kl", "euclidean"])
def test_qa_floras_are_distances_in_each_layer(fused, adapters, distance):
    base = tiny_model(dtype=torch.float64)
    states = block_outputs(base, IDS[None])[:, 0, -1]
    expected = []
    for adapter in adapters.values():
        alone = block_outputs(merged_model(tiny_model(dtype=torch.float64), [adapter], [1.0]), IDS[None])[:, 0, -1]
        for one, other in zip(states, alone, strict=True):
            if distance == "euclidean":
                expected.append(math.dist(one.tolist(), other.tolist()))
                continue
            p, q = (softmax(base.lm_head(base.model.norm(state)).tolist()) for state in (one, other))
            expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = scores_of(fused, QaFlora(distance))
    assert found.T.flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


# ---- Of those that are left ----------------------------------------------------------------------------------------


@given(
    scores=st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    left=st.sets(st.integers(0, 5), min_size=1),
    method=st.sampled_from([Logo(), Centroid(temperature=0.7), QaFlora()]),
)
@settings(max_examples=60)
def test_the_weights_of_some_are_as_if_there_were_no_others(scores, left, method):
    left = sorted(index for index in left if index < len(scores)) or [0]
    given_scores = torch.tensor(scores, dtype=torch.float64)
    if isinstance(method, QaFlora):
        given_scores = torch.stack([given_scores, given_scores.flip(0), given_scores + 1])
    weights = method.weights_of(given_scores)[..., left]
    found = method.weights_of(given_scores[..., left])
    torch.testing.assert_close(found, weights / weights.sum(dim=-1, keepdim=True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [Logo(top_k=3), Centroid(top_k=3)])
def test_fewer_than_are_to_be_kept_are_all_kept(method):
    found = method.weights_of(torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert (found > 0).all()
    assert found.sum().item() == pytest.approx(1)


def test_every_scored_method_says_what_its_scores_are():
    scored = {name for name, method in METHODS.items() if issubclass(method, ScoredMethod)}
    assert {"qa-flora", "logo", "centroid"} <= scored
    assert all(issubclass(METHODS[name], QueryMethod) and METHODS[name]().measure for name in scored)
    assert Logo("entropy").measure == "inverse entropy of the update, 1 / nats"
    assert QaFlora("cosine").measure == "cosine distance"

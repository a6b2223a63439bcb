"""Centroid: cosines to the adapters' samples by the formula, and the layers that can be read."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from loraflow import FusedModel
from loraflow.errors import MethodError
from loraflow.methods import Centroid
from tests.tiny import (
    VOCAB,
    block_outputs,
    merged_model,
    number_tokenizer,
    random_adapter,
    random_ids,
    relative_error,
    save_adapter,
    tiny_model,
)


def slow_weights(method, embedding, samples):
    """The formula in loops, from embeddings."""
    centroids = [[sum(column) / len(column) for column in zip(*of_one, strict=True)] for of_one in samples]
    if method.center:
        origin = [sum(column) / len(column) for column in zip(*centroids, strict=True)]
        embedding = [a - b for a, b in zip(embedding, origin, strict=True)]
        centroids = [[a - b for a, b in zip(c, origin, strict=True)] for c in centroids]

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    scores = [cosine(embedding, c) / method.temperature for c in centroids]
    kept = sorted(scores, reverse=True)[: method.top_k or len(scores)]
    exponentials = [math.exp(score - max(scores)) if score in kept else 0.0 for score in scores]
    return [value / sum(exponentials) for value in exponentials]


@settings(max_examples=40)
@given(
    architecture=st.sampled_from(["llama", "gpt2", "opt"]),
    layer=st.integers(-3, 2),
    temperature=st.floats(0.05, 5),
    center=st.booleans(),
    samples=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    top_k=st.none() | st.integers(1, 4),
    length=st.integers(1, 6),
)
def test_any_samples_and_prompt_give_the_formula(architecture, layer, temperature, center, samples, top_k, length):
    base = tiny_model(architecture, torch.float64)
    method = Centroid(layer, temperature, top_k and min(top_k, len(samples)), center)
    embeddings = [torch.randn(count, 32, dtype=torch.float64) for count in samples]
    adapters = {f"a{i}": random_adapter(base, f"a{i}", seed=i) for i in range(len(samples))}
    ids = random_ids(1, length)
    embedding = block_outputs(base, ids)[layer, 0].mean(dim=0)
    model = FusedModel.from_adapters(base, adapters, method)
    model.gates["model"].set_samples(embeddings)
    expected = slow_weights(method, embedding.tolist(), [e.tolist() for e in embeddings])
    # Embeddings are float32.
    found = model.weigh(ids)
    torch.testing.assert_close(found, torch.tensor(expected).double().expand(1, 3, -1), rtol=1e-4, atol=1e-5)


def test_a_query_goes_to_the_adapter_whose_samples_it_is():
    base = tiny_model()
    model = FusedModel.from_adapters(
        base, {n: random_adapter(base, n, seed=i) for i, n in enumerate("abc")}, Centroid()
    )
    ids = random_ids(3)
    rows = [block_outputs(tiny_model(), row[None])[-1, 0].mean(dim=0)[None] for row in ids]
    model.gates["model"].set_samples(rows)
    found = model.weigh(ids)[:, 0]
    assert found.argmax(dim=-1).tolist() == [0, 1, 2]
    assert found.diagonal().min() > 0.9
    turned = model.weigh(ids.flip(0))
    assert torch.equal(turned, model.weigh(ids).flip(0))


def test_without_samples_there_is_nothing_to_weigh_by():
    base = tiny_model()
    model = FusedModel.from_adapters(base, {n: random_adapter(base, n) for n in "ab"}, Centroid())
    with pytest.raises(MethodError, match=r"The centroids are not made yet\. Fit the method on samples"):
        model.weigh(random_ids())


def test_centroids_are_saved_and_not_trained():
    base = tiny_model()
    model = FusedModel.from_adapters(base, {"a": random_adapter(base, "a")}, Centroid())
    assert model.state_dict().keys() == {"model.centroids"}
    assert list(model.gates["model"].parameters()) == []
    samples = torch.randn(3, 32)
    model.gates["model"].set_samples([samples])
    torch.testing.assert_close(model.state_dict()["model.centroids"], samples.mean(dim=0)[None])


@torch.no_grad()
def test_each_request_is_answered_with_its_own_weights():
    base = tiny_model(dtype=torch.float64)
    adapters = [random_adapter(base, name, r=i + 2, seed=i) for i, name in enumerate("abc")]
    model = FusedModel.from_adapters(copy.deepcopy(base), {a.name: a for a in adapters}, Centroid(temperature=0.5))
    model.gates["model"].set_samples(torch.randn(3, 2, 32).unbind())
    ids = random_ids()
    weights = model.weigh(ids)
    assert relative_error(weights[0], weights[1]) > 0.01
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    found = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, methods=[None, "base"], **options)[0], found[0])
    for row in range(2):
        merged = merged_model(base, adapters, weights[row].tolist())
        assert torch.equal(merged.generate(ids, **options)[row], found[row])


def test_a_bare_forward_is_refused():
    base = tiny_model()
    model = FusedModel.from_adapters(base, {"a": random_adapter(base, "a")}, Centroid())
    with pytest.raises(MethodError, match=r"a bare forward does not say what the prompt is\. Call `generate`"):
        model(random_ids())


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_the_base_has_not_is_refused(layer):
    base = tiny_model()
    with pytest.raises(MethodError, match=re.escape(f"`layer` (={layer}) must be between -3 and 2.")):
        FusedModel.from_adapters(base, {"a": random_adapter(base, "a")}, Centroid(layer))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Centroid(temperature=0), "`temperature` (=0) must be a positive number."),
        (lambda: Centroid(top_k=0).check(["a"]), "`top_k` (=0) must be between 1 and the number of adapters (=1)."),
        (lambda: Centroid(instruction="Represent: "), "`instruction` (='Represent: ') is for encoders of texts, and "),
    ],
)
def test_settings_that_cannot_be_are_refused(make, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        make()


# ---- Another encoder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small BERT with a tokenizer, on disk."""
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(path)
    number_tokenizer().save_pretrained(path)
    return str(path)


def test_another_model_may_embed_the_texts(encoder, tmp_path):
    base = tiny_model()
    adapters = {name: save_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    model = FusedModel.from_adapters(base, adapters, Centroid(encoder=encoder), tokenizer=number_tokenizer())
    samples = {"a": ["5 6 7", "9 8"], "b": ["40 41 42 43"]}
    model.fit({name: [{"prompt": text, "completion": "3"} for text in texts] for name, texts in samples.items()})
    bert, tokenizer = BertModel.from_pretrained(encoder).eval(), number_tokenizer()

    @torch.no_grad()
    def embed(text):
        return bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)

    centroids = torch.stack([torch.stack([embed(text) for text in texts]).mean(dim=0) for texts in samples.values()])
    torch.testing.assert_close(model.gates["model"].centroids, centroids)
    origin = centroids.mean(dim=0)
    cosines = torch.cosine_similarity(embed("6 7 9") - origin, centroids - origin, dim=-1)
    expected = torch.softmax(cosines / 0.1, dim=-1)
    found = model.weigh(tokenizer("6 7 9", return_tensors="pt")["input_ids"])
    torch.testing.assert_close(found, expected.expand(1, 3, 2), rtol=1e-4, atol=1e-5)
    # The encoder is named in the fusion, not kept in it.
    model.save_pretrained(tmp_path / "fusion")
    again = FusedModel.from_pretrained(tmp_path / "fusion", base=tiny_model(), tokenizer=tokenizer)
    assert set(again.state_dict()) == {"model.centroids"}
    assert torch.equal(again.weigh(random_ids()), model.weigh(random_ids()))


def test_an_encoder_that_is_none_is_named(tmp_path):
    base = tiny_model()
    adapters = {name: save_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    with pytest.raises(MethodError, match="is no model that transformers can load"):
        FusedModel.from_adapters(base, adapters, Centroid(encoder=str(tmp_path)))

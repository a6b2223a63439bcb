"""An adapter joins a fitted fusion: the others' vectors stay, in the same model, by a file, and where digests agree."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch

from loraflow import Centroid, FusedModel, LoraRetriever
from loraflow.adapters import AdapterVectors
from loraflow.errors import DataError, MethodError
from loraflow.training import fit, take_vectors, vectors_of
from tests.tiny import number_tokenizer, random_adapter, random_ids, tiny_model
from tests.training.test_fit import console, reversals

__all__ = ["console"]

OWN = {name: reversals(3 + i, seed=i) for i, name in enumerate("abc")}


@pytest.fixture(scope="module")
def base():
    return tiny_model()


def make(base, names, method=None, seed=0):
    adapters = {name: random_adapter(base, name, seed=seed) for name in names}
    return FusedModel.from_adapters(
        copy.deepcopy(base), adapters, method or LoraRetriever(), tokenizer=number_tokenizer()
    )


@pytest.mark.parametrize("method", [LoraRetriever(), Centroid(layer=1)], ids=lambda method: method.name)
def test_an_adapter_joins_without_the_samples_of_the_others(base, console, tmp_path, method):
    two = make(base, "ba", method)
    fit(two, {name: OWN[name] for name in "ab"}, console=console)
    path = vectors_of(two).save(tmp_path)
    three = make(base, "abc", method)
    vectors = AdapterVectors.read(path)
    assert take_vectors(three, vectors) == ["c"]
    with pytest.raises(MethodError, match=r"There is no centroid of 'c' yet\. Fit the method on samples of what those"):
        three.weigh(random_ids())
    fit(three, {"c": OWN["c"]}, console=console)
    whole = make(base, "abc", method)
    fit(whole, OWN, console=console)
    assert torch.equal(three.gates["model"].centroids, whole.gates["model"].centroids)
    assert torch.equal(three.weigh(random_ids()), whole.weigh(random_ids()))
    assert three.training_record == {"samples": {"c": 5}}
    assert whole.training_record == {"samples": {"a": 3, "b": 4, "c": 5}}
    # One of them again, in the same model.
    fit(whole, {"b": OWN["c"]}, console=console)
    assert whole.training_record == {"samples": {"a": 3, "b": 5, "c": 5}}
    assert torch.equal(whole.gates["model"].centroids[1], whole.gates["model"].centroids[2])
    assert torch.equal(whole.gates["model"].centroids[0], three.gates["model"].centroids[0])


def test_a_replaced_adapter_is_not_given_the_vector_of_the_one_before(base, console):
    model = make(base, "ab")
    fit(model, {name: OWN[name] for name in "ab"}, console=console)
    vectors = vectors_of(model)
    other = make(base, "ab")
    changed = [dataclasses.replace(one, digest="another") if one.name == "b" else one for one in other.adapters]
    other = FusedModel.from_adapters(
        copy.deepcopy(base), {one.name: one for one in changed}, LoraRetriever(), tokenizer=number_tokenizer()
    )
    assert take_vectors(other, vectors) == ["b"]
    assert not other.gates["model"].centroids[1].any()
    with pytest.raises(DataError, match="there is none for 'b'"):
        fit(other, {"a": OWN["a"]}, console=console)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda a, b: vectors_of(a), "The method 'lora-retriever' has made no vectors yet. Fit it on samples"),
        (lambda a, b: vectors_of(b), "The method 'average' keeps no vectors of its adapters. Take 'lora-retriever'"),
        (lambda a, b: take_vectors(a, AdapterVectors("bge", 32)), "The vectors were made by bge, and the method"),
    ],
)
def test_what_cannot_be_is_refused(base, act, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        act(make(base, "ab"), make(base, "ab", "average"))

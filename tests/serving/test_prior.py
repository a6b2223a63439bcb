"""Requests whose tokens are weighed by what their own prompts say: answered beside others as alone."""

from __future__ import annotations

import copy

import pytest
import torch

from loraflow import FusedModel, Ramole
from loraflow.demo.tasks import load_task
from loraflow.demo.world import adapter_paths, base_path
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from tests.serving.worlds import alone, job, running, send
from tests.tiny import set_random_gates


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("fusions") / "retrieving"
    model = FusedModel.from_adapters(base_path(), adapter_paths(), Ramole(retrieve=2))
    set_random_gates(model, 3)
    model.save_pretrained(path)
    return path, model


def test_requests_are_answered_by_what_was_retrieved_for_each(saved):
    path, model = saved
    catalog = Catalog.open(None, {}, {"retrieving": str(path)}, base_id="small")
    served = catalog.find("retrieving")
    questions = [load_task(name).test[0].prompt for name in ("zh-math", "es-code", "ru-math")]
    prompts = [model.encode([question])["input_ids"][0].tolist() for question in questions]
    weighers = [catalog.weigher(served, prompt) for prompt in prompts]
    again = catalog.weigher(served, prompts[0])
    # Pages of the cache are shared by those for whom the same was retrieved, and by no others.
    retrieved = [tuple(next(iter(one.gates.values())).heard.candidates) for one in weighers]
    assert all(len(found) == 2 for found in retrieved)
    assert again.digest == weighers[0].digest
    for found, one in zip(retrieved, weighers, strict=True):
        assert (one.digest == weighers[0].digest) == (found == retrieved[0])
    expected = [alone(model, prompt, new=12) for prompt in prompts]
    with running(catalog.model, EngineLimits(requests=8, batch_tokens=24, cache_tokens=2048, page_tokens=16)) as engine:
        heard = [send(engine, job(p, one, new=12)) for p, one in zip(prompts, weighers, strict=True)]
        assert [listener.ids() for listener in heard] == expected
        with_weights = send(engine, job(prompts[0], weighers[0], new=2, weights=True))
        for token in with_weights.tokens():
            used = (token.weights > 0).any(dim=0).nonzero().flatten().tolist()
            assert used == list(retrieved[0])


def test_a_copy_retrieves_alike(saved):
    _, model = saved
    ids = model.encode([load_task("zh-math").test[1].prompt])["input_ids"]
    copied = copy.deepcopy(model)
    assert torch.equal(copied.trace(ids).weights, model.trace(ids).weights)

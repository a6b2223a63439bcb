"""Attention of many requests at once: each reads its own keys, and little more."""

from __future__ import annotations

import pytest
import torch

from loraflow.serving.config import EngineLimits
from loraflow.serving.jobs import Weigher
from tests.serving.worlds import alone, job, running, send, tiny_fusion
from tests.tiny import random_ids

LIMITS = EngineLimits(requests=16, batch_tokens=512, cache_tokens=2048, page_tokens=16, prefix_caching=False)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_requests_of_unequal_length_read_little_more_than_their_own(architecture, monkeypatch):
    model = tiny_fusion(architecture)
    # One far longer than the others, in the middle of them.
    lengths = [3, 17, 17, 5, 110, 20, 1, 64, 33]
    cases = [random_ids(1, length, seed=length + place)[0].tolist() for place, length in enumerate(lengths)]
    expected = [alone(model, tokens, "base", new=6) for tokens in cases]
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counting(query, key, value, *args, **kwargs):
        calls.append((query.shape[0], query.shape[2], key.shape[2]))
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    with running(model, LIMITS) as engine:
        heard = [send(engine, job(tokens, Weigher(), 6)) for tokens in cases]
        assert [listener.ids() for listener in heard] == expected
    layers, longest = model.base_model.config.num_hidden_layers, max(lengths) + 6
    assert all(keys <= longest for _, _, keys in calls)
    # Several requests with one new token each are read in one call.
    together = [requests for requests, new, _ in calls if new == 1]
    assert max(together) >= 3
    own = sum((length + step) for length in lengths for step in range(1, 6)) * layers
    assert sum(requests * keys for requests, new, keys in calls if new == 1) <= 2 * own

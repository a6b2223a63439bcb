"""Weights of requests on the V2 model runner, as far as that can be tested without a GPU: on vLLM's own classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from torch import nn
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.sample.logits_processor import (
    build_custom_logits_processors,
    build_custom_logits_processors_params_validator,
)

from loraflow.methods import LoraFlow
from loraflow.serving.vllm.model_state import RequestingState
from loraflow.serving.vllm.request_table import RequestTable
from loraflow.serving.vllm.request_weights import KEY, processor_name
from loraflow.serving.vllm.requests import install_table
from tests.serving.vllm.world import save_base, save_fusion

pytestmark = pytest.mark.vllm

ADAPTERS = ("zh", "math", "code")
V2 = SimpleNamespace(use_v2_model_runner=True)


class Model(nn.Module):
    """Stands for a model of vLLM."""


@pytest.fixture
def table():
    return RequestTable(requests=4, tokens=16, layers=2, adapters=ADAPTERS)


@pytest.fixture
def state(table):
    model = Model()
    install_table(model, table, V2)
    assert resolve_model_state_cls(V2, model) is RequestingState
    # Its other parts need a GPU's runner.
    state = RequestingState.__new__(RequestingState)
    state.model, state.rope_state, state.prompt_embeds_state = model, None, None
    return state


def add(state, slot, weights=None):
    extra = None if weights is None else {KEY: weights}
    state.add_request(slot, SimpleNamespace(sampling_params=SamplingParams(extra_args=extra)))


def batch(slots, lengths, padded):
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), *[99] * 3], dtype=torch.int32)
    mapping = torch.tensor([*slots, *[0] * 3], dtype=torch.int32)
    return SimpleNamespace(
        num_reqs=len(slots), query_start_loc=starts, idx_mapping=mapping, num_tokens_after_padding=padded
    )


def settled(table, tokens, layer=0):
    """Each token's weight of the first adapter, where the method gives 9."""
    return table.settle(torch.full((tokens, 3), 9.0), layer, tokens)[:, 0].tolist()


def test_tokens_have_the_weights_of_their_slots(state, table):
    add(state, 0, {"zh": 0.5})
    add(state, 1)
    add(state, 3, [{"zh": 1.0}, {"zh": -1.0}])
    # The batch is in another order than the slots, and a graph wants more tokens than there are.
    assert state.prepare_inputs(batch([3, 0, 1], [2, 3, 1], padded=8), None) == {}
    assert settled(table, 8) == [1.0, 1.0, 0.5, 0.5, 0.5, 9.0, 9.0, 9.0]
    assert settled(table, 8, layer=1) == [-1.0, -1.0, 0.5, 0.5, 0.5, 9.0, 9.0, 9.0]


def test_slots_are_used_again(state, table):
    add(state, 2, {"zh": 0.25})
    state.prepare_inputs(batch([2], [3], padded=3), None)
    assert settled(table, 3) == [0.25] * 3
    # vLLM gives a slot to the next request without a word.
    add(state, 2)
    state.prepare_inputs(batch([2], [3], padded=3), None)
    assert settled(table, 3) == [9.0] * 3


def test_writing_is_in_place(state, table):
    before = [table.weights.data_ptr(), table.brings.data_ptr(), table.places.data_ptr()]
    add(state, 1, {"math": 1.0})
    state.prepare_inputs(batch([1], [4], padded=4), None)
    assert [table.weights.data_ptr(), table.brings.data_ptr(), table.places.data_ptr()] == before


def test_wrong_weights_are_refused_before_the_engine(tmp_path):
    base = save_base(tmp_path / "llama")
    name = processor_name(str(save_fusion(tmp_path / "fusion", base, LoraFlow())))
    check = build_custom_logits_processors_params_validator([name])
    check(SamplingParams(extra_args={KEY: {"zh": 1.0}}))
    with pytest.raises(VLLMValidationError, match="names the unknown adapter 'de'"):
        check(SamplingParams(extra_args={KEY: {"de": 1.0}}))
    slots = SimpleNamespace(
        **dict.fromkeys(("device", "max_num_reqs", "vocab_size", "all_token_ids", "prompt_len"), None),
        prefill_len=None,
        total_len=None,
    )
    config = SimpleNamespace(load_config=SimpleNamespace(load_format="loraflow"))
    (processor,) = build_custom_logits_processors(config, slots, False, [name])
    assert processor.add_request(0, SamplingParams()) is False
    logits = torch.randn(2, 3)
    assert processor.apply(logits, None) is logits

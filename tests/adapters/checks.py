"""What adapters are checked with: they give what PEFT gives, or are refused."""

from __future__ import annotations

import copy

import pytest
import torch

from loraflow import FusedModel
from loraflow.adapters import load_adapter, match_adapter
from loraflow.core.architecture import check_inside_layers, find_decoder_layers
from loraflow.errors import AdapterError
from tests.tiny import peft_model, random_ids, relative_error

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def fused_alone(base, directory):
    return FusedModel.from_adapters(copy.deepcopy(base), {"one": directory}, "one")


def assert_gives_what_peft_gives(base, directory):
    ids = random_ids()
    with torch.no_grad():
        found, expected, plain = (
            fused_alone(base, directory)(ids).logits,
            peft_model(base, directory)(ids).logits,
            base(ids).logits,
        )
    assert relative_error(plain, expected) > 1e-3, "the adapter does nothing: the comparison would prove nothing"
    assert relative_error(found, expected) < 1e-5


def load_and_check(directory, base):
    adapter = load_adapter("one", directory)
    match_adapter(adapter, base)
    check_inside_layers(adapter, find_decoder_layers(base))


def refusal(directory, base=None) -> str:
    """The message with which an adapter is refused, by itself or on a base."""
    with pytest.raises(AdapterError) as caught:
        load_and_check(directory, base)
    assert "'one'" in str(caught.value)
    return str(caught.value)

"""What a picture of a trace gives each token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel, LoraFlow
from loraflow.visual.colours import PALETTE, adapter_colour
from loraflow.visual.tokens import token_texts
from loraflow.visual.trace import Trace
from tests.tiny import byte_tokenizer, random_ids, save_adapter, set_random_gates, tiny_model


def make_trace(seq=6, prompt_length=0, batch=1, layers=2, adapters=("zh", "math"), padding=0, tokens=None):
    """A trace of random weights, padded on the left."""
    mask = torch.ones(batch, seq, dtype=torch.long)
    mask[:, :padding] = 0
    return Trace(
        weights=torch.randn(batch, seq, layers, len(adapters)),
        adapters=adapters,
        tokens=tokens or [[f"t{i}" for i in range(seq)] for _ in range(batch)],
        input_ids=torch.arange(seq).expand(batch, seq),
        attention_mask=mask,
        prompt_length=prompt_length,
    )


@settings(max_examples=50)
@given(seq=st.integers(1, 8), prompt_length=st.integers(0, 8), row=st.integers(0, 1))
def test_a_generated_token_gets_the_weights_that_produced_it(seq, prompt_length, row):
    trace = make_trace(seq, min(prompt_length, seq), batch=2)
    before = trace.weights.clone()
    shown, own = trace.token_weights(row), trace.weights[row].mean(dim=1)
    for position in range(seq):
        generated = trace.prompt_length and position >= trace.prompt_length
        assert torch.equal(shown[position], own[position - 1 if generated else position])
    assert torch.equal(trace.weights, before)


def test_weights_are_averaged_over_the_layers():
    trace = make_trace(layers=3)
    torch.testing.assert_close(trace.token_weights(), sum(trace.weights[0, :, layer] for layer in range(3)) / 3)


def test_notebooks_show_the_picture():
    assert "<span" in make_trace()._repr_html_()


def test_colours_repeat_after_the_last():
    assert len(set(PALETTE)) == len(PALETTE) == 8
    assert [adapter_colour(i) for i in range(10)] == [*PALETTE, *PALETTE[:2]]


@pytest.mark.parametrize("granularity", ["step", "layer", "module"])
def test_adapters_on_some_layers_can_be_traced(tmp_path, granularity):
    base = tiny_model()
    adapter = save_adapter(base, tmp_path, ["q_proj"], layers_to_transform=[1])
    model = FusedModel.from_adapters(base, {"one": adapter}, LoraFlow(granularity))
    set_random_gates(model)
    trace = model.trace(random_ids())
    assert trace.token_weights().shape == (9, 1)
    assert trace.token_weights().isfinite().all()


def test_token_texts_are_those_of_the_whole():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a 中文 é!")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "a 中文 é!"
    # Three bytes each: the character stands at the last of them.
    assert texts[2:8] == ["", "", "中", "", "", "文"]

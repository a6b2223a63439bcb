"""What a training step keeps for its backward: nothing below the first gate that learns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from loraflow import FusedModel, LoraFlow
from tests.tiny import random_adapter, random_ids, set_random_gates, tiny_model

IDS = random_ids()
LAYERS = 4


@dataclass(frozen=True)
class Upper(LoraFlow):
    """Gates in the last two layers only."""

    name = "upper"

    def gate(self, site):
        return super().gate(site) if site.layer >= LAYERS - 2 else None


@dataclass(frozen=True)
class FixedBelow(LoraFlow):
    """Gates that do not learn in the first two layers."""

    name = "fixed-below"


@pytest.fixture
def make_model():
    def make(granularity="layer", method=Upper):
        base = tiny_model(num_hidden_layers=LAYERS)
        adapters = {name: random_adapter(base, name, seed=i) for i, name in enumerate("ab", 1)}
        model = FusedModel.from_adapters(base, adapters, method(granularity=granularity))
        set_random_gates(model)
        for site, gate in model.gates.items():
            gate.requires_grad_(site.split(".")[1] >= str(LAYERS - 2))
        return model.train()

    return make


def gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    learning = [gate for gate in model.gates.values() if next(gate.parameters()).requires_grad]
    return torch.cat([p.grad.flatten() for gate in learning for p in gate.parameters()])


def kept_by_layer(model):
    """What autograd keeps while each layer runs, and how often each has run after the backward."""
    layers, kept, runs = model.attachment.layers.layers, [0] * LAYERS, [0] * LAYERS
    running = [None]

    def enter(index):
        def hook(*_):
            running[0], runs[index] = index, runs[index] + 1

        return hook

    def note(tensor):
        if running[0] is not None:
            kept[running[0]] += 1
        return tensor

    def leave(*_):
        running[0] = None

    handles = [layer.register_forward_pre_hook(enter(i)) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    return kept, runs


@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("method", [Upper, FixedBelow])
def test_below_the_first_gate_that_learns_nothing_is_kept(make_model, granularity, method):
    kept, runs = kept_by_layer(make_model(granularity, method))
    assert kept[:2] == [0, 0]
    assert all(kept[2:])
    assert runs == [1] * LAYERS


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("method", [Upper, FixedBelow])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_does_not_compute_again_what_learns_nothing(make_model, granularity, reentrant, method):
    model = make_model(granularity, method)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    kept, runs = kept_by_layer(model)
    assert runs == [1, 1, 2, 2]
    assert kept[:2] == [0, 0]
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-7)


def test_frozen_weights_get_no_gradients(make_model):
    model = make_model()
    gradients(model)
    learning = {id(p) for gate in model.gates.values() for p in gate.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in learning)

"""The official code's gate files: they give what their formula gives, or the error says what is wrong with them."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel
from loraflow.errors import FusionError
from loraflow.official import load_official, read_gates
from tests.tiny import random_ids, relative_error, save_adapter, tiny_model

WEIGHT, BIAS = "encoder.layers.{}.lora_fusion_gate.weight", "encoder.layers.{}.weight_bias"


def gate_state(layers=3, adapters=2, hidden=32, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(layers):
        state[WEIGHT.format(layer)] = torch.randn(adapters, hidden, generator=generator)
        state[BIAS.format(layer)] = torch.randn(1, adapters, generator=generator)
    return state


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root, base = tmp_path_factory.mktemp("adapters"), tiny_model()
    names = ("language", "task", "third")
    return {name: save_adapter(base, root / name, seed=seed, r=2 + seed) for seed, name in enumerate(names)}


def first(adapters, count):
    return dict(list(adapters.items())[:count])


class OfficialGate(torch.nn.Module):
    """The formula of the official code, by hand."""

    def __init__(self, state, layer, temperature):
        super().__init__()
        self.weight, self.bias = state[WEIGHT.format(layer)].double(), state[BIAS.format(layer)].double()
        self.temperature = temperature

    def forward(self, x):
        logits = x.double() @ self.weight.T / self.temperature
        powers = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
        return powers / powers.sum(dim=-1, keepdim=True) + self.bias[0]


@settings(max_examples=8)
@given(
    count=st.integers(1, 3),
    temperature=st.sampled_from([1.0, 1.1]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@torch.no_grad()
def test_logits_are_the_formulas(adapters, tmp_path_factory, count, temperature, seed, dtype):
    path = tmp_path_factory.mktemp("gate") / "gate.pt"
    state = {key: tensor.to(dtype) for key, tensor in gate_state(adapters=count, seed=seed).items()}
    torch.save(state, path)
    base = tiny_model(dtype=torch.float64)
    model = load_official(path, base, first(adapters, count), temperature=temperature)
    found = model(random_ids()).logits
    layers = range(len(model.attachment.fusions))
    gates = {f"layers.{layer}": OfficialGate(state, layer, temperature) for layer in layers}
    model.attachment.install(model.method, gates)
    assert relative_error(found, model(random_ids()).logits) < 1e-9


@torch.no_grad()
def test_it_is_an_ordinary_fusion(adapters, tmp_path):
    torch.save(gate_state(), tmp_path / "gate.pt")
    tiny_model().save_pretrained(tmp_path / "base")
    model = load_official(tmp_path / "gate.pt", tmp_path / "base", first(adapters, 2), temperature=1.1)
    model.save_pretrained(tmp_path / "fusion", copy_adapters=True)
    again = FusedModel.from_pretrained(tmp_path / "fusion")
    assert again.method.parameters()["temperature"] == 1.1
    assert again.adapter_names == ["language", "task"]
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)


def without(key):
    return lambda state: state.pop(key)


def with_value(key, value):
    return lambda state: state.__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            without(BIAS.format(1)),
            "lacks the tensor 'encoder.layers.1.weight_bias': it has gates for 3 layers, and the",
        ),
        (without(WEIGHT.format(0)), "lacks the tensor 'encoder.layers.0.lora_fusion_gate.weight'"),
        (
            with_value(BIAS.format(7), torch.zeros(1, 2)),
            "has the tensor 'encoder.layers.7.weight_bias': it has gates f",
        ),
        (with_value("encoder.layers.0.ffn.weight", torch.zeros(1)), "'encoder.layers.0.ffn.weight', which is no part"),
        (with_value(7, torch.zeros(1)), "holds '7', which is no part of a gate"),
        (with_value(BIAS.format(0), torch.zeros(2)), "'encoder.layers.0.weight_bias' has the shape (2,), not (1, adap"),
        (with_value(BIAS.format(0), torch.zeros(2, 2)), "has the shape (2, 2), not (1, adapters)"),
        (with_value(WEIGHT.format(2), torch.zeros(32)), "has the shape (32,), not (adapters, hidden)"),
        (with_value(WEIGHT.format(2), torch.zeros(2, 31)), "reads 31 features (tensor 'encoder.layers.2.lora_fusion_"),
        (
            with_value(BIAS.format(2), torch.zeros(1, 3)),
            "weighs 3 adapters (tensor 'encoder.layers.2.weight_bias'), bu",
        ),
        (with_value(BIAS.format(2), torch.full((1, 2), torch.nan)), "weight_bias' is no tensor of finite numbers"),
        (with_value(BIAS.format(2), [[0.0, 1.0]]), "weight_bias' is no tensor of finite numbers"),
    ],
)
def test_what_is_no_such_gate_is_refused(adapters, tmp_path, edit, message):
    state = gate_state()
    edit(state)
    torch.save(state, tmp_path / "gate.pt")
    with pytest.raises(FusionError, match=re.escape(message)):
        load_official(tmp_path / "gate.pt", tiny_model(), first(adapters, 2))


def test_another_number_of_adapters_or_layers_is_refused(adapters, tmp_path):
    torch.save(gate_state(), tmp_path / "gate.pt")
    with pytest.raises(
        FusionError, match=r"weighs 2 adapters .* but 3 are given: language, task, third\. Give as many"
    ):
        load_official(tmp_path / "gate.pt", tiny_model(), adapters)
    with pytest.raises(FusionError, match="it has gates for 3 layers, and the base has 4"):
        load_official(tmp_path / "gate.pt", tiny_model(num_hidden_layers=4), first(adapters, 2))


class Surprise:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [{"encoder": Surprise()}, b"no archive", b""])
def test_nothing_in_a_file_runs(tmp_path, capsys, content):
    path = tmp_path / "gate.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(FusionError, match="cannot be read without running code in it"):
        read_gates(path)
    assert "code ran" not in capsys.readouterr().out


def test_no_file_and_no_state_dict(tmp_path):
    with pytest.raises(FusionError, match=r"There is no file .*gate\.pt"):
        read_gates(tmp_path / "gate.pt")
    for content, kind in ((torch.zeros(2), "Tensor"), ({}, "dict")):
        torch.save(content, tmp_path / "gate.pt")
        with pytest.raises(FusionError, match=f"holds {kind}, and no state dict of gates"):
            read_gates(tmp_path / "gate.pt")

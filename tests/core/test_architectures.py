"""Every architecture: one-hot, constant and zero weights, gradients, cache, padding, granularities, unloading."""

from __future__ import annotations

import copy

import pytest
import torch

from loraflow import FusedModel, LoraFlow, Static
from loraflow.adapters import load_adapter
from loraflow.core.layers import FusedDecoderLayer
from loraflow.core.reference import merged_weight
from tests.tiny import (
    ARCHITECTURES,
    peft_model,
    random_ids,
    relative_error,
    save_adapter,
    set_random_gates,
    tiny_model,
    use_reference,
)

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture
def fusion(architecture, tmp_path):
    """A base, three adapters of different ranks and targets, and their fusion."""
    base = tiny_model(architecture)
    targets = ARCHITECTURES[architecture][1]
    adapters = {
        "all": save_adapter(base, tmp_path / "all", r=4, seed=1),
        "some": save_adapter(base, tmp_path / "some", targets[:2], r=2, use_rslora=True, seed=2),
        "dora": save_adapter(base, tmp_path / "dora", targets[1:], r=3, use_dora=True, seed=3),
    }
    return base, adapters, FusedModel.from_adapters(copy.deepcopy(base), adapters)


@torch.no_grad()
def test_one_hot_weights_give_what_peft_gives(fusion):
    base, adapters, model = fusion
    ids = random_ids()
    for name, directory in adapters.items():
        with model.using(name):
            assert relative_error(model(ids).logits, peft_model(base, directory)(ids).logits) < 1e-5


@torch.no_grad()
def test_constant_weights_give_the_explicitly_merged_model(fusion):
    base, adapters, model = fusion
    weights = {"all": 0.5, "some": -0.7, "dora": 1.3}
    merged = copy.deepcopy(base).double()
    loaded = [load_adapter(name, path) for name, path in adapters.items()]
    for name in {module for adapter in loaded for module in adapter.modules}:
        linear = merged.get_submodule(name)
        transposed = type(linear).__name__ == "Conv1D"
        weight = linear.weight.T if transposed else linear.weight
        new = merged_weight(weight, [adapter.modules.get(name) for adapter in loaded], list(weights.values()))
        linear.weight.copy_(new.T if transposed else new)
    with model.using(Static(weights)):
        assert relative_error(model(random_ids()).logits, merged(random_ids()).logits) < 1e-5


@torch.no_grad()
def test_zero_weights_and_base_are_the_base_bit_for_bit(fusion):
    base, _, model = fusion
    expected = base(random_ids()).logits
    for method in ("base", Static({"all": 0.0})):
        with model.using(method):
            assert torch.equal(model(random_ids()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["step", "layer", "module"])
def test_generation_with_the_cache_is_generation_without(fusion, granularity):
    model = _with_random_gates(fusion[2], granularity)
    ids = random_ids()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(fusion, side):
    model = _with_random_gates(fusion[2], "layer")
    rows = [random_ids(1, length, seed=length)[0] for length in (4, 7, 9)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, span], mask[i, span] = row, 1
    trace = model.trace(ids, mask)
    for i, row in enumerate(rows):
        alone = model.trace(row[None]).weights[0]
        torch.testing.assert_close(trace.weights[i][mask[i].bool()], alone, rtol=1e-4, atol=1e-5)
    if side == "left":
        together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 9:]
        for i, row in enumerate(rows):
            mask_alone = torch.ones(1, len(row))
            expected = model.generate(row[None], attention_mask=mask_alone, max_new_tokens=6, do_sample=False)
            expected = expected[0, len(row) :]
            assert together[i, : len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize("granularity", ["step", "layer", "module"])
def test_gate_gradients_are_those_of_the_slow_reference(fusion, granularity, monkeypatch):
    model = _with_random_gates(fusion[2], granularity)
    fused = _gate_gradients(model)
    use_reference(model, monkeypatch)
    expected = _gate_gradients(model)
    assert fused.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (fused[name] - gradient).abs().max() < 2e-5 * scale, name


def _gate_gradients(model):
    model.zero_grad()
    ids = random_ids()
    model(ids, labels=ids).loss.backward()
    return {f"{site}.{n}": p.grad.clone() for site, gate in model.gates.items() for n, p in gate.named_parameters()}


@torch.no_grad()
def test_unloading_gives_the_untouched_base(fusion):
    base, _, model = fusion
    model(random_ids())
    unloaded = model.unload()
    assert not any(isinstance(module, FusedDecoderLayer) for module in unloaded.modules())
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in unloaded.state_dict().items())
    assert all(p.requires_grad for p in unloaded.parameters())
    assert torch.equal(unloaded(random_ids()).logits, base(random_ids()).logits)


def _with_random_gates(model, granularity):
    model.set_method(LoraFlow(granularity=granularity))
    set_random_gates(model)
    return model

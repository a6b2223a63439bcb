"""Updates that gates add of their own: beside any weights, for the rows of their own method alone, or refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraflow import FusedModel, LoraFlow
from loraflow.errors import ArchitectureError, MethodError
from loraflow.export import export_peft
from loraflow.methods.base import Level, LowRank, Method, Place
from tests.tiny import random_adapter, random_ids, relative_error, tiny_model

NAMES = ("a", "b")


class WeighingAndAdding(nn.Module):
    """Weights by the input's mean, and an update of rank 2 into 3 directions."""

    def __init__(self, features, out_features):
        super().__init__()
        generator = torch.Generator().manual_seed(features + out_features)
        for name, shape in {"down": (2, features), "up": (out_features, 3)}.items():
            self.register_buffer(name, torch.randn(shape, generator=generator) / 8, persistent=False)
        self.core = nn.Parameter(torch.randn(3, 2, generator=generator))

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True).float()
        return torch.cat([mean, 1 - mean], dim=-1)

    def factors(self):
        return LowRank(self.down, self.core, self.up)


@dataclass(frozen=True)
class Adding(Method):
    name: ClassVar[str] = "adding"
    level: ClassVar[Level] = "token"
    place: ClassVar[Place] = "module"
    adds: ClassVar[bool] = True

    def gate(self, site):
        update = next(update for update in next(iter(site.updates.values())) if update is not None)
        return WeighingAndAdding(site.features, len(update.lora_B))


@dataclass(frozen=True)
class NotAdding(Adding):
    name: ClassVar[str] = "not-adding"
    adds: ClassVar[bool] = False


def fused(architecture="llama", dtype=torch.float64):
    base = tiny_model(architecture, dtype)
    adapters = {name: random_adapter(base, name, r=i + 2, seed=i) for i, name in enumerate(NAMES)}
    return FusedModel.from_adapters(base, adapters, Adding())


def explicit(model):
    """The same weights without what the gates add, on a base that has it in its own weights."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, gate in model.gates.items():
            linear = merged.base_model.get_submodule(f"{model.attachment.layers.prefix}.{name.removeprefix('layers.')}")
            update = (gate.up.double() @ gate.core.double() @ gate.down.double()).to(linear.weight)
            linear.weight += update.T if isinstance(linear, Conv1D) else update
    merged.set_method(NotAdding())
    return merged


@torch.no_grad()
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "phi3", "deepseek_v3", "qwen2_moe"])
def test_what_gates_add_is_added_beside_any_weights(architecture, learning):
    model = fused(architecture)
    ids = random_ids()
    expected = explicit(model)(ids).logits
    with torch.set_grad_enabled(learning):
        found = model(ids).logits.detach()
    assert relative_error(found, expected) < 1e-6
    with model.using(NotAdding()):
        assert relative_error(model(ids).logits, found) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "opt", "deepseek_v3"])
def test_rows_of_other_methods_get_nothing_of_it(architecture):
    model = fused(architecture)
    ids = random_ids(4)
    methods = [None, "base", "a", Adding()]
    found = model(ids, methods=methods).logits
    for row, method in enumerate(methods):
        with model.using(method or Adding()):
            assert relative_error(found[row], model(ids).logits[row]) < 1e-6, method


@torch.no_grad()
def test_beams_carry_it_along():
    model = fused()
    ids = random_ids(2)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    found = model.generate(ids, methods=[None, "b"], **options)
    assert torch.equal(found[:1], model.generate(ids[:1], **options)[:, : found.shape[1]])
    with model.using("b"):
        assert torch.equal(found[1:], model.generate(ids[1:], **options)[:, : found.shape[1]])


def test_only_the_core_gets_a_gradient_and_nothing_else_is_kept_of_the_input():
    model = fused(dtype=torch.float32)
    for gate in model.gates.values():
        gate.requires_grad_(True)
    model(random_ids()).logits.square().mean().backward()
    assert all(gate.core.grad is not None and gate.core.grad.any() for gate in model.gates.values())


def test_rows_that_nobody_owns_are_refused_beside_others():
    model = fused()
    for group in model.attachment.groups:
        group.rows = "unknown"
    with pytest.raises(ArchitectureError, match="reads rows of which it cannot be told whose they are"):
        model(random_ids(2), methods=[None, "base"])


def test_a_dynamic_method_that_adds_is_no_adapter(tmp_path):
    with pytest.raises(MethodError, match="weighs every token anew"):
        export_peft(fused(), tmp_path / "out")


def test_gates_without_an_update_add_nothing():
    model = fused()
    model.set_method(LoraFlow("module"))
    assert not model.attachment.contexts[0].own.adds

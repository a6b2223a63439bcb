"""A core between adapters: what it adds, its start, its directions, its gradient, and the one adapter that it is."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers.pytorch_utils import Conv1D

from loraflow import AdapterCore, FusedModel, Static
from loraflow.errors import MethodError
from loraflow.export import export_peft
from loraflow.methods._shared.directions import TOLERANCE, own_directions
from loraflow.visual.terminal import render_trace
from tests.tiny import (
    exact_loss,
    merged_model,
    peft_model,
    random_adapter,
    random_ids,
    relative_error,
    save_adapter,
    set_random_gates,
    tiny_model,
)

NAMES = ("zh", "math", "code")
DOUBLE = torch.float64


def fused(method="zh", architecture="llama", kinds=("plain", "rslora", "plain"), dtype=DOUBLE):
    base = tiny_model(architecture, dtype)
    adapters = [
        random_adapter(base, name, r=i + 1, kind=kind, seed=i)
        for i, (name, kind) in enumerate(zip(NAMES, kinds, strict=True))
    ]
    method = AdapterCore(method) if isinstance(method, str) else method
    return base, adapters, FusedModel.from_adapters(copy.deepcopy(base), {a.name: a for a in adapters}, method)


def set_cores(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in model.gates.values():
            gate.core.copy_(0.3 * torch.randn(gate.core.shape, generator=generator))


def with_cores(base, adapters, model, weights):
    """The base with the weighted adapters merged into it, and what each core adds, by explicit matrices."""
    merged = merged_model(base, adapters, weights)
    with torch.no_grad():
        for name, gate in model.gates.items():
            update = gate.up.double() @ gate.core.double() @ gate.down.double()
            linear = merged.get_submodule(f"{model.attachment.layers.prefix}.{name.removeprefix('layers.')}")
            linear.weight += update.T if isinstance(linear, Conv1D) else update
    return merged


# ---- What it computes ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "deepseek_v3", "qwen2_moe"])
def test_the_fused_pass_is_the_merged_model(architecture):
    base, adapters, model = fused("math", architecture)
    set_cores(model)
    expected = with_cores(base, adapters, model, [0, 1, 0])(random_ids()).logits
    assert relative_error(model(random_ids()).logits, expected) < 1e-6
    assert relative_error(expected, base(random_ids()).logits) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kinds", [("plain",) * 3, ("dora", "lora_bias", "plain")], ids=str)
def test_without_a_core_it_is_its_start_to_the_bit(kinds):
    _, _, model = fused("zh", kinds=kinds, dtype=torch.float32)
    found = model(random_ids()).logits
    with model.using("zh"):
        assert torch.equal(found, model(random_ids()).logits)
    model.set_method(AdapterCore({"zh": 0.3, "code": -1}))
    found = model(random_ids()).logits
    with model.using(Static({"zh": 0.3, "code": -1})):
        assert torch.equal(found, model(random_ids()).logits)


@torch.no_grad()
def test_an_answer_goes_on_from_the_cache_as_without_one():
    _, _, model = fused()
    set_cores(model)
    ids = random_ids(2, 6)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    expected = model(out.sequences).logits[:, ids.shape[1] - 1 : -1]
    # Llama's norm is float32 whatever the model is.
    assert relative_error(torch.stack(out.logits, dim=1), expected) < 1e-6


@torch.no_grad()
def test_each_linear_has_a_core_of_the_ranks_there():
    base = tiny_model()
    some = random_adapter(base, "some", ["q_proj", "v_proj"], r=3, layers=[1])
    rest = random_adapter(base, "rest", ["q_proj", "o_proj"], r=5)
    model = FusedModel.from_adapters(base, {"some": some, "rest": rest}, AdapterCore())
    ranks = {name: tuple(gate.core.shape) for name, gate in model.gates.items()}
    # k and v have 16 outputs.
    assert ranks["layers.1.self_attn.q_proj"] == (8, 8)
    assert ranks["layers.1.self_attn.v_proj"] == (3, 3)
    assert ranks["layers.0.self_attn.q_proj"] == ranks["layers.2.self_attn.o_proj"] == (5, 5)
    assert "layers.0.self_attn.v_proj" not in ranks
    assert model.num_learned_parameters() == sum(rows * columns for rows, columns in ranks.values())


def test_experts_are_refused(tmp_path):
    base = tiny_model("mixtral")
    path = save_adapter(base, tmp_path / "a", ["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(MethodError, match="are matrices of experts, between which there is no one core"):
        FusedModel.from_adapters(base, {"a": path}, AdapterCore())


@pytest.mark.parametrize("start", ["french", {"french": 1.0}])
def test_an_unknown_start_is_refused(start):
    with pytest.raises(MethodError, match="french"):
        fused(AdapterCore(start))


# ---- Directions ----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    features=st.integers(1, 7),
    copies=st.lists(st.integers(0, 8), max_size=3),
    scale=st.floats(-6, 6),
    seed=st.integers(0, 99),
)
def test_directions_are_orthonormal_and_span_the_rows(rows, features, copies, scale, seed):
    matrix = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    matrix[0] *= 10**scale
    matrix = torch.cat([matrix, *(matrix[c % rows][None] * 2 for c in copies), torch.zeros(1, features)])
    directions, kept = own_directions(matrix)
    unit = matrix[:rows] / matrix[:rows].norm(dim=1, keepdim=True)
    assert len(directions) == len(kept) == torch.linalg.matrix_rank(unit)
    assert torch.allclose(directions @ directions.T, torch.eye(len(kept), dtype=DOUBLE), atol=1e-9)
    assert (unit - unit @ directions.T @ directions).norm(dim=1).max() < 10 * TOLERANCE


def test_directions_do_not_depend_on_the_order_of_rows():
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    order = [3, 0, 5, 1, 4, 2]
    directions, kept = own_directions(matrix)
    assert kept == list(range(6))
    assert torch.allclose(own_directions(matrix[order])[0], directions[order], atol=1e-9)


def test_a_direction_is_its_own_rows():
    matrix = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))[0].T
    assert torch.allclose(own_directions(3 * matrix)[0], matrix.double(), atol=1e-6)


def test_untrained_adapters_and_twins_add_no_values():
    base = tiny_model()
    first = random_adapter(base, "first", ["q_proj"], r=3, seed=1)
    untrained = dataclasses.replace(
        random_adapter(base, "untrained", ["q_proj"], r=2, seed=2),
        modules={
            name: dataclasses.replace(module, lora_B=torch.zeros_like(module.lora_B))
            for name, module in random_adapter(base, "untrained", ["q_proj"], r=2, seed=2).modules.items()
        },
    )
    twin = dataclasses.replace(first, name="twin")
    model = FusedModel.from_adapters(base, {"first": first, "twin": twin, "untrained": untrained}, AdapterCore())
    # Three directions are written to, and five are read.
    assert {tuple(gate.core.shape) for gate in model.gates.values()} == {(3, 5)}


def test_a_fusion_of_untrained_adapters_has_nothing_to_learn_and_is_the_base():
    base = tiny_model()
    adapter = random_adapter(base, "untrained", ["q_proj"], r=2)
    zero = {n: dataclasses.replace(m, lora_B=torch.zeros_like(m.lora_B)) for n, m in adapter.modules.items()}
    adapters = {"a": dataclasses.replace(adapter, modules=zero)}
    model = FusedModel.from_adapters(copy.deepcopy(base), adapters, AdapterCore())
    assert torch.equal(model(random_ids()).logits, base(random_ids()).logits)


@torch.no_grad()
def test_a_core_is_in_units_of_fusion_weights_whatever_the_scaling():
    """An adapter whose alpha is a hundred times as large moves as far with the same core as by the same weight."""
    base = tiny_model(dtype=DOUBLE)
    adapter = random_adapter(base, "a", ["q_proj"], r=2)
    large = {name: dataclasses.replace(m, scaling=100 * m.scaling) for name, m in adapter.modules.items()}
    norms = []
    for modules in (adapter.modules, large):
        model = FusedModel.from_adapters(
            copy.deepcopy(base), {"a": dataclasses.replace(adapter, modules=modules)}, AdapterCore("a")
        )
        gate = model.gates["layers.0.self_attn.q_proj"]
        gate.core.fill_(0.5)
        norms.append((gate.up @ gate.core @ gate.down).norm().item())
    assert norms[1] == pytest.approx(100 * norms[0], rel=1e-5)


# ---- Learning ------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_finite_differences():
    _, _, model = fused("zh", "gpt2")
    set_cores(model)
    ids, gate = random_ids(), list(model.gates.values())[-1]
    exact_loss(model, ids).backward()
    assert gate.core.requires_grad
    assert [name for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".core")] == []
    step = 1e-5
    for row, column in [(0, 0), (2, 4), (5, 1)]:
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                gate.core[row, column] += sign * step
                losses.append(exact_loss(model, ids).item())
                gate.core[row, column] -= sign * step
        expected = (losses[0] - losses[1]) / (2 * step)
        assert gate.core.grad[row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_the_gradient_with_checkpointing_is_that_without():
    _, _, model = fused()
    set_cores(model)
    exact_loss(model, random_ids()).backward()
    expected = [gate.core.grad.clone() for gate in model.gates.values()]
    model.zero_grad()
    model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    exact_loss(model, random_ids()).backward()
    for gate, grad in zip(model.gates.values(), expected, strict=True):
        assert torch.allclose(gate.core.grad, grad, rtol=1e-9, atol=1e-12)


def test_training_starts_where_the_loss_is_lowest_of_single_and_of_all_adapters():
    starts = AdapterCore().starts(NAMES)
    assert starts["math"] == [0, 1, 0]
    assert starts["all by 0.333"] == [1 / 3] * 3
    assert starts["all by 0.577"] == pytest.approx([3**-0.5] * 3)
    assert starts["all by 1"] == [1, 1, 1]
    assert AdapterCore("zh").starts(NAMES) == {}
    assert AdapterCore().starts(["zh"]) == {"zh": [1]}
    assert AdapterCore().start_weights(NAMES, "all by 1") == [1, 1, 1]


# ---- The one adapter that it is ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("start", ["zh", "average", "none"])
def test_it_exports_as_one_lora_of_the_ranks_together(tmp_path, start):
    base = tiny_model(dtype=DOUBLE)
    sources = {name: save_adapter(tiny_model(), tmp_path / name, r=i + 2, seed=i) for i, name in enumerate(NAMES)}
    model = FusedModel.from_adapters(copy.deepcopy(base), sources, AdapterCore({} if start == "none" else start))
    set_cores(model)
    report = export_peft(model, tmp_path / "out", dtype=DOUBLE)
    assert report.rank == 2 + 3 + 4
    assert report.compression is None
    assert set(report.adapters) == set(NAMES)
    exported = peft_model(base, str(tmp_path / "out"))
    assert relative_error(exported(random_ids()).logits, model(random_ids()).logits) < 1e-6


@torch.no_grad()
def test_gates_of_a_dora_export_with_their_core(tmp_path):
    base = tiny_model(dtype=DOUBLE)
    sources = {
        "dora": save_adapter(tiny_model(), tmp_path / "dora", use_dora=True),
        "zh": save_adapter(tiny_model(), tmp_path / "zh", seed=2),
    }
    model = FusedModel.from_adapters(copy.deepcopy(base), sources, AdapterCore("dora"))
    set_cores(model)
    export_peft(model, tmp_path / "out", dtype=DOUBLE)
    exported = peft_model(base, str(tmp_path / "out"))
    assert relative_error(exported(random_ids()).logits, model(random_ids()).logits) < 1e-6


@torch.no_grad()
def test_what_is_saved_is_the_same_after_loading(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    sources = {name: save_adapter(tiny_model(), tmp_path / name, r=i + 2, seed=i) for i, name in enumerate(NAMES)}
    model = FusedModel.from_adapters(tmp_path / "base", sources, AdapterCore("math"))
    set_random_gates(model)
    model.save_pretrained(tmp_path / "fusion")
    again = FusedModel.from_pretrained(tmp_path / "fusion")
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    assert {name.rpartition(".")[2] for name in again.state_dict()} == {"core", "start"}


@torch.no_grad()
def test_on_a_base_of_half_precision_the_core_stays_whole():
    _, _, model = fused(dtype=torch.bfloat16)
    gate = next(iter(model.gates.values()))
    assert (gate.core.dtype, gate.down.dtype, gate.up.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    set_cores(model)
    assert model(random_ids()).logits.dtype == torch.bfloat16


# ---- Who reads whom ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_a_core_each_adapter_reads_itself_by_its_weight():
    _, _, model = fused(AdapterCore({"zh": 0.5, "code": -2}))
    trace = model.trace(random_ids())
    assert set(trace.readings) == set(model.gates)
    assert torch.allclose(trace.mean_readings(), torch.diag(torch.tensor([0.5, 0.0, 2.0])), atol=1e-6)


@torch.no_grad()
def test_readings_are_the_blocks_between_the_adapters_stacks():
    _, adapters, model = fused()
    name, ranks = "layers.1.self_attn.q_proj", [1, 2, 3]
    gate = model.gates[name]
    K = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    modules = [adapter.modules["model." + name] for adapter in adapters]
    A = torch.cat([module.lora_A.double() for module in modules])
    B = torch.cat([module.scaling * module.lora_B.double() for module in modules], dim=1)
    # The core for which all that is added is B (diag(w) + K) A.
    gate.core.copy_(torch.linalg.pinv(gate.up.double()) @ B @ K @ A @ torch.linalg.pinv(gate.down.double()))
    gate.start.copy_(torch.tensor([1.0, 0.0, 0.0]))
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=DOUBLE)
    blocks = [rows.split(ranks, dim=1) for rows in (K + torch.diag(weights)).split(ranks)]
    expected = [[block.norm().item() / min(block.shape) ** 0.5 for block in row] for row in blocks]
    assert torch.allclose(model.trace(random_ids()).readings[name], torch.tensor(expected), rtol=1e-4)


@torch.no_grad()
def test_readings_do_not_depend_on_the_order_of_the_adapters():
    base, adapters, model = fused("zh")
    set_cores(model)
    turned = FusedModel.from_adapters(base, {a.name: a for a in reversed(adapters)}, AdapterCore("zh"))
    for name, gate in turned.gates.items():
        other = model.gates[name]
        update = other.up.double() @ other.core.double() @ other.down.double()
        gate.core.copy_(torch.linalg.pinv(gate.up.double()) @ update @ torch.linalg.pinv(gate.down.double()))
    found, expected = (m.trace(random_ids()).readings for m in (turned, model))
    for name in model.gates:
        assert torch.allclose(found[name].flip(0, 1), expected[name], rtol=1e-4, atol=1e-6)


def test_the_terminal_says_who_reads_whom():
    _, _, model = fused()
    console = Console(width=120, file=io.StringIO())
    console.print(render_trace(model.trace(random_ids())))
    text = console.file.getvalue()
    assert "see who reads whom" in text
    assert [line.split() for line in text.splitlines() if line.split()[:1] == ["zh"]][-1] == [
        "zh",
        "1.000",
        "0.000",
        "0.000",
    ]

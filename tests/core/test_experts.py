"""Experts that are one parameter: PEFT's numbers for one adapter, the slow reference for mixtures."""

from __future__ import annotations

import copy
import json
import zlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loraflow import FusedModel, LoraFlow, Static
from loraflow.adapters import load_adapter, match_adapter
from loraflow.core.active import EVERYTHING
from loraflow.core.experts import ExpertStack, FusedExperts
from loraflow.errors import AdapterError, ArchitectureError, LoraflowError, MethodError
from loraflow.export import export_peft
from tests.tiny import peft_model, random_ids, relative_error, save_adapter, set_random_gates, tiny_model

# What PEFT writes for "all-linear" on such a base, and a subset of it.
TARGETS = {
    "qwen2_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "deepseek_v3": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
}
MODULES = {"deepseek_v3": ["kv_b_proj", "o_proj"]}
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
CONSTANT = {"all": 0.6, "down": -0.4}


@pytest.fixture
def base(architecture):
    return tiny_model(architecture)


@pytest.fixture
def adapters(architecture, base, tmp_path):
    modules = MODULES.get(architecture, ["q_proj", "o_proj"])
    return {
        "all": save_adapter(base, tmp_path / "all", modules, target_parameters=TARGETS[architecture], r=3, seed=1),
        "down": save_adapter(
            base, tmp_path / "down", [], target_parameters=TARGETS[architecture][1:2], r=2, use_rslora=True, seed=2
        ),
    }


every = pytest.mark.parametrize("architecture", TARGETS)


@every
@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_adapter_gives_what_peft_gives(base, adapters, implementation):
    base.config._experts_implementation = implementation
    model = FusedModel.from_adapters(copy.deepcopy(base), adapters)
    ids = random_ids(2, 7)
    plain = base(ids).logits
    for name, path in adapters.items():
        expected = peft_model(base, path)(ids).logits
        with model.using(name):
            found = model(ids).logits
        assert (found - expected).abs().max() < 1e-5 * (expected - plain).abs().max()


def merged(base, adapters, weights):
    """The base with W + sum w_i Delta_i at every expert, computed from PEFT's own delta of each adapter."""
    total = copy.deepcopy(base).double()
    parameters = dict(total.named_parameters())
    for name, path in adapters.items():
        whole = peft_model(copy.deepcopy(base).double(), path).merge_and_unload()
        for key, value in whole.named_parameters():
            parameters[key].data += weights[name] * (value - dict(base.named_parameters())[key].double())
    return total


@every
@torch.no_grad()
def test_constant_weights_give_the_explicitly_merged_model(base, adapters):
    expected = merged(base, adapters, CONSTANT)(random_ids()).logits
    model = FusedModel.from_adapters(base.double(), adapters, Static(CONSTANT))
    assert relative_error(model(random_ids()).logits, expected) < 1e-6


def reference_experts(model, monkeypatch):
    """Let each token be computed alone, at each of its experts, with matrices made for its own weights."""

    def forward(self, hidden_states, *args, **kwargs):
        chosen, importance = (*args, *kwargs.values())
        name, stacks, context = self.fused
        prefix = f"{model.attachment.layers.prefix}.{context.index}.{name}"
        output = torch.zeros_like(hidden_states)

        def multiply(parameter, expert, token, x):
            matrix = getattr(self, parameter)[expert]
            matrix = matrix.T if self.is_transposed else matrix
            y = matrix @ x
            if self.has_bias:
                y = y + getattr(self, f"{parameter}_bias")[expert]
            if parameter not in stacks:
                return y
            weights = context.weights_for_routed(
                f"{name}.{parameter}", "tokens", torch.tensor([token]), len(hidden_states), x[None]
            )
            for weight, adapter in zip(weights.flatten(), model.adapters, strict=True):
                update = adapter.modules.get(f"{prefix}.{parameter}")
                if update is not None:
                    one = update.of_expert(int(expert))
                    y = y + weight * one.scaling * (one.lora_B.to(x) @ (one.lora_A.to(x) @ x))
            return y

        for token in range(len(hidden_states)):
            for choice, expert in enumerate(chosen[token]):
                inner = multiply("gate_up_proj", expert, token, hidden_states[token])
                inner = self._apply_gate(inner[None])[0]
                output[token] += importance[token, choice] * multiply("down_proj", expert, token, inner)
        return output

    monkeypatch.setattr(FusedExperts, "forward", forward)


@every
@torch.no_grad()
@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_weights_follow_the_tokens_to_their_experts(base, adapters, granularity, implementation, monkeypatch):
    base.config._experts_implementation = implementation
    model = FusedModel.from_adapters(base.double(), adapters, LoraFlow(granularity=granularity))
    set_random_gates(model)
    ids = random_ids(2, 6)
    found = model(ids).logits
    reference_experts(model, monkeypatch)
    assert relative_error(found, model(ids).logits) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mixtral"])
@pytest.mark.parametrize("name", ["all", "down"])
def test_experts_multiply_the_adapters_that_are_used(base, adapters, name, monkeypatch):
    model = FusedModel.from_adapters(base.double(), adapters)
    ids, cut = random_ids(2, 6), []
    part = ExpertStack.part

    def watched(stack, active):
        cut.append(part(stack, active))
        return cut[-1]

    monkeypatch.setattr(ExpertStack, "part", watched)
    with model.using(name):
        found = model(ids).logits
        ranks = {len(each.owners) for each in cut}
        # Only one of the two adapters has a part in the up projection; slots are whole eights.
        assert ranks == ({8} if name == "all" else {0, 8})
        assert all((each.owners[:2] == list(adapters).index(name)).all() for each in cut if len(each.owners))
        monkeypatch.setattr("loraflow.core.context.use_of", lambda *_, **__: EVERYTHING)
        assert relative_error(found, model(ids).logits) < 1e-12


@every
@torch.no_grad()
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_cache_and_rows_of_their_own_change_nothing(base, adapters, granularity):
    model = FusedModel.from_adapters(base.double(), adapters, LoraFlow(granularity=granularity))
    set_random_gates(model)
    ids = random_ids(4, 6)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=first.past_key_values).logits
    assert relative_error(torch.cat([first.logits, rest], dim=1), whole) < 1e-6
    methods = [None, CONSTANT, "base", "down"]
    together = model(ids, methods=methods).logits
    for row, method in enumerate(methods):
        assert relative_error(together[row], model(ids[row : row + 1], methods=[method]).logits[0]) < 1e-6
    assert relative_error(together[0], whole[0]) < 1e-6


@every
@torch.no_grad()
def test_the_base_is_the_base_and_comes_back(base, adapters):
    ids = random_ids()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    expected = base(ids).logits
    model = FusedModel.from_adapters(base, adapters)
    for method in ("base", Static({"all": 0.0})):
        with model.using(method):
            assert relative_error(model(ids).logits, expected) < 1e-6
    unloaded = model.unload()
    assert torch.equal(unloaded(ids).logits, expected)
    assert all(torch.equal(value, state[name]) for name, value in unloaded.state_dict().items())
    assert not any(isinstance(module, FusedExperts) for module in unloaded.modules())


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
def test_gates_get_the_gradients_of_the_reference(base, adapters, monkeypatch):
    model = FusedModel.from_adapters(base.double(), adapters, LoraFlow())
    set_random_gates(model)
    ids = random_ids(1, 5)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for gate in model.gates.values() for p in gate.parameters()])

    found = gradients()
    reference_experts(model, monkeypatch)
    assert relative_error(found, gradients()) < 1e-7


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
@torch.no_grad()
@pytest.mark.parametrize("method", ["qa-flora", "arrow", "phatgoose", "lorahub"])
def test_other_methods_weigh_experts_too(base, adapters, method):
    model = FusedModel.from_adapters(base, adapters, method)
    ids = random_ids(1, 5)
    if model.method.level == "query":
        assert torch.isfinite(model.weigh(ids)).all()
    assert torch.isfinite(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)).all()
    trace = model.trace(ids)
    assert trace.weights.shape == (1, 5, 3, 2)


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
@torch.no_grad()
def test_logo_looks_at_linears_and_routers_only(base, adapters, tmp_path):
    with pytest.raises(MethodError, match="there is none that all of them target"):
        FusedModel.from_adapters(base, adapters, "logo")
    path = save_adapter(base, tmp_path / "router", [], target_parameters=TARGETS["qwen2_moe"])
    model = FusedModel.from_adapters(base, {"all": adapters["all"], "router": path}, "logo")
    assert model.gates["model"].module == "layers.2.mlp.gate.weight"
    assert model.weigh(random_ids(1, 5)).sum() == pytest.approx(3)


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
@torch.no_grad()
def test_parameters_are_mixed_at_each_expert(base, adapters):
    from loraflow.methods import LoraHub

    base = base.double()
    weights = torch.tensor([0.6, -0.4])
    loaded = [match_adapter(load_adapter(name, path), base) for name, path in adapters.items()]
    expected = copy.deepcopy(base)
    parameters = dict(expected.named_parameters())
    for name in {name for adapter in loaded for name in adapter.modules}:
        parts = [(w, a.modules[name]) for w, a in zip(weights.tolist(), loaded, strict=True) if name in a.modules]
        parameter = parameters.get(name, parameters.get(f"{name}.weight"))
        for expert in range(parts[0][1].experts):
            rank = max(part.rank for _, part in parts)
            A = sum(w * nn.functional.pad(p.of_expert(expert).lora_A, (0, 0, 0, rank - p.rank)) for w, p in parts)
            B = sum(w * p.scaling * nn.functional.pad(p.of_expert(expert).lora_B, (0, rank - p.rank)) for w, p in parts)
            target = parameter.data[expert] if parameter.dim() == 3 else parameter.data
            target += (B @ A).double()
    ids = random_ids(1, 5)
    model = FusedModel.from_adapters(base, adapters, LoraHub(mixes="parameters"))
    for gate in model.gates.values():
        gate.weights.copy_(weights)
    assert relative_error(model(ids).logits, expected(ids).logits) < 1e-6


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
def test_experts_of_another_form_are_refused(base, adapters):
    class Odd(type(base.model.layers[0].mlp.experts)):
        def forward(self, hidden_states, *args, **kwargs):
            return 2 * super().forward(hidden_states, *args, **kwargs)

    base.model.layers[1].mlp.experts.__class__ = Odd
    with pytest.raises(ArchitectureError, match=r"'mlp.experts' of decoder layer 1, Odd, compute something else"):
        FusedModel.from_adapters(base, adapters)
    assert not any(isinstance(module, FusedExperts) for module in base.modules())
    del base.model.layers[1].mlp.experts.has_gate
    with pytest.raises(ArchitectureError, match="are not of transformers' common form"):
        FusedModel.from_adapters(base, adapters)


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
def test_a_weight_that_is_no_linear_map_is_refused(base, tmp_path):
    path = save_adapter(base, tmp_path / "norm", ["q_proj"], target_parameters=["mlp.gate.weight"])
    gate = type(base.model.layers[0].mlp.gate)

    class Unused(gate):
        def forward(self, hidden_states):
            logits = hidden_states @ self.weight.T
            return (logits, *super().forward(hidden_states)[1:])

    base.model.layers[0].mlp.gate.__class__ = Unused
    model = FusedModel.from_adapters(base, {"a": path})
    assert model(random_ids()) is not None
    Unused.forward = lambda self, hidden_states: (hidden_states @ self.weight.T,) * 3
    with pytest.raises(ArchitectureError, match=r"'mlp.gate.weight' of decoder layer 0 is used 0 times"):
        model(random_ids())


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
def test_ranks_and_missing_parameters_are_checked(base, adapters):
    adapter = load_adapter("all", adapters["all"])
    adapter.config.r = 4
    with pytest.raises(AdapterError, match=r"' has lora_A .* says rank 4 for each of [14] experts"):
        match_adapter(adapter, base)
    adapter = load_adapter("down", adapters["down"])
    adapter.config.target_parameters = TARGETS["qwen2_moe"]
    with pytest.raises(AdapterError, match=r"includes 'model.layers.0.mlp.*', but the file has no weights for it"):
        match_adapter(adapter, base)


def save_old_mixtral(base, directory, targets, r=3, silent=()):
    """An adapter as transformers 4 had it: each expert's matrices are linears of their own."""
    sizes = {"q_proj": (32, 32), "w1": (32, 48), "w3": (32, 48), "w2": (48, 32), "gate": (32, 4)}
    tensors = {}
    for layer in range(3):
        for target in targets:
            block = f"base_model.model.model.layers.{layer}.block_sparse_moe."
            modules = [f"{block}experts.{expert}.{target}" for expert in range(4)]
            if target == "q_proj":
                modules = [f"base_model.model.model.layers.{layer}.self_attn.q_proj"]
            if target == "gate":
                modules = [f"{block}gate"]
            for module in modules:
                wide, narrow = sizes[target]
                generator = torch.Generator().manual_seed(zlib.crc32(module.encode()))
                tensors[f"{module}.lora_A.weight"] = torch.randn(r, wide, generator=generator) / wide**0.5
                tensors[f"{module}.lora_B.weight"] = torch.randn(narrow, r, generator=generator)
                if target in silent:
                    tensors[f"{module}.lora_B.weight"].zero_()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 6, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize("architecture", ["mixtral"])
@torch.no_grad()
@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], ["q_proj", "w2"], ["gate", "w1", "w3", "q_proj"]])
def test_keys_of_single_experts_are_read_as_peft_reads_them(base, tmp_path, targets):
    path = save_old_mixtral(base, tmp_path / "old", targets)
    # PEFT loses the weights of one fused parameter where the other has none.
    whole = save_old_mixtral(
        base, tmp_path / "whole", list(dict.fromkeys([*targets, "w2"])), silent={"w2"} - {*targets}
    )
    ids = random_ids(2, 6)
    plain, expected = base(ids).logits, peft_model(base, whole)(ids).logits
    model = FusedModel.from_adapters(base, {"old": path}, "old")
    assert (expected - plain).abs().max() > 0.1
    assert (model(ids).logits - expected).abs().max() < 1e-5 * (expected - plain).abs().max()


@pytest.mark.parametrize("architecture", ["mixtral"])
def test_half_of_what_became_one_parameter_is_refused(base, tmp_path):
    path = save_old_mixtral(base, tmp_path / "old", ["w1", "q_proj"])
    with pytest.raises(AdapterError, match=r"PEFT cannot read it for MixtralForCausalLM.*without also targeting w3"):
        FusedModel.from_adapters(base, {"old": path})


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
def test_an_export_of_bare_parameters_is_refused(base, adapters, tmp_path):
    model = FusedModel.from_adapters(base, adapters, Static(CONSTANT))
    with pytest.raises(LoraflowError, match=r"updates 9 bare parameters, such as 'model.layers.0.mlp"):
        export_peft(model, tmp_path / "exported")


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
@torch.no_grad()
def test_adapters_of_experts_are_exchanged_and_put_in_again(base, adapters, tmp_path):
    model = FusedModel.from_adapters(base, adapters, Static(CONSTANT))
    ids = random_ids()
    expected = model(ids).logits
    with model.exchanged(model.adapters[:1]), model.using("all"):
        assert relative_error(model(ids).logits, expected) > 1e-3
    assert torch.equal(model(ids).logits, expected)
    fused = {adapter.name: adapter for adapter in model.adapters}
    again = FusedModel.from_adapters(model.unload(), fused, Static(CONSTANT))
    assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize("architecture", ["qwen2_moe"])
@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_without_tokens_give_none(base, adapters, implementation):
    base.config._experts_implementation = implementation
    model = FusedModel.from_adapters(base, adapters, Static(CONSTANT))
    experts = model.base_model.model.layers[0].mlp.experts
    experts.fused.context.weights = torch.ones(2)
    none = torch.zeros(0, 2, dtype=torch.long)
    assert experts(torch.zeros(0, 32), none, torch.zeros(0, 2)).shape == (0, 32)

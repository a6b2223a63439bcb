"""Reading a prompt: states and inputs of passes alone, the logit lens, and what a pass costs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loraflow import BaseOptions, FusedModel, QaFlora
from loraflow.core.probe import Prompt
from loraflow.errors import ArchitectureError
from tests.tiny import (
    ARCHITECTURES,
    block_outputs,
    merged_model,
    random_adapter,
    random_ids,
    relative_error,
    tiny_model,
)

KINDS = ("plain", "dora", "lora_bias")


def fuse(architecture="llama", dtype=torch.float64, **changes):
    """A base, its adapters, each of its own kind, rank and targets, and their fusion."""
    base, targets = tiny_model(architecture, dtype, **changes), ARCHITECTURES[architecture][1]
    adapters = [
        random_adapter(base, kind, targets[i % 2 :], r=i + 1, kind=kind, seed=i) for i, kind in enumerate(KINDS)
    ]
    return base, adapters, FusedModel.from_adapters(copy.deepcopy(base), {a.name: a for a in adapters}, "average")


def prompt_of(model, ids=None):
    return Prompt(model.attachment, random_ids(1)[0] if ids is None else ids)


# ---- States --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_pass_is_the_merged_model(architecture):
    base, adapters, model = fuse(architecture)
    seen = []
    prompt = prompt_of(model)

    def measure(of_base, alone):
        seen.append((of_base.clone(), alone.clone()))
        return torch.arange(len(alone)) + 10.0 * len(seen)

    found = prompt.compare(measure, "all")
    assert found.tolist() == [[10 * layer + i for i in range(3)] for layer in (1, 2, 3)]
    ids = prompt.input_ids[None]
    expected = [block_outputs(base, ids)[:, 0]]
    for position in range(3):
        one_hot = [float(i == position) for i in range(3)]
        expected.append(block_outputs(merged_model(base, adapters, one_hot), ids)[:, 0])
    for layer, (of_base, alone) in enumerate(seen):
        assert relative_error(of_base, expected[0][layer]) < 1e-7
        for position in range(3):
            assert relative_error(alone[position], expected[position + 1][layer]) < 1e-7


@torch.no_grad()
def test_the_last_token_is_the_last_of_all():
    _, _, model = fuse()
    seen = {"last": [], "all": []}
    for tokens, states in seen.items():
        prompt_of(model).compare(lambda b, a, states=states: states.append((b, a.clone())) or a[:, 0, 0], tokens)
    for (base, alone), (all_base, all_alone) in zip(seen["last"], seen["all"], strict=True):
        assert torch.equal(base, all_base[-1:])
        assert torch.equal(alone, all_alone[:, -1:])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon"])
def test_layer_output_is_that_of_the_base_and_later_layers_do_not_run(architecture):
    base, _, model = fuse(architecture)
    prompt = prompt_of(model)
    expected = block_outputs(base, prompt.input_ids[None])[:, 0]
    for layer in (0, 1, 2, -1, -3):
        torch.testing.assert_close(prompt.layer_output(layer), expected[layer])
    ran = []
    for index, layer in enumerate(model.attachment.layers.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    prompt.layer_output(1)
    assert ran == [0, 1]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "qwen2_moe"])
def test_module_input_is_what_the_linear_reads_in_the_base(architecture):
    base, _, model = fuse(architecture)
    prompt, prefix = prompt_of(model), model.attachment.layers.prefix
    seen = {}
    for name in model.attachment.sites["module"]:
        linear = base.get_submodule(f"{prefix}.{name.removeprefix('layers.')}")
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].reshape(9, -1)}))
    base(prompt.input_ids[None])
    assert len(seen) >= 3 * len(ARCHITECTURES[architecture][1])
    for name, expected in seen.items():
        torch.testing.assert_close(prompt.module_input(name), expected)


@torch.no_grad()
@pytest.mark.parametrize("method", ["base", "average", {"dora": -2.0}])
def test_what_is_read_does_not_depend_on_the_method_in_use(method):
    base, _, model = fuse()
    expected = block_outputs(base, random_ids(1))[:, 0]
    with model.using(method):
        before = model(random_ids()).logits
        torch.testing.assert_close(prompt_of(model).layer_output(-1), expected[-1])
        assert torch.equal(model(random_ids()).logits, before)


# ---- The lens ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_the_last_layer_the_lens_is_what_the_model_says(architecture, dtype):
    base, _, model = fuse(architecture, dtype)
    found = prompt_of(model).logits(block_outputs(base, random_ids(1))[-1, 0], norm=True)
    assert found.dtype == torch.float64
    assert relative_error(found, base(random_ids(1)).logits[0]) < 30 * torch.finfo(dtype).eps


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_the_lens_scales_logits_as_the_model_does(architecture, changes, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, architecture, ARCHITECTURES["llama"])
    base, _, model = fuse(architecture, **changes)
    found = prompt_of(model).logits(block_outputs(base, random_ids(1))[-1, 0], norm=True)
    assert relative_error(found, base(random_ids(1)).logits[0]) < 1e-9


@torch.no_grad()
def test_without_the_norm_the_lens_is_the_bare_head():
    base, _, model = fuse()
    states = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(prompt_of(model).logits(states, norm=False), states @ base.lm_head.weight.T)


@torch.no_grad()
@pytest.mark.parametrize("head_bias", [False, True])
def test_in_half_precision_the_lens_is_wide(head_bias):
    base, _, model = fuse(dtype=torch.bfloat16)
    if head_bias:
        model.base_model.lm_head.bias = torch.nn.Parameter(torch.randn(64).bfloat16())
    states = torch.randn(5, 32)
    expected = states.double() @ base.lm_head.weight.double().T
    if head_bias:
        expected = expected + model.base_model.lm_head.bias.double()
    assert relative_error(prompt_of(model).logits(states, norm=False), expected) < 1e-6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraflow.core.probe._HEAD_ROWS", 7)
        assert relative_error(prompt_of(model).logits(states, norm=False), expected) < 1e-6


def test_a_final_norm_that_cannot_be_told_is_an_error():
    _, _, model = fuse()
    model.base_model.model.norm = torch.nn.Identity()
    with pytest.raises(
        ArchitectureError, match=r"The final norm of LlamaForCausalLM was not found \(norms beside its layers: none\)"
    ):
        prompt_of(model).logits(torch.randn(1, 32, dtype=torch.float64), norm=True)
    model.base_model.model.norm = torch.nn.LayerNorm(32)
    model.base_model.model.final_too = torch.nn.LayerNorm(32)
    with pytest.raises(ArchitectureError, match=r"\['norm', 'final_too'\]\)\. Set `final_norm` to false"):
        prompt_of(model).logits(torch.randn(1, 32, dtype=torch.float64), norm=True)


# ---- Cost ----------------------------------------------------------------------------------------------------------


def flops(run):
    # The counter knows `addmm`, but not in place.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_each_row_pays_for_its_own_adapter_only(architecture):
    base = tiny_model(architecture)
    ranks, tokens = (1, 2, 8, 16), 9
    adapters = {f"r{r}": random_adapter(base, f"r{r}", r=r, kind="lora_bias", seed=r) for r in ranks}
    blocks = block_flops(base)
    model = FusedModel.from_adapters(base, adapters, "average")
    found = flops(lambda: prompt_of(model).compare(lambda b, a: a[:, -1, 0], "last"))
    # A bias is one more slot.
    own = sum(
        2 * tokens * (r + 1) * sum(m.lora_A.shape[1] + m.lora_B.shape[0] for m in adapters[f"r{r}"].modules.values())
        for r in ranks
    )
    assert found == (len(ranks) + 1) * blocks + own


def block_flops(base):
    """Of one pass over the prompt up to the last layer."""
    layers = next(module for module in base.modules() if isinstance(module, torch.nn.ModuleList))

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    handle = layers[-1].register_forward_hook(stop)

    def run():
        with pytest.raises(StopError):
            base(random_ids(1), attention_mask=torch.ones(1, 9, dtype=torch.long), use_cache=False)

    try:
        return flops(run)
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "away"), [("gpt2", ["transformer.ln_f"]), ("llama", ["model.norm", "lm_head"])]
)
def test_offloaded_norms_and_heads_are_read(tmp_path, architecture, away, dtype):
    base = tiny_model(architecture)
    base.save_pretrained(tmp_path / "base")
    adapters = {name: random_adapter(base, name, seed=seed) for seed, name in enumerate("ab")}
    parts = [name for name, module in base.named_modules() if name.count(".") < 2 and not list(module.children())]
    layers = "transformer.h" if architecture == "gpt2" else "model.layers"
    places = {**dict.fromkeys([*parts, layers], "cpu"), **dict.fromkeys(away, "disk")}
    offload = BaseOptions(dtype=dtype, device_map=places, model_kwargs={"offload_folder": str(tmp_path / "offload")})
    found, expected = (
        FusedModel.from_adapters(tmp_path / "base", adapters, "qa-flora", options=options).weigh(random_ids())
        for options in (offload, BaseOptions(dtype=dtype))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_states_that_are_projected_before_the_head_have_no_logits():
    base = tiny_model("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    adapters = {name: random_adapter(base, name, ["q_proj"], seed=seed) for seed, name in enumerate("ab")}
    model = FusedModel.from_adapters(base, adapters, QaFlora(final_norm=False))
    with pytest.raises(ArchitectureError, match="projects its states from 32 to 16 features before its head"):
        model.weigh(random_ids())
    model.set_method(QaFlora(distance="cosine"))
    assert model.weigh(random_ids()).shape == (2, 3, 2)

"""What linears read: the probe finds it, and weights find the positions that they are for."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from loraflow import FusedModel, LoraFlow, Static
from loraflow.core.architecture import find_decoder_layers
from loraflow.core.rows import probe_rows
from loraflow.errors import ArchitectureError
from tests.tiny import random_adapter, random_ids, relative_error, set_random_gates, tiny_model

CACHED = {"deepseek_v3": "self_attn.kv_b_proj", "doge": "self_attn.dt_proj"}


def found(base):
    return probe_rows(base, find_decoder_layers(base))


def fused(base, granularity="layer", targets=None):
    adapters = {name: random_adapter(base, name, targets, r=r, seed=r) for name, r in (("a", 2), ("b", 3))}
    model = FusedModel.from_adapters(base, adapters, LoraFlow(granularity=granularity))
    set_random_gates(model)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mixtral", "mamba"])
def test_linears_read_the_tokens_of_their_layer(architecture):
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture == "mamba":
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=32, vocab_size=64))
    else:
        base = tiny_model(architecture)
    linears = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    for index, layer in enumerate(found(base)):
        assert (layer.axes, layer.streams) == ((0, 1), False)
        prefix = f"{find_decoder_layers(base).prefix}.{index}."
        inside = [name.removeprefix(prefix) for name in linears if name.startswith(prefix)]
        # Mamba reads the weight of this one itself, as PEFT lets it.
        assert all(layer.of(name) == "tokens" for name in inside if not name.endswith("dt_proj"))


@pytest.mark.parametrize("architecture", CACHED)
def test_what_reads_the_cache_is_known(architecture):
    base = tiny_model(architecture)
    linears = [name for name, module in base.model.layers[0].named_modules() if isinstance(module, nn.Linear)]
    layer = found(base)[0]
    assert {name for name in linears if layer.of(name) == "cached"} == {CACHED[architecture]}
    assert all(layer.of(name) == "tokens" for name in linears if name != CACHED[architecture])


def test_the_cache_is_handed_on_by_the_name_that_the_base_has_for_it():
    base = tiny_model("deepseek_v3")
    own = base.forward
    taken = "cache" if "cache" in inspect.signature(own).parameters else "past_key_values"

    def forward(input_ids, cache=None, use_cache=None):
        return own(input_ids=input_ids, use_cache=use_cache, **{taken: cache})

    base.forward = forward
    assert found(base)[0].of(CACHED["deepseek_v3"]) == "cached"


def test_a_base_is_probed_once_and_left_as_it_was():
    base = tiny_model("deepseek_v3").train()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    assert found(base) is found(base)
    assert base.training
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_layers_of_unlike_kinds_are_each_probed():
    layers = found(tiny_model("deepseek_v3"))
    assert "mlp.up_proj" in layers[0].linears
    assert "mlp.shared_experts.up_proj" not in layers[0].linears
    assert "mlp.shared_experts.up_proj" in layers[1].linears
    assert layers[1] is layers[2]


@torch.no_grad()
@pytest.mark.parametrize("architecture", CACHED)
@pytest.mark.parametrize("granularity", ["step", "layer", "module"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_token_by_token_gives_what_the_whole_gives(architecture, granularity, kind):
    base = tiny_model(architecture, torch.float64)
    model = fused(base, granularity)
    ids = random_ids(2, 9)
    expected = model(ids, use_cache=False).logits
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=base.config, max_cache_len=16)
    steps = [model(part, past_key_values=cache).logits for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:])]
    assert relative_error(torch.cat(steps, dim=1), expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("architecture", CACHED)
def test_what_is_done_to_a_cache_is_done_to_its_weights(architecture):
    model = fused(tiny_model(architecture, torch.float64))
    ids = random_ids(3, 8)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    chosen = torch.cat([ids[[2, 0, 0], :5], random_ids(3, 2, seed=9)], dim=1)
    rest = model(chosen[:, 5:], past_key_values=cache).logits
    assert relative_error(rest, model(chosen, use_cache=False).logits[:, 5:]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("architecture", CACHED)
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}]
)
def test_every_way_of_generating_gives_the_same_with_the_cache(architecture, options):
    model = fused(tiny_model(architecture, torch.float64))
    ids = random_ids(1, 6)
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = {key: value for key, value in options.items() if key == "num_beams"}
    expected = model.generate(ids, **common, **expected, use_cache=False)
    assert torch.equal(model.generate(ids, **common, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("architecture", CACHED)
def test_rows_with_methods_of_their_own_are_the_rows_alone(architecture):
    model = fused(tiny_model(architecture, torch.float64))
    methods = [None, {"a": 0.3, "b": -1.0}, "base"]
    ids = random_ids(3, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=torch.ones_like(ids), methods=methods, **options)
    for row, method in enumerate(methods):
        mask = torch.ones_like(ids[:1])
        alone = model.generate(ids[row : row + 1], attention_mask=mask, methods=[method], **options)
        assert torch.equal(together[row], alone[0])


class Pooled(nn.Module):
    """A linear that reads one row for each prompt, added to all its tokens."""

    def __init__(self, inner, hidden, whole_batch):
        super().__init__()
        self.inner, self.pooled, self.whole_batch = inner, nn.Linear(hidden, hidden, bias=False), whole_batch

    def forward(self, x):
        return self.inner(x) + self.pooled(x.mean(dim=(0, 1) if self.whole_batch else 1, keepdim=True))


def pooling_base(whole_batch=False):
    base = tiny_model("llama", torch.float64)
    for layer in base.model.layers:
        layer.mlp = Pooled(layer.mlp, 32, whole_batch).double()
    return base


@torch.no_grad()
@pytest.mark.parametrize("whole_batch", [False, True])
def test_weights_of_a_whole_prompt_reach_what_reads_no_tokens(whole_batch):
    base = pooling_base(whole_batch)
    assert found(base)[0].of("mlp.pooled") == ("unknown" if whole_batch else "prompts")
    adapters = {name: random_adapter(base, name, ["q_proj", "mlp.pooled"], seed=s) for name, s in (("a", 1), ("b", 2))}
    merged = copy.deepcopy(base)
    for name in adapters["a"].modules:
        linear = merged.get_submodule(name)
        for adapter, weight in (("a", 0.4), ("b", -0.3)):
            update = adapters[adapter].modules[name]
            linear.weight += weight * update.scaling * update.lora_B.double() @ update.lora_A.double()
    model = FusedModel.from_adapters(base, adapters, Static({"a": 0.4, "b": -0.3}))
    ids = random_ids(2, 5)
    assert relative_error(model(ids).logits, merged(ids).logits) < 1e-6
    weights = torch.tensor([[0.4, -0.3], [1.0, 0.0]])
    assert relative_error(model(ids[:1], fusion_weights=weights[:1]).logits, merged(ids[:1]).logits) < 1e-6
    if whole_batch:
        with pytest.raises(ArchitectureError, match=r"cannot be told whose they are.*one at a time"):
            model(ids, fusion_weights=weights)
    else:
        assert relative_error(model(ids, fusion_weights=weights).logits[0], merged(ids[:1]).logits[0]) < 1e-6
        assert model.weigh(ids, method="qa-flora").shape == (2, 3, 2)


def test_weights_of_tokens_are_refused_where_none_are_read():
    base = pooling_base()
    adapters = {"a": random_adapter(base, "a", ["mlp.pooled"])}
    with pytest.raises(ArchitectureError, match=r"'mlp.pooled' of decoder layer 0 of LlamaForCausalLM does not read"):
        FusedModel.from_adapters(base, adapters)
    assert found(base.train(False))
    assert not hasattr(base.model.layers[0], "fusion")
    assert FusedModel.from_adapters(base, adapters, LoraFlow(granularity="module")).method.place == "module"


def test_a_base_that_cannot_be_run_is_refused():
    base = tiny_model("llama")
    base.model.layers[0].mlp = nn.Linear(7, 7)
    with pytest.raises(ArchitectureError, match=r"LlamaForCausalLM could not be run on 9 prompts.*RuntimeError"):
        found(base)


@torch.no_grad()
def test_a_first_token_that_outweighs_all_others_hides_nothing():
    """Real models make something large of the first token, whatever it is."""
    base = tiny_model("llama", torch.bfloat16)
    for index, layer in enumerate(base.model.layers):
        # Each of a kind of its own, so that each is probed.
        layer.own = nn.Sequential(*[nn.Identity()] * index)
        down = layer.mlp.down_proj

        def with_sink(x, own=down.forward):
            out = own(x)
            out[:, 0] += 300 * torch.sign(torch.arange(32) % 3 - 1) if x.shape[1] > 1 else 0
            return out

        down.forward = with_sink
    for layer in found(base):
        assert {name: rows for name, rows in layer.linears.items() if name.endswith("proj") and rows != "tokens"} == {}


@torch.no_grad()
@pytest.mark.parametrize("architecture", CACHED)
def test_positions_keep_what_they_had_when_another_method_goes_on(architecture):
    model = fused(tiny_model(architecture, torch.float64))
    ids = random_ids(2, 6)
    answers = []
    for rest in ("base", Static({"a": 0.0, "b": 0.0})):
        cache = DynamicCache()
        model(ids[:, :5], past_key_values=cache)
        with model.using(rest):
            answers.append(model(ids[:, 5:], past_key_values=cache).logits)
    assert relative_error(answers[0], answers[1]) < 1e-9


def test_layers_that_look_ahead_read_tokens_too():
    base = tiny_model("llama")
    base.config._attn_implementation = "eager"
    for layer in base.model.layers:
        layer.self_attn.is_causal = False
        own = layer.forward
        layer.forward = lambda *args, own=own, **kwargs: own(*args, **{**kwargs, "attention_mask": None})
    assert {rows for layer in found(base) for name, rows in layer.linears.items() if name.endswith("proj")} == {
        "tokens"
    }


def test_wider_states_than_the_models_are_streams():
    base = tiny_model("llama")
    layers = find_decoder_layers(base)
    assert not probe_rows(base, layers)[0].streams
    again = tiny_model("llama")
    assert probe_rows(again, dataclasses.replace(find_decoder_layers(again), hidden_size=8))[0].streams


@torch.no_grad()
def test_a_caches_own_update_comes_back():
    model = fused(tiny_model("deepseek_v3"))
    plain, watched, calls = DynamicCache(), DynamicCache(), []
    own = watched.update

    def update(*args, **kwargs):
        calls.append(args[0].shape[-1])
        return own(*args, **kwargs)

    watched.update = update
    for cache in (plain, watched):
        model(random_ids(1, 3), past_key_values=cache)
    assert "update" not in vars(plain)
    assert watched.update is update
    # A latent of 16 features, and the weights of two adapters.
    assert calls == [18] * 3

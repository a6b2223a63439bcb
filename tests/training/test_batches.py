"""Which examples share a forward: by length, packed without leaks, as many as memory allows; what is learned."""

from __future__ import annotations

import math
import random
import shutil

import psutil
import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from loraflow import FitConfig, FusedModel
from loraflow.errors import ArchitectureError, LoraflowError
from loraflow.training import capacity, fit, search
from loraflow.training.batches import ByLength, Packed, check_packing, in_forwards
from loraflow.training.checkpoints import COMPLETE, complete_checkpoints
from loraflow.training.config import LoraSettings
from loraflow.training.data import TokenExample, TokenExamples
from loraflow.training.learners.finetune import finetune
from loraflow.training.plan import Footprint
from tests.tiny import VOCAB, number_tokenizer, save_adapter, tiny_model
from tests.training.test_fit import reversals

_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
UNPACKABLE = {
    "bloom": ({**_SMALL, "n_layer": 2, "n_head": 4}, "depends on the one packed before it"),
    "lfm2": ({**_LLAMA, "layer_types": ["conv", "full_attention"]}, "depends on the one packed before it"),
    "mamba2": (
        {**_SMALL, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2},
        "depends on the one packed before it",
    ),
    "llama4_text": (
        {**_LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 64},
        "its chunks of attention are counted from the start of a packed row",
    ),
}


def lengths(*counts):
    return TokenExamples([TokenExample([5] * count, [-100] * (count - 1) + [5]) for count in counts], [])


@pytest.fixture
def console(tmp_path):
    return Console(file=(tmp_path / "log.txt").open("w+"), width=300)


@pytest.fixture
def make_model(tmp_path):
    base = tiny_model()
    adapters = {"a": save_adapter(base, tmp_path / "a", seed=1), "b": save_adapter(base, tmp_path / "b", r=2, seed=2)}

    def make(method="lora-flow", architecture="llama"):
        if architecture == "llama":
            return FusedModel.from_adapters(tiny_model(), adapters, method, tokenizer=number_tokenizer())
        other = tiny_model(architecture)
        own = {name: save_adapter(other, tmp_path / architecture / name, seed=ord(name)) for name in "ab"}
        return FusedModel.from_adapters(other, own, method, tokenizer=number_tokenizer())

    return make


def recipe(**settings):
    return FitConfig(**{"epochs": 2, "learning_rate": 1e-2, **settings})


def gates_of(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen2_moe"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_packed_examples_learn_the_same(make_model, console, architecture, accumulation):
    found = []
    for packing in (False, True):
        model = make_model(architecture=architecture)
        config = recipe(packing=packing, gradient_accumulation=accumulation)
        # 11 examples: the last step of an epoch is smaller.
        result = fit(model, reversals(11), dev=reversals(5, seed=1), config=config, console=console)
        found.append((result, gates_of(model)))
    (plain, plain_gates), (packed, packed_gates) = found
    assert [loss for _, loss in packed.log] == pytest.approx([loss for _, loss in plain.log], rel=1e-5)
    assert packed.dev_loss == pytest.approx(plain.dev_loss, rel=1e-5)
    torch.testing.assert_close(packed_gates, plain_gates, rtol=1e-3, atol=1e-5)


def test_packed_rows_are_one_whose_positions_start_again():
    rows = [TokenExample([7, 8, 9], [-100, 8, 9]), TokenExample([5, 6], [5, 6])]
    batch = Packed()(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    # The first token of a row is no row's to predict.
    assert batch["labels"].tolist() == [[-100, 8, 9, -100, 6]]
    assert batch["use_cache"] is False
    assert "attention_mask" not in batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2", "mixtral", "deepseek_v3"])
def test_bases_whose_packed_rows_are_as_if_alone(architecture, attention):
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    model.train()
    check_packing(model)
    assert model.training
    check_packing(tiny_model(architecture, dtype=torch.bfloat16))


@pytest.mark.parametrize("architecture", UNPACKABLE)
def test_bases_that_cannot_be_packed_are_refused(architecture):
    settings, message = UNPACKABLE[architecture]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    with pytest.raises(ArchitectureError, match=rf"`packing` is not for {architecture}.*{message}.*Leave packing out"):
        check_packing(model)


def test_a_base_that_takes_other_positions_for_packed_rows_is_refused(monkeypatch):
    model = tiny_model("gpt2")
    # The learned positions of a base that counts from elsewhere where it counts itself.
    monkeypatch.setattr(
        model.transformer.wpe, "forward", lambda ids: model.transformer.wpe.weight[ids + int((ids.diff() < 0).any())]
    )
    with pytest.raises(ArchitectureError, match=r"other logits than the same ones alone \(relative difference"):
        check_packing(model)


def test_a_base_without_positions_is_refused(monkeypatch):
    model = tiny_model()
    own = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, use_cache=None: own(input_ids, use_cache=use_cache))
    with pytest.raises(ArchitectureError, match="its forward does not take positions"):
        check_packing(model)


def test_a_fit_is_refused_before_anything_is_done(make_model, console, tmp_path):
    with pytest.raises(ArchitectureError, match="`packing` is not for opt"):
        fit(make_model(architecture="opt"), reversals(4), config=recipe(packing=True), console=console)
    settings = {"config": recipe(packing=True), "tokenizer": number_tokenizer(), "console": console}
    with pytest.raises(ArchitectureError, match="`packing` is not for opt"):
        finetune(tiny_model("opt"), reversals(4), tmp_path / "tuned", **settings)
    assert not (tmp_path / "tuned").exists()


def test_fine_tuning_learns_the_same_from_packed_examples(console, tmp_path):
    def tune(name, count=10, **settings):
        return finetune(
            tiny_model(),
            reversals(count),
            tmp_path / name,
            lora=LoraSettings(r=4, alpha=8, dropout=0.0),
            config=recipe(**settings),
            tokenizer=number_tokenizer(),
            console=console,
        )

    plain = [loss for _, loss in tune("plain").log]
    for settings in ({"packing": True}, {"packing": True, "batch_size": "auto"}):
        assert [loss for _, loss in tune("other", **settings).log] == pytest.approx(plain, rel=1e-4)
    in_order = [tune("sorted", count=40, epochs=1, group_by_length=on).log for on in (True, False)]
    assert in_order[0] != in_order[1]


def test_experts_and_searches_take_the_same_batches(make_model, console):
    own = {"a": reversals(6), "b": reversals(6, seed=1)}
    found = [
        fit(make_model("phatgoose"), own, config=recipe(packing=packing), console=console).train_loss
        for packing in (False, True)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    settings = {"dev": reversals(4, seed=1), "grid": [{"batch_size": 2}, {"batch_size": 4}], "console": console}
    plain = search(make_model(), reversals(8), config=recipe(), **settings).search
    packed = search(make_model(), reversals(8), config=recipe(packing=True, batch_size="auto"), **settings).search
    assert [row["dev_loss"] for row in packed] == pytest.approx([row["dev_loss"] for row in plain], rel=1e-4)


def test_examples_of_a_step_are_of_similar_length():
    counts = [random.Random(seed).randint(2, 60) for seed in range(96)]
    order = ByLength(lengths(*counts), 4, seed=3)
    first, again = list(order), list(order)
    assert first == again
    assert sorted(first) == list(range(96))
    order.set_epoch(1)
    assert list(order) != first
    assert list(ByLength(lengths(*counts), 4, seed=4)) != first

    def padding(indices):
        batches = [[counts[index] for index in indices[start : start + 4]] for start in range(0, 96, 4)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(first) < padding(list(range(96))) / 3


def test_by_length_resumes_to_the_uninterrupted_result(make_model, tmp_path, console):
    config = recipe(epochs=3, group_by_length=True, checkpoint_steps=4, packing=True)
    examples = reversals(40)
    whole, resumed = make_model(), make_model()
    expected = fit(whole, examples, config=config, checkpoints=tmp_path / "whole", console=console)
    shutil.copytree(tmp_path / "whole", tmp_path / "interrupted")
    # The last epoch is begun, and not at its start.
    (complete_checkpoints(tmp_path / "interrupted")[-1] / COMPLETE).unlink()
    result = fit(resumed, examples, config=config, checkpoints=tmp_path / "interrupted", resume=True, console=console)
    assert result.log == expected.log
    assert torch.equal(gates_of(resumed), gates_of(whole))
    random_order = fit(make_model(), examples, config=recipe(epochs=3), console=console)
    assert [loss for _, loss in random_order.log] != pytest.approx([loss for _, loss in result.log], rel=1e-3)


@pytest.fixture
def free(monkeypatch):
    """Says how many bytes are free beside the model."""

    def say(count):
        monkeypatch.setattr(capacity, "free_bytes", lambda device: count)

    return say


def test_auto_takes_the_largest_forward_that_fits_and_learns_the_same(make_model, console, free, monkeypatch, tmp_path):
    examples = reversals(11)
    plain = fit(make_model(), examples, config=recipe(batch_size=8), console=console)
    monkeypatch.setattr(Footprint, "peak", lambda self, shape: shape.rows)
    for room, forwards in ((9, 1), (5, 2), (3, 4), (1.2, 8)):
        free(room)
        directory = tmp_path / f"run-{forwards}"
        model = make_model()
        config = recipe(batch_size=8, gradient_accumulation="auto")
        result = fit(model, examples, config=config, checkpoints=directory, console=console)
        assert f'"forwards of a step": {forwards}' in (directory / "run.json").read_text()
        assert [loss for _, loss in result.log] == pytest.approx([loss for _, loss in plain.log], rel=1e-4)
    free(0.5)
    with pytest.raises(LoraflowError, match=r"A step of one example of \d+ tokens takes .* Say `gradient_check"):
        fit(make_model(), examples, config=recipe(batch_size="auto"), console=console)


def test_a_resumed_run_keeps_the_forwards_it_began_with(make_model, console, free, monkeypatch, tmp_path):
    config = recipe(gradient_accumulation="auto", checkpoint_steps=2)
    monkeypatch.setattr(Footprint, "peak", lambda self, shape: shape.rows)
    free(2.5)
    whole, resumed = make_model(), make_model()
    fit(whole, reversals(12), config=config, checkpoints=tmp_path / "run", console=console)
    (complete_checkpoints(tmp_path / "run")[-1] / COMPLETE).unlink()
    free(100)
    fit(resumed, reversals(12), config=config, checkpoints=tmp_path / "run", resume=True, console=console)
    assert torch.equal(gates_of(resumed), gates_of(whole))


def test_lorahub_takes_as_many_examples_at_once_as_fit(make_model, console, free, monkeypatch):
    pytest.importorskip("nevergrad")
    from loraflow.methods import LoraHub
    from loraflow.training.learners import search as learner

    sizes = []
    own = learner.mean_loss

    def noted(fusion, data, size, *others):
        sizes.append(size)
        return own(fusion, data, size, *others)

    monkeypatch.setattr(learner, "mean_loss", noted)
    monkeypatch.setattr(Footprint, "peak", lambda self, shape: shape.rows)
    free(2.5)
    model = make_model(LoraHub(budget=2))
    fit(model, reversals(6), config=recipe(batch_size="auto"), console=console)
    assert set(sizes) == {2}
    assert model.training_record["recipe"]["gradient_accumulation"] == "auto"


def test_what_runs_out_of_memory_is_tried_with_less(make_model, monkeypatch):
    model, tried = make_model(), []
    data = lengths(3, 4, 5, 6, 7, 8)
    own = type(model).forward

    def forward(self, *args, **kwargs):
        tried.append(tuple(kwargs["input_ids"].shape))
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    state = torch.get_rng_state()
    assert capacity.tried(model, data, recipe(batch_size=6), [6, 3, 2, 1]) == 2
    # The longest examples are tried.
    assert tried == [(6, 8), (3, 8), (2, 8)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(LoraflowError, match="A step of one example of 8 tokens does not fit into the memory of cpu"):
        capacity.tried(model, data, recipe(batch_size=6), [6])
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        capacity.tried(model, data, recipe(batch_size=6), [6])


def test_memory_is_counted_within_the_limits_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(capacity, "_CGROUP", tmp_path)
    machine = capacity.free_bytes(torch.device("cpu"))
    assert 0 < machine <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert capacity.free_bytes(torch.device("cpu")) > 10_000
    (tmp_path / "memory.max").write_text("10000\n")
    assert capacity.free_bytes(torch.device("cpu")) == 7500


def test_the_forwards_of_an_epoch():
    data = lengths(9, 2, 8, 3, 7)
    assert in_forwards(data, 2, by_length=True) == [[2, 3], [7, 8], [9]]
    found = in_forwards(data, 2, by_length=False)
    assert sorted(length for forward in found for length in forward) == [2, 3, 7, 8, 9]
    assert len(found) == math.ceil(5 / 2)


def test_the_order_is_an_argument_of_transformers_too(tmp_path):
    for on in (False, True):
        arguments = FitConfig(group_by_length=on).training_arguments(tmp_path)
        assert arguments.train_sampling_strategy == ("group_by_length" if on else "random")
        assert FitConfig.from_training_arguments(arguments).group_by_length is on


def test_auto_in_recipes():
    config = FitConfig(batch_size="auto")
    assert (config.batch_size, config.gradient_accumulation) == (FitConfig.batch_size, "auto")
    assert FitConfig(batch_size=7, gradient_accumulation="auto").batch_size == 7
    assert FitConfig(batch_size=6, gradient_accumulation=3).forward_size == 2
    with pytest.raises(LoraflowError, match=r"`gradient_accumulation` \(='auto'\) is found when a model is fitted"):
        _ = config.forward_size
    for settings, message in [
        ({"batch_size": "most"}, r"`batch_size` \(='most'\) must be a number, or 'auto'"),
        ({"gradient_accumulation": "most"}, r"`gradient_accumulation` \(='most'\) must be a number, or 'auto'"),
        (
            {"batch_size": "auto", "gradient_accumulation": 2},
            r"`batch_size` \(='auto'\) finds how many .* `gradient_accumulation` \(=2\) says it",
        ),
    ]:
        with pytest.raises(LoraflowError, match=message):
            FitConfig(**settings)

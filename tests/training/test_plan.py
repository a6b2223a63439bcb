"""The plan of a fit: what a step takes of memory, against what it does take, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from loraflow import FitConfig, FusedModel, LoraFlow
from loraflow.adapters import load_adapter
from loraflow.core.architecture import find_decoder_layers
from loraflow.core.attach import attach
from loraflow.errors import LoraflowError
from loraflow.training import capacity, fit
from loraflow.training.data import TokenExample, TokenExamples
from loraflow.training.plan import Head, Plan, Shape, footprint, footprints_of_empty, largest_forward
from loraflow.training.trainer import as_it_was
from tests.tiny import number_tokenizer, save_adapter, tiny_model
from tests.training.test_fit import reversals

ROOT = Path(__file__).parents[2]
SHAPE = Shape(4, 48, 96)


@pytest.fixture
def make_model(tmp_path):
    def make(architecture="llama", **changes):
        base = tiny_model(architecture, **changes)
        adapters = {name: save_adapter(base, tmp_path / architecture / name, seed=ord(name)) for name in "ab"}
        return FusedModel.from_adapters(base, adapters, "lora-flow", tokenizer=number_tokenizer())

    return make


CASES = ["llama", "llama checkpointing", "llama packed", "gemma2", "gpt2", "qwen2_moe"]
# Steps in a process of its own, whose peak the kernel knows; and what was planned.
_MEASURED = """
import json, sys
import torch
from tests.tiny import number_tokenizer, save_adapter, tiny_model
from loraflow import FusedModel
from loraflow.training.plan import Shape, footprint

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def step(model, rows, width, packed):
    ids = torch.randint(3, 4000, (rows, width))
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    beside = {"position_ids": torch.arange(width)[None] % (width // 2)} if packed else {"attention_mask": mask}
    model(input_ids=ids, labels=ids, use_cache=False, **beside).loss.backward()

def measure(case):
    architecture, _, how = case.partition(" ")
    llama = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "max_position_embeddings": 512}
    gpt2 = {"n_embd": 128, "n_layer": 3, "n_positions": 512}
    base = tiny_model(architecture, vocab_size=4096, **(gpt2 if architecture == "gpt2" else llama))
    adapters = {name: save_adapter(base, f"{sys.argv[1]}/{case}/{name}", r=8) for name in "ab"}
    model = FusedModel.from_adapters(base, adapters, "lora-flow", tokenizer=number_tokenizer())
    planned = footprint(model, checkpointing=how == "checkpointing", packed=how == "packed")
    model.train()
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    step(model, 1, 16, how == "packed")
    shape = Shape(1, 800, 800) if how == "packed" else Shape(4, 256, 1024)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    step(model, shape.rows, shape.width, how == "packed")
    return planned.peak(shape), status("VmHWM") - before

print(json.dumps({case: measure(case) for case in sys.argv[2:]}))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """For each case, the bytes above the weights that were planned, and those that were measured."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the kernel does not tell the peak of a step")
    # Memory of tensors goes back to the kernel at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MEASURED, str(tmp_path_factory.mktemp("measured")), *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_is_planned(measured, case):
    planned, taken = measured[case]
    assert taken > 30 * 2**20
    assert planned == pytest.approx(taken, rel=0.2)


def test_planning_leaves_no_trace(make_model):
    model = make_model()
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    footprint(model, checkpointing=True, timed=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not model.training
    assert not model.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_base_without_weights_is_planned_by_its_last_layers(make_model, tmp_path, architecture):
    layers = {"n_layer": 6} if architecture == "gpt2" else {"num_hidden_layers": 6}
    loaded = make_model(architecture, **layers)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(loaded.config)
    adapters = [load_adapter(name, str(tmp_path / architecture / name)) for name in "ab"]
    attachment = attach(empty, find_decoder_layers(empty), adapters)
    method = LoraFlow(start="average")
    attachment.install(method, attachment.make_gates(method))
    for checkpointing, found in zip((False, True), footprints_of_empty(empty, attachment.layers), strict=True):
        expected = footprint(loaded, checkpointing=checkpointing)
        assert found.learned == expected.learned
        assert found.peak(SHAPE) == pytest.approx(expected.peak(SHAPE), rel=0.1)
        assert found.operations.at(4, 48) == pytest.approx(expected.operations.at(4, 48), rel=0.1)


def test_what_a_fit_takes_is_said_before_it_begins(make_model, tmp_path, monkeypatch):
    console = Console(file=(tmp_path / "log.txt").open("w+"), width=80)
    # Sizes that leave room with gradient checkpointing only.
    model = make_model()
    plain, frugal = (footprint(model, checkpointing=on) for on in (False, True))
    examples = [{"prompt": "5 6 7 " * 20, "completion": "8 9"}] * 8
    shape = Shape(4, 63, 12)
    assert frugal.peak(shape) < plain.peak(shape)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: int(frugal.peak(shape)) + 1)
    fit(model, examples, config=FitConfig(epochs=2), console=console)
    fit(make_model(), reversals(8), config=FitConfig(epochs=1, gradient_accumulation=2), console=console)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 5)
    fit(make_model(), reversals(8), config=FitConfig(epochs=1, gradient_checkpointing=True), console=console)
    console.file.seek(0)
    first, steps, advice, *others = console.file.read().splitlines()
    assert first.startswith("a step of at most 4 x 63 tokens takes ")
    assert all(part in first for part in ("weights", "learned and optimizer", "activations", "logits", "are free"))
    assert steps.startswith("4 steps of about ")
    assert advice.startswith("that is more than there is: with gradient checkpointing it takes ")
    assert any(line.startswith("a step in 2 forwards of at most 2 x ") for line in others)
    assert any("fewer examples in a forward (`gradient_accumulation`) take less" in line for line in others)


def test_what_cannot_be_planned_is_fitted_all_the_same(make_model, tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(type(model.base_model), "get_decoder", lambda self: nn.Identity())
    with pytest.raises(LoraflowError, match="What a step takes cannot be planned: TypeError: "):
        footprint(model)
    console = Console(file=(tmp_path / "log.txt").open("w+"), width=80)
    assert fit(model, reversals(4), config=FitConfig(epochs=1), console=console).steps == 1
    console.file.seek(0)
    assert console.file.readline().startswith("What a step takes cannot be planned: TypeError")


def test_fine_tuning_is_planned_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    from loraflow.prompts import PromptFormat
    from loraflow.training.learners.finetune import TrainedAdapter

    base = tiny_model()
    with as_it_was(base):
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        model = TrainedAdapter(adapted, number_tokenizer(), PromptFormat())
        found = footprint(model)
        learned = sum(parameter.numel() for parameter in model.learned().values())
        assert found.learned == 4 * 4 * learned
        assert found.weights >= sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def test_the_largest_forward_and_the_time_of_all():
    rows = [TokenExample([5] * count, [-100] * (count - 2) + [5] * 2) for count in (4, 9, 7, 5)]
    data = TokenExamples(rows, [])
    assert largest_forward(data, 2, packed=False) == Shape(2, 9, 4)
    assert largest_forward(data, 3, packed=True) == Shape(1, 21, 6)
    whole = Head(words=100, width=8, capped=False, wide=True, cut=False)
    assert whole.cost(Shape(2, 9, 4)) == (12 * 18 * 100, 4 * 18 * 100 * 8)
    assert dataclasses.replace(whole, capped=True).cost(Shape(2, 9, 4))[0] == 16 * 18 * 100
    # A head that reads the answers only has their states and gradients too, and logits of a chunk at a time.
    cut = dataclasses.replace(whole, cut=True)
    assert cut.cost(Shape(2, 9, 4)) == (8 * 4 * 100 + 8 * 4 * 8, 4 * 4 * 100 * 8)
    assert dataclasses.replace(cut, wide=False, capped=True).cost(Shape(2, 9, 4))[0] == 24 * 4 * 100 + 8 * 4 * 8
    many = dataclasses.replace(cut, words=2**22)
    assert many.cost(Shape(2, 900, 1000))[0] == 8 * 4 * 2**22 + 8 * 1000 * 8


def test_steps_and_their_time_are_those_of_the_recipe(make_model):
    taken = footprint(make_model(), timed=True)
    data = TokenExamples([TokenExample([5] * 9, [-100] * 8 + [5])] * 10, [])

    def plan(**settings):
        return Plan.make(taken, data, FitConfig(**settings), 10**9)

    assert (plan(epochs=2).steps, plan(max_steps=7).steps) == (6, 7)
    assert plan(epochs=4).seconds == pytest.approx(2 * plan(epochs=2).seconds)
    assert plan(gradient_accumulation=4).forwards == 4
    assert plan().fits
    assert not Plan.make(taken, data, FitConfig(), 10).fits

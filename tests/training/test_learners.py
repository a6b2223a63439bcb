"""Learning without gradient descent on the task: LoRA-Hub's search, and each adapter's own data."""

from __future__ import annotations

import builtins
import json
from dataclasses import dataclass

import pytest
import torch

from loraflow import Centroid, FitConfig, FusedModel, LearnedStatic, LoraFlow, LoraHub, Phatgoose, QaFlora
from loraflow.errors import DataError, LoraflowError, MethodError
from loraflow.methods.learned_static import LearnedWeights
from loraflow.methods.static import ConstantGate
from loraflow.training import fit, mean_loss, search, search_grid
from loraflow.training.config import Run
from loraflow.training.data import prepare
from loraflow.training.learners.gradient import fit_gates
from loraflow.training.trainer import make_trainer
from tests.tiny import tiny_model
from tests.training.test_fit import QUICK, adapters, console, make_model, reversals

__all__ = ["adapters", "console", "make_model"]

OWN = {"a": reversals(6, seed=1), "b": reversals(9, seed=2)}


def loss_with(model, weights):
    with model.using(dict(zip(model.adapter_names, weights, strict=True))):
        return mean_loss(model, prepare(model, reversals(12), None, QUICK).train, 4)


# ---- Recipes -------------------------------------------------------------------------------------------------------


def test_the_recipe_is_the_methods_own_unless_said_otherwise(make_model):
    assert FitConfig.for_method(LoraFlow()) == FitConfig()
    assert FitConfig.for_method(Phatgoose(), seed=3) == FitConfig(
        learning_rate=5e-3, weight_decay=0.0, max_steps=100, seed=3
    )
    assert FitConfig.for_method(LearnedStatic(), learning_rate=0.5).learning_rate == 0.5
    model = make_model(LearnedStatic())
    model.fit(reversals(4))
    assert model.training_record["recipe"]["learning_rate"] == 1e-2


def test_max_steps_ends_a_fit(make_model):
    assert make_model().fit(reversals(40), config=FitConfig(max_steps=3)).steps == 3


@pytest.mark.parametrize("granularity", ["task", "layer", "module"])
def test_learned_static_learns_constants(make_model, granularity):
    model = make_model(LearnedStatic(granularity=granularity))
    result = model.fit(reversals(16))
    assert list(result.start.values()) != next(iter(model.gates.values())).weights.tolist()
    weights = model.trace(torch.tensor([[5, 6, 7], [9, 8, 4]])).weights
    assert torch.equal(weights[0, 0].expand_as(weights), weights)


# ---- LoRA-Hub ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixes", ["parameters", "outputs"])
def test_the_search_finds_weights_within_its_bounds_that_beat_zero(make_model, console, mixes):
    model = make_model(LoraHub(mixes=mixes, budget=20, bound=0.7, regularization=0.0))
    result = fit(model, reversals(12), console=console)
    weights = model.gates["model"].weights
    assert weights.abs().max() <= 0.7
    assert result.steps == len(result.log) == 20
    with model.using("base"):
        base = mean_loss(model, prepare(model, reversals(12), None, QUICK).train, 4)
    assert result.train_loss <= base
    assert result.train_loss == pytest.approx(min(loss for _, loss in result.log), abs=0.05)


def test_the_objective_is_the_loss_and_the_mean_absolute_weight(make_model, console, tmp_path):
    free, tight = (make_model(LoraHub(mixes="outputs", budget=25, regularization=factor)) for factor in (0.0, 1000.0))
    for model in (free, tight):
        fit(model, reversals(12), console=console)
    assert tight.gates["model"].weights.abs().sum() < 1e-3 < free.gates["model"].weights.abs().sum()


def test_what_the_search_is_told_and_where_it_may_look(make_model, console, monkeypatch):
    import nevergrad

    told, made = [], []

    class Recorded:
        def __init__(self, parametrization, budget):
            made.append((parametrization, budget))
            self._inner = nevergrad.optimizers.OnePlusOne(parametrization=parametrization, budget=budget)

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def tell(self, candidate, loss):
            told.append((candidate.value.copy(), loss))
            self._inner.tell(candidate, loss)

    monkeypatch.setattr(nevergrad.optimizers, "NGOpt", Recorded)
    model = make_model(LoraHub(mixes="outputs"))
    fit(model, reversals(12), console=console)
    # The published settings: init 0, bounds of 1.5, 40 evaluations, 0.05 times the mean absolute weight.
    ((space, budget),) = made
    assert (budget, space.value.tolist(), len(told)) == (40, [0.0, 0.0], 40)
    assert [float(bound.flat[0]) for bound in space.bounds] == [-1.5, 1.5]
    for weights, loss in told[:8]:
        assert loss == pytest.approx(loss_with(model, weights.tolist()) + 0.05 * abs(weights).mean(), abs=1e-5)


def test_the_published_recipe_reaches_the_optimiser(make_model, console, tmp_path):
    model = make_model()
    data = prepare(model, reversals(8), None, FitConfig())
    made = make_trainer(model, data, Run(FitConfig(), tmp_path, False, console), "fitting").args
    assert (made.num_train_epochs, made.learning_rate, made.per_device_train_batch_size) == (5, 1e-3, 4)
    assert (made.adam_beta1, made.adam_beta2, made.adam_epsilon, made.weight_decay) == (0.9, 0.95, 1e-5, 0.1)
    assert (made.max_grad_norm, made.lr_scheduler_type, made.warmup_steps) == (1.0, "cosine", 0.2)


def test_evaluated_losses_are_those_of_the_weights(make_model, console, tmp_path):
    model = make_model(LoraHub(mixes="outputs", budget=5))
    fit(model, reversals(12), console=console, checkpoints=tmp_path / "run")
    lines = (tmp_path / "run" / "search.jsonl").read_text().splitlines()[1:]
    for entry in map(json.loads, lines):
        assert entry["loss"] == pytest.approx(loss_with(model, entry["weights"]), abs=1e-5)


def test_a_seed_gives_the_same_search_and_an_interrupted_one_goes_on(make_model, console, tmp_path, monkeypatch):
    def searched(directory, resume=False, seed=1):
        model = make_model(LoraHub(budget=12))
        result = fit(
            model, reversals(12), config=FitConfig(seed=seed), checkpoints=directory, resume=resume, console=console
        )
        return model.gates["model"].weights.tolist(), result.log

    whole = searched(tmp_path / "whole")
    again = searched(tmp_path / "again")
    assert whole == again
    path = tmp_path / "again" / "search.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    # As a crash leaves it: half of the last line.
    path.write_text("".join(lines[:7]) + lines[7][:9])
    calls = []
    monkeypatch.setattr(
        "loraflow.training.learners.search.mean_loss", lambda *args: calls.append(1) or mean_loss(*args)
    )
    assert searched(tmp_path / "again", resume=True) == whole
    # Six were known; six, and the loss of the result, were not.
    assert len(calls) == 7


def test_another_search_is_not_gone_on_with(make_model, console, tmp_path):
    model = make_model(LoraHub(budget=3))
    fit(model, reversals(12), console=console, checkpoints=tmp_path)
    with pytest.raises(LoraflowError, match="its search had another `data`"):
        fit(model, reversals(13), console=console, checkpoints=tmp_path, resume=True)


def test_a_search_reports_the_loss_on_dev(make_model, console):
    model = make_model(LoraHub(budget=3))
    result = fit(model, reversals(6), dev=reversals(4, seed=5), score=lambda *_: 0.25, console=console)
    assert result.dev_loss == pytest.approx(
        mean_loss(model, prepare(model, reversals(4, seed=5), None, QUICK).train, 4)
    )
    assert result.dev_score == 0.25


def test_nevergrad_may_be_missing(make_model, console, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *rest: _missing() if name == "nevergrad" else real(name, *rest)
    )
    with pytest.raises(LoraflowError, match=r"pip install 'loraflow\[search\]'"):
        fit(make_model(LoraHub()), reversals(4), console=console)


def _missing():
    raise ImportError("no such package")


# ---- Each adapter's own data ---------------------------------------------------------------------------------------


def test_each_expert_learns_alone_and_keeps_its_vector(make_model, console):
    both, first = make_model(Phatgoose()), make_model(Phatgoose())
    config = FitConfig.for_method(Phatgoose(), max_steps=3)
    result = fit(both, OWN, config=config, console=console)
    assert result.steps == 6
    # The second adapter's data changes nothing of what the first one learned.
    fit(first, {**OWN, "b": reversals(5, seed=9)}, config=config, console=console)
    for site, gate in both.gates.items():
        assert gate.expert is None
        assert torch.equal(gate.vectors[0], first.gates[site].vectors[0])
        assert gate.targets.tolist() == gate.vectors.any(dim=1).tolist()
    assert any(not torch.equal(gate.vectors[1], first.gates[site].vectors[1]) for site, gate in both.gates.items())


def test_an_experts_gradient_is_that_of_its_adapter_behind_a_sigmoid(make_model, console):
    model = make_model(Phatgoose())
    # With vectors at zero every output of the adapter is halved.
    for gate in model.gates.values():
        gate.expert = 1
    ids = torch.tensor([[5, 9, 7, 4]])
    halved = model(input_ids=ids).logits
    with model.using({"b": 0.5}):
        torch.testing.assert_close(halved, model(input_ids=ids).logits)


def test_experts_go_on_after_an_interruption(make_model, console, tmp_path, monkeypatch):
    config = FitConfig.for_method(Phatgoose(), max_steps=3)
    whole, broken = make_model(Phatgoose()), make_model(Phatgoose())
    fit(whole, OWN, config=config, console=console)
    real, seen = fit_gates, []

    def failing(*args, **kwargs):
        seen.append(args[3])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("loraflow.training.learners.experts.fit_gates", failing)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, OWN, config=config, console=console, checkpoints=tmp_path)
    assert all(gate.expert is None for gate in broken.gates.values())
    fit(broken, OWN, config=config, console=console, checkpoints=tmp_path, resume=True)
    assert len(seen) == 3
    for site, gate in whole.gates.items():
        assert torch.equal(gate.vectors, broken.gates[site].vectors)


def test_a_fresh_fit_forgets_the_experts_of_an_older_one(make_model, console, tmp_path):
    config = FitConfig.for_method(Phatgoose(), max_steps=2)
    new = {"a": reversals(6, seed=7), "b": OWN["b"]}
    fit(make_model(Phatgoose()), OWN, config=config, console=console, checkpoints=tmp_path)
    # A fresh fit on other data that ends after its first expert, and is then gone on with.
    fit(make_model(Phatgoose()), new, config=config, console=console, checkpoints=tmp_path)
    (tmp_path / "expert-1" / "result.json").unlink()
    resumed, expected = make_model(Phatgoose()), make_model(Phatgoose())
    fit(resumed, new, config=config, console=console, checkpoints=tmp_path, resume=True)
    fit(expected, new, config=config, console=console)
    for site, gate in expected.gates.items():
        assert torch.equal(gate.vectors, resumed.gates[site].vectors)


def test_a_finished_expert_of_other_data_is_not_taken_over(make_model, console, tmp_path):
    config = FitConfig.for_method(Phatgoose(), max_steps=2)
    fit(make_model(Phatgoose()), OWN, config=config, console=console, checkpoints=tmp_path)
    with pytest.raises(LoraflowError, match="its run had another `data`"):
        fit(
            make_model(Phatgoose()),
            {**OWN, "a": reversals(6, seed=7)},
            config=config,
            console=console,
            checkpoints=tmp_path,
            resume=True,
        )


def test_centroids_are_the_mean_embeddings_of_the_samples(make_model, console, tmp_path):
    model = make_model(Centroid(layer=1))
    fit(model, OWN, console=console)
    expected = []
    for examples in OWN.values():
        rows = []
        for example in examples:
            ids = torch.tensor(
                [model.prompt.prompt_ids(model.tokenizer, [{"role": "user", "content": example["prompt"]}])]
            )
            with model.disable_adapter(), torch.no_grad():
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
            # The embeddings come first: the output of layer 1 is the third.
            rows.append(states[2][0].mean(dim=0))
        expected.append(torch.stack(rows).mean(dim=0))
    torch.testing.assert_close(model.gates["model"].centroids, torch.stack(expected))
    assert model.training_record == {"samples": {"a": 6, "b": 9}}
    model.save_pretrained(tmp_path / "fusion")
    again = FusedModel.from_pretrained(tmp_path / "fusion", base=tiny_model(), tokenizer=model.tokenizer)
    ids = torch.tensor([[5, 9, 7]])
    assert torch.equal(again.weigh(ids), model.weigh(ids))


# ---- What cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "examples", "options", "error", "message"),
    [
        ("average", reversals(4), {}, MethodError, "'average' learns nothing"),
        ("qa-flora", reversals(4), {}, MethodError, "'qa-flora' learns nothing"),
        ("phatgoose", reversals(4), {}, DataError, r"Give examples by adapter name: {'a': \[...\], 'b': \[...\]}"),
        ("centroid", {"a": OWN["a"]}, {}, DataError, "there is none for 'b'"),
        ("centroid", {**OWN, "bb": OWN["a"]}, {}, DataError, "unknown adapter 'bb'. Known: 'a', 'b'. Did you mean 'b'"),
        ("phatgoose", OWN, {"dev": reversals(2)}, DataError, "Leave `dev` out"),
        ("lora-flow", OWN, {}, DataError, "learns from examples of the task"),
        ("lorahub", OWN, {}, DataError, "learns from examples of the task"),
    ],
)
def test_examples_of_the_wrong_kind_are_refused(make_model, console, method, examples, options, error, message):
    with pytest.raises(error, match=message):
        fit(make_model(method), examples, console=console, **options)


@pytest.mark.parametrize("method", ["lorahub", "phatgoose", "average"])
def test_a_grid_is_for_gradients(make_model, method):
    with pytest.raises(MethodError, match="The grid is of learning rates"):
        search(make_model(method), reversals(4), dev=reversals(2))


@pytest.mark.parametrize(
    ("learns", "message"),
    [
        ("search", "its Bare must be as `loraflow.methods.base.Searched` says"),
        ("experts", "its ConstantGate must be as `loraflow.methods.base.LearnsAlone` says"),
        ("samples", "its ConstantGate must be as `loraflow.methods.base.KeepsSamples` says"),
        ("gradients", "learns by 'gradients'. Known: .* Did you mean 'gradient'?"),
    ],
)
def test_a_method_must_have_what_its_way_to_learn_needs(make_model, console, learns, message):
    @dataclass(frozen=True)
    class Bare(LearnedStatic):
        name = "bare"

        def gate(self, site):
            return LearnedWeights(2) if learns == "search" else ConstantGate([0.5, 0.5])

    Bare.learns = learns
    with pytest.raises(MethodError, match=message):
        fit(make_model(Bare()), OWN, console=console)


def test_the_grid_is_at_the_methods_own_rate():
    assert {setting["learning_rate"] for setting in search_grid(LoraFlow())} == {1e-3, 1e-4}
    assert {setting["learning_rate"] for setting in search_grid(LearnedStatic())} == {1e-2, 1e-3}
    assert {setting["batch_size"] for setting in search_grid(LoraFlow())} == {2, 4, 8}


# ---- The loss ------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_query_method_reads_prompts_only(make_model):
    model = make_model("average")
    data = prepare(model, reversals(5), None, QUICK).train
    total, count = 0.0, 0
    for row in data.rows:
        ids, prompt = torch.tensor([row.input_ids]), row.labels.count(-100)
        weights = model.weigh(ids[:, :prompt], method=QaFlora())
        with torch.no_grad():
            logits = model(input_ids=ids, fusion_weights=weights).logits[0, prompt - 1 : -1]
        total -= logits.log_softmax(-1).gather(-1, ids[0, prompt:, None]).sum().item()
        count += ids.shape[1] - prompt
    model.set_method(QaFlora())
    assert mean_loss(model, data, 2) == pytest.approx(total / count, rel=1e-5)

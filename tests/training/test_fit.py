"""Fitting gates: what is learned and what is not, where it starts, choosing, resuming, searching."""

from __future__ import annotations

import dataclasses
import math
import random
import shutil

import pytest
import torch
from rich.console import Console

from loraflow import FitConfig, FusedModel, LoraFlow
from loraflow.errors import DataError, LoraflowError, MethodError
from loraflow.evaluation.sandbox import ExecutionResult
from loraflow.evaluation.scoring import get_scorer
from loraflow.training import fit, mean_loss, search
from loraflow.training.checkpoints import COMPLETE, check_same, complete_checkpoints
from loraflow.training.data import prepare
from loraflow.training.learners import LEARNERS
from loraflow.training.learners.gradient import Gradient
from loraflow.training.trainer import WholeCheckpointTrainer
from tests.tiny import VOCAB, number_tokenizer, save_adapter, tiny_model

QUICK = FitConfig(epochs=2, learning_rate=1e-2)


def reversals(count, seed=0):
    """Examples whose completion is the prompt's numbers in reverse."""
    rng = random.Random(seed)
    rows = [[str(rng.randrange(3, VOCAB)) for _ in range(rng.randint(2, 5))] for _ in range(count)]
    return [{"prompt": " ".join(row), "completion": " ".join(reversed(row))} for row in rows]


@pytest.fixture
def adapters(tmp_path):
    base = tiny_model()
    return {"a": save_adapter(base, tmp_path / "a", seed=1), "b": save_adapter(base, tmp_path / "b", r=2, seed=2)}


@pytest.fixture
def make_model(adapters):
    def make(method="lora-flow"):
        return FusedModel.from_adapters(tiny_model(), adapters, method, tokenizer=number_tokenizer())

    return make


@pytest.fixture
def console(tmp_path):
    return Console(file=(tmp_path / "log.txt").open("w"))


@pytest.mark.parametrize("granularity", ["step", "layer", "module"])
def test_only_gates_learn(make_model, granularity):
    model = make_model(LoraFlow(granularity=granularity))
    frozen = {name: value.clone() for name, value in model.base_model.state_dict().items() if "fusion" not in name}
    result = model.fit(reversals(16), config=QUICK)
    assert result.steps == 8
    assert result.log[-1][0] == 8
    assert all(torch.equal(model.base_model.state_dict()[name], value) for name, value in frozen.items())
    start = torch.tensor(list(result.start.values())) - 1 / 2
    assert all(gate.weight.any() and not torch.equal(gate.bias, start) for gate in model.gates.values())
    assert not model.training


def test_fitting_lowers_the_loss(make_model):
    model = make_model()
    result = model.fit(reversals(40), config=FitConfig(epochs=8, learning_rate=2e-2))
    first = [loss for _, loss in result.log[:10]]
    assert result.train_loss < sum(first) / 10 - 0.1


def test_starts_at_the_adapter_with_the_lowest_loss(make_model):
    result = make_model().fit(reversals(12), config=QUICK)
    best = min(result.start_losses, key=result.start_losses.get)
    assert result.start_losses.keys() == {"a", "b"}
    assert result.start == {name: float(name == best) for name in ("a", "b")}


@pytest.mark.parametrize(
    ("start", "expected"), [("average", [0.5, 0.5]), ("b", [0.0, 1.0]), ({"a": 0.2, "b": -1.5}, [0.2, -1.5])]
)
def test_starts_where_asked(make_model, start, expected):
    model = make_model(LoraFlow(start=start))
    # A learning rate of almost nothing keeps the weights at their start.
    result = model.fit(reversals(4), config=FitConfig(epochs=1, learning_rate=1e-12, weight_decay=0.0))
    assert list(result.start.values()) == expected
    weights = model.trace(torch.tensor([[5, 6, 7]])).weights
    torch.testing.assert_close(weights, torch.tensor(expected).expand_as(weights))


def test_keeps_the_best_checkpoint_on_dev(make_model, console):
    model = make_model()
    config = FitConfig(epochs=4, learning_rate=0.3)
    result = fit(model, reversals(24), dev=reversals(8, seed=1), config=config, console=console)
    from loraflow.training.data import prepare

    dev = prepare(model, reversals(8, seed=1), None, QUICK).train
    assert mean_loss(model, dev, 8) == pytest.approx(result.dev_loss, rel=0.05)
    assert result.kept_step % 6 == 0


def test_chooses_by_a_score(make_model, console):
    calls = []

    def score(answer, record):
        calls.append((answer, record["prompt"]))
        # One call checks a record before anything is fitted; then only the first epoch's answers are any good.
        return float(len(calls) <= 4)

    config = FitConfig(epochs=3, learning_rate=1e-2, score_max_new_tokens=4)
    result = fit(make_model(), reversals(8), dev=reversals(3, seed=1), config=config, score=score, console=console)
    assert (result.kept_step, result.dev_score) == (2, 1.0)
    assert calls[0] == ("", reversals(3, seed=1)[0]["prompt"])
    assert len(calls) == 10
    with pytest.raises(LoraflowError, match="needs dev examples"):
        fit(make_model(), reversals(8), score=score, console=console)


@pytest.fixture
def runs(monkeypatch):
    """The programs that code-tests would have started."""
    started = []

    def run_tests(code, tests, limits):
        started.append(code)
        return ExecutionResult("passed")

    monkeypatch.setattr("loraflow.evaluation.scoring.run_tests", run_tests)
    return started


def with_tests(examples, tests=("assert True",)):
    return [{**example, "tests": list(tests)} for example in examples]


def test_no_program_is_run_before_the_first_epoch(make_model, console, runs):
    config = FitConfig(epochs=1, learning_rate=1e-2, score_max_new_tokens=2)
    grid = [{"learning_rate": 1e-2}, {"learning_rate": 1e-3}]
    dev = with_tests(reversals(3, seed=1))
    score = get_scorer("code-tests", allow_code=True)
    search(make_model(), reversals(4), dev=dev, config=config, grid=grid, score=score, console=console)
    assert len(runs) == len(grid) * len(dev)


@pytest.mark.parametrize("learn", [fit, search])
@pytest.mark.parametrize(
    ("scorer", "last", "message"),
    [
        ("code-tests", {}, r"example 1: The example has no field `tests`, which its scorer needs"),
        ("code-tests", {"tests": []}, r"example 1: `tests` \(=\[\]\) must be a list of at least one statement"),
        ("code-tests", {"tests": ["x = 1", "assert ("]}, r"example 1: `tests\[1\]` \(='assert \('\) is not Python"),
        ("code-tests", {"tests": ["f()"], "setup": 1}, r"example 1: `setup` \(=1\) must be a text"),
        ("last-number", {"answer": "none"}, r"example 1: The right answer \(='none'\) has no number in it"),
    ],
)
def test_examples_that_cannot_be_scored_are_refused_at_once(
    make_model, console, monkeypatch, runs, learn, scorer, last, message
):
    monkeypatch.setattr(WholeCheckpointTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    first, second = reversals(2, seed=1)
    dev = [*with_tests([first]), {**second, **last}]
    score = get_scorer(scorer, allow_code=True)
    with pytest.raises(DataError, match=message):
        learn(make_model(), reversals(4), dev=dev, score=score, console=console)
    assert runs == []


def test_a_scorer_of_no_name_says_at_once_what_it_misses(make_model, console):
    def score(answer, record):
        raise DataError(f"no {sorted(record)[-1]}s here")

    with pytest.raises(DataError, match="example 0: no prompts here"):
        fit(make_model(), reversals(4), dev=reversals(2, seed=1), score=score, console=console)


def test_a_method_without_gates_cannot_be_fitted(make_model):
    with pytest.raises(MethodError, match="'average' learns nothing"):
        make_model("average").fit(reversals(4))


def test_too_long_examples_are_reported_or_refused(make_model):
    model = make_model()
    examples = [{"prompt": "5 6 7", "completion": "8 9 10 11 12"}, {"prompt": "5", "completion": "6"}]
    result = model.fit(examples, config=FitConfig(epochs=1, max_length=6))
    assert result.truncated == ["example 0"]
    assert model.training_record["truncated_examples"] == 1
    with pytest.raises(DataError, match="example 0: the prompt has 3 tokens, which leaves none of the 3"):
        model.fit(examples, config=FitConfig(max_length=3))


def test_text_needs_a_tokenizer(adapters):
    with pytest.raises(LoraflowError, match="needs a tokenizer"):
        FusedModel.from_adapters(tiny_model(), adapters).fit(reversals(2))


def test_adapter_dropout_is_on_only_when_asked_for(make_model):
    def losses(dropout):
        return make_model().fit(reversals(8), config=FitConfig(epochs=1, adapter_dropout=dropout)).log

    assert losses(0.0) == losses(0.0)
    assert losses(0.5) != losses(0.0)
    model = make_model()
    model.fit(reversals(4), config=FitConfig(epochs=1, adapter_dropout=0.5))
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("settings", [{"gradient_accumulation": 2}, {"gradient_checkpointing": True}])
def test_same_result_with_less_memory(make_model, settings):
    plain = make_model().fit(reversals(8), config=QUICK)
    frugal = make_model().fit(reversals(8), config=FitConfig(epochs=2, learning_rate=1e-2, **settings))
    assert [loss for _, loss in frugal.log] == pytest.approx([loss for _, loss in plain.log], rel=1e-3)


def test_resumes_to_the_uninterrupted_result(make_model, tmp_path, console):
    config = FitConfig(epochs=3, learning_rate=1e-2, checkpoint_steps=2)
    whole = make_model()
    expected = fit(whole, reversals(20), config=config, checkpoints=tmp_path / "whole", console=console)
    interrupted = tmp_path / "interrupted"
    shutil.copytree(tmp_path / "whole", interrupted)
    newest = complete_checkpoints(interrupted)[-1]
    # A crash while the newest was written: there, but not whole.
    (newest / COMPLETE).unlink()
    (newest / "optimizer.safetensors").write_bytes(b"half")
    resumed = make_model()
    result = fit(resumed, reversals(20), config=config, checkpoints=interrupted, resume=True, console=console)
    assert result.train_loss == expected.train_loss
    assert result.log == expected.log
    assert result.start == expected.start
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_resuming_another_run_is_refused(make_model, tmp_path, console):
    fit(make_model(), reversals(8), config=QUICK, checkpoints=tmp_path / "run", console=console)
    for changed, arguments in {
        rf"`epochs` \({QUICK.epochs} then, 3 now\)": {
            "examples": reversals(8),
            "config": dataclasses.replace(QUICK, epochs=3),
        },
        "`data`": {"examples": reversals(8, seed=9), "config": QUICK},
    }.items():
        with pytest.raises(LoraflowError, match=rf"its run had another {changed}\. Give the same"):
            fit(make_model(), **arguments, checkpoints=tmp_path / "run", resume=True, console=console)


def test_a_setting_that_one_run_lacks_differs_from_none(tmp_path):
    with pytest.raises(LoraflowError, match=r"its run had another `seed` \(nothing then, null now\)\. Give the same"):
        check_same({"config": {}}, {"config": {"seed": None}}, tmp_path, "run")


def test_search_keeps_the_best_and_resumes(make_model, tmp_path, console):
    grid = [{"learning_rate": 1e-2, "batch_size": 4}, {"learning_rate": 1e-7, "batch_size": 8}]
    settings = {
        "dev": reversals(8, seed=1),
        "config": QUICK,
        "grid": grid,
        "checkpoints": tmp_path / "search",
        "console": console,
    }
    model = make_model()
    result = search(model, reversals(24), **settings)
    assert [row["learning_rate"] for row in result.search] == [1e-2, 1e-7]
    best = min(result.search, key=lambda row: row["dev_loss"])
    assert result.dev_loss == best["dev_loss"]
    assert model.training_record["recipe"]["learning_rate"] == best["learning_rate"]
    again = make_model()
    resumed = search(again, reversals(24), **settings, resume=True)
    assert resumed.search == result.search
    assert resumed.seconds == result.seconds, "finished settings must not run again"
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_bad_recipes():
    for settings, message in [
        ({"epochs": 0}, r"`epochs` \(=0\) must be greater than 0"),
        ({"learning_rate": -1.0}, r"`learning_rate` \(=-1.0\) must be greater"),
        ({"warmup": 1.0}, r"`warmup` \(=1.0\) must be at least 0 and less than 1"),
        ({"max_length": 0}, r"`max_length` \(=0\) must be at least 1"),
        (
            {"batch_size": 3, "gradient_accumulation": 2},
            r"`gradient_accumulation` \(=2\) must divide `batch_size` \(=3\)",
        ),
    ]:
        with pytest.raises(LoraflowError, match=message):
            FitConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({name: value}, rf"`{name}` \(={value}\) must be greater than 0, and finite\.")
            for name in ("learning_rate", "epsilon")
            for value in (0.0, math.inf, math.nan)
        ),
        *(
            ({name: value}, rf"`{name}` \(={value}\) must be at least 0, and finite\.")
            for name in ("weight_decay", "max_grad_norm")
            for value in (-1, math.inf, math.nan)
        ),
        *(
            ({"betas": betas}, r"`betas` \(=\(.*\)\) must be two numbers, each at least 0 and less than 1\.")
            for betas in ((math.nan, 0.9), (0.9, 2.0), (0.9, 1.0), (-0.1, 0.9), (0.9,))
        ),
        ({"epochs": math.inf}, r"`epochs` \(=inf\) must be greater than 0, and finite\."),
        ({"max_steps": math.nan}, r"`max_steps` \(=nan\) must be at least 1, and finite\."),
    ],
)
def test_numbers_that_are_no_recipe(settings, message):
    with pytest.raises(LoraflowError, match=message):
        FitConfig(**settings)


def test_recipes_at_their_ends():
    FitConfig(learning_rate=1e38, weight_decay=0, max_grad_norm=0, betas=(0, 0.0))


@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
def test_fits_on_a_quantised_base(tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    from loraflow import BaseOptions

    base = tiny_model(hidden_size=64, intermediate_size=128, head_dim=32)
    base.save_pretrained(tmp_path / "base")
    adapters = {name: save_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    options = BaseOptions(quantization=quantization, dtype=torch.float32)
    model = FusedModel.from_adapters(tmp_path / "base", adapters, tokenizer=number_tokenizer(), options=options)
    result = model.fit(reversals(8), config=QUICK)
    assert result.steps == 4
    assert all(gate.weight.any() for gate in model.gates.values())
    model.save_pretrained(tmp_path / "fusion")
    loaded = FusedModel.from_pretrained(tmp_path / "fusion", tokenizer=number_tokenizer())
    assert loaded.is_quantized
    ids = torch.tensor([[5, 6, 7]])
    # With gradients bitsandbytes takes another kernel, which rounds otherwise.
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_setting_that_diverges_is_never_the_best(make_model, console, tmp_path):
    grid = [{"learning_rate": 1e38}, {"learning_rate": 1e-3}]
    model, dev = make_model(), reversals(4, seed=1)
    result = search(model, reversals(8), dev=dev, config=QUICK, grid=grid, console=console, checkpoints=tmp_path)
    assert not math.isfinite(result.search[0]["dev_loss"])
    assert result.dev_loss == result.search[1]["dev_loss"]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_grid_in_which_all_diverge_says_so(make_model, console):
    model = make_model()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grid = [{"learning_rate": 1e38}, {"learning_rate": 1e37}]
    with pytest.raises(LoraflowError, match="None of the 2 settings gave a finite result"):
        search(model, reversals(8), dev=reversals(4, seed=1), config=QUICK, grid=grid, console=console)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


class Noting(Gradient):
    """A learner of another's own, that notes what it is asked."""

    def __init__(self):
        self.asked = []

    def check_method(self, fusion):
        self.asked.append("method")

    def check_examples(self, fusion, examples, dev):
        self.asked.append("examples")
        return super().check_examples(fusion, examples[1:], dev)

    def learn(self, fusion, examples, dev, run):
        self.asked.append((run.config.learning_rate, len(examples), run.label))
        return super().learn(fusion, examples, dev, run)

    def record(self, config, data, result):
        return {**super().record(config, data, result), "noted": len(data.train)}


def test_a_search_goes_by_the_learner(make_model, console, tmp_path, monkeypatch):
    learner = Noting()
    monkeypatch.setitem(LEARNERS, "gradient", learner)
    settings = {
        "dev": reversals(4, seed=1),
        "config": QUICK,
        "grid": [{"learning_rate": 1e-2}, {"learning_rate": 1e-3}],
        "checkpoints": tmp_path / "search",
        "console": console,
    }
    first, second = make_model(), make_model()
    search(first, reversals(9), **settings)
    fits = [(1e-2, 8, "search 1/2, learning_rate 0.01"), (1e-3, 8, "search 2/2, learning_rate 0.001")]
    assert learner.asked == ["method", "examples", *fits]
    assert first.training_record["noted"] == 8
    search(second, reversals(9), **settings, resume=True)
    assert learner.asked[4:] == ["method", "examples"], "finished settings must not be learned again"
    assert second.training_record == first.training_record


def test_a_search_reads_examples_as_a_fit_does(make_model, console):
    with pytest.raises(DataError, match="learns from examples of the task"):
        search(make_model(), {"a": reversals(2), "b": reversals(2)}, dev=reversals(2), console=console)


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_leaves_the_modes_as_they_are(make_model, training):
    model = make_model().train(training)
    model.base_model.lm_head.train(not training)
    modes = [module.training for module in model.modules()]
    mean_loss(model, prepare(model, reversals(4), None, QUICK).train, 4)
    assert [module.training for module in model.modules()] == modes

"""Learning on the adapters' own data together: who takes part in a forward, what is learned, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraflow import FitConfig, FusedModel, LearnedStatic, Ramole
from loraflow.errors import DataError, LoraflowError, MethodError
from loraflow.methods.static import ConstantGate
from loraflow.training import fit, mean_loss
from loraflow.training.data import prepare
from loraflow.training.learners.together import draw_adapters
from tests.tiny import number_tokenizer, relative_error, save_adapter, tiny_model
from tests.training.test_fit import QUICK, console, reversals

__all__ = ["console"]

OWN = {"a": reversals(6, seed=1), "b": reversals(9, seed=2), "c": reversals(5, seed=3)}
RECIPE = FitConfig(max_steps=3, learning_rate=1e-2)


@pytest.fixture
def adapters(tmp_path):
    base = tiny_model()
    return {
        name: save_adapter(base, tmp_path / name, r=r, seed=r) for name, r in zip("abcd", (2, 3, 4, 1), strict=True)
    }


@pytest.fixture
def make_model(adapters):
    def make(method="ramole", names="abc"):
        own = {name: adapters[name] for name in names}
        return FusedModel.from_adapters(tiny_model(), own, method, tokenizer=number_tokenizer())

    return make


def watch(model):
    """Note among which adapters each forward that trains is."""
    seen = []

    def note(*_):
        if model.training:
            seen.append(tuple(next(iter(model.gates.values())).among.tolist()))

    # Before a fit, and so before the hook that draws: what is noted is what the forward before it had.
    model.register_forward_hook(note)
    return seen


@given(
    pool=st.lists(st.booleans(), min_size=2, max_size=6).filter(lambda pool: sum(pool) > 1),
    probability=st.floats(0, 0.999),
)
def test_two_stay_at_least_and_nobody_from_outside(pool, probability):
    drawn = draw_adapters(torch.tensor(pool), probability)
    assert drawn.sum() >= 2
    assert not (drawn & ~torch.tensor(pool)).any()
    if probability == 0:
        assert drawn.tolist() == pool


def test_adapters_stay_as_often_as_they_should():
    pool, rounds = torch.tensor([True] * 4 + [False]), 4000
    torch.manual_seed(0)
    drawn = torch.stack([draw_adapters(pool, 0.5) for _ in range(rounds)]).double()
    # Of four, five draws in sixteen leave fewer than two; those are filled up to two.
    expected = (2 * 5 + 2 * 6 + 3 * 4 + 4) / 16 / 4
    assert (drawn.mean(dim=0)[:4] - expected).abs().max() < 0.03
    assert drawn[:, 4].sum() == 0


def test_each_forward_is_among_other_adapters_and_afterwards_all_are_weighed(make_model, console):
    model = make_model()
    seen = watch(model)
    result = fit(model, OWN, config=FitConfig(max_steps=12, learning_rate=1e-2), console=console)
    assert result.steps == len(seen) == 12
    assert len(set(seen)) > 1
    assert {sum(among) for among in seen} <= {2, 3}
    assert all(gate.among is None for gate in model.gates.values())
    assert all(gate.lora_B.any() for gate in model.gates.values())
    record = model.training_record
    assert record["adapters"] == {"a": 6, "b": 9, "c": 5}
    assert (record["examples"], record["steps"]) == (20, 12)


def test_nobody_is_left_out_where_none_is_to_be(make_model, console):
    model = make_model(Ramole(drop=0))
    seen = watch(model)
    fit(model, OWN, config=RECIPE, console=console)
    assert set(seen) == {(True, True, True)}


def test_those_without_data_take_no_part_and_are_weighed_afterwards(make_model, console, tmp_path):
    some, few = make_model(names="abcd"), make_model(names="abc")
    few.load_state_dict({name: value + 0.1 for name, value in few.state_dict().items()})
    seen = watch(some)
    fit(some, OWN, config=RECIPE, console=console)
    assert all(not among[3] for among in seen)
    # What is learned has the same size, however many there are.
    assert {name: value.shape for name, value in few.state_dict().items()} == {
        name: value.shape for name, value in some.state_dict().items()
    }
    ids = torch.tensor([[5, 9, 7, 4]])
    assert (some.trace(ids).weights[..., 3] > 0).all()
    some.save_pretrained(tmp_path / "fusion")
    again = FusedModel.from_pretrained(tmp_path / "fusion", base=tiny_model(), tokenizer=number_tokenizer())
    assert torch.equal(again(ids).logits, some(ids).logits)
    # One that was fitted without the fourth takes it as it is.
    joined = make_model(names="abcd")
    joined.load_state_dict(few.state_dict())
    assert (joined.trace(ids).weights[..., 3] > 0).all()
    assert relative_error(joined(ids).logits, few(ids).logits) > 1e-4


def test_learning_lowers_the_loss(make_model, console):
    model = make_model(Ramole(drop=0))
    pooled = prepare(model, [example for own in OWN.values() for example in own], None, QUICK).train
    before = mean_loss(model, pooled, 4)
    fit(model, OWN, config=FitConfig(max_steps=15, learning_rate=5e-2, weight_decay=0.0), console=console)
    assert mean_loss(model, pooled, 4) < before - 0.01


@pytest.mark.parametrize("extra", [{"gradient_checkpointing": True}, {"packing": True}])
def test_other_recipes_learn_too(make_model, console, extra):
    plain, other = make_model(Ramole(drop=0)), make_model(Ramole(drop=0))
    fit(plain, OWN, config=RECIPE, console=console)
    fit(other, OWN, config=FitConfig(max_steps=3, learning_rate=1e-2, **extra), console=console)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_a_step_is_planned_where_adapters_are_retrieved(make_model, console, capsys):
    planned = FitConfig(max_steps=2, learning_rate=1e-2, gradient_accumulation="auto")
    assert fit(make_model(Ramole(retrieve=1)), OWN, config=planned, console=console).steps == 2
    assert "cannot be planned" not in capsys.readouterr().err


def test_an_interrupted_fit_goes_on_with_the_same_draws(make_model, console, tmp_path):
    config = FitConfig(max_steps=6, learning_rate=1e-2, checkpoint_steps=2, keep_last=5)
    whole, broken = make_model(), make_model()
    fit(whole, OWN, config=config, console=console)

    def stop(*_):
        if broken.training and len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(broken.training)

    seen = []
    hook = broken.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, OWN, config=config, console=console, checkpoints=tmp_path / "run")
    hook.remove()
    assert all(gate.among is None for gate in broken.gates.values())
    fit(broken, OWN, config=config, console=console, checkpoints=tmp_path / "run", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(broken.state_dict()[name], value)


def test_where_adapters_are_retrieved_their_samples_are_read_too(make_model, console, tmp_path):
    model, plain = make_model(Ramole(retrieve=1)), make_model(Ramole())
    seen = watch(model)
    fit(model, OWN, config=RECIPE, console=console)
    # The router learns as without retrieval, among all of them.
    fit(plain, OWN, config=RECIPE, console=console)
    assert {sum(among) for among in seen} <= {2, 3}
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    centroids = model.state_dict()["model.centroids"]
    assert (centroids.norm(dim=-1) > 0).all()
    # Means of vectors of length 1.
    assert (centroids.norm(dim=-1) <= 1 + 1e-6).all()
    ids = torch.tensor([[5, 9, 7, 4]])
    assert torch.equal((model.trace(ids).weights > 0).sum(dim=-1), torch.ones(1, 4, 3, dtype=torch.long))
    model.save_pretrained(tmp_path / "fusion")
    again = FusedModel.from_pretrained(tmp_path / "fusion", base=tiny_model(), tokenizer=number_tokenizer())
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))
    with pytest.raises(
        DataError, match=r"reads prompts by each adapter's own data, as it is set up; there is none for"
    ):
        fit(make_model(Ramole(retrieve=1)), {"a": OWN["a"], "b": OWN["b"]}, config=RECIPE, console=console)


def test_data_of_other_adapters_is_another_run(make_model, console, tmp_path):
    fit(make_model(), {"a": OWN["a"], "b": OWN["b"]}, config=RECIPE, console=console, checkpoints=tmp_path)
    with pytest.raises(LoraflowError, match="its run had another `data`"):
        fit(
            make_model(),
            {"a": OWN["a"], "c": OWN["b"]},
            config=RECIPE,
            console=console,
            checkpoints=tmp_path,
            resume=True,
        )


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (
            {"a": OWN["a"]},
            r"learns to tell adapters apart, and there is data of 'a' alone\. Give that of 2 adapters",
        ),
        ({}, r"learns to tell adapters apart, and there is data of none of them\. Give that of 2 adapters at"),
        ({**OWN, "aa": OWN["a"]}, "Examples are given for the unknown adapter 'aa'."),
        (OWN["a"], r"The method 'ramole' learns from each adapter's own data. Give examples by adapter name"),
    ],
)
def test_data_that_does_not_suffice_is_refused(make_model, console, examples, message):
    with pytest.raises(DataError, match=message):
        fit(make_model(), examples, console=console)


@pytest.mark.parametrize(
    ("drops", "message"),
    [
        (False, "its Bare must be as `loraflow.methods.base.Drops` says"),
        (True, "its ConstantGate must be as `loraflow.methods.base.LearnsAmong` says"),
    ],
)
def test_a_method_must_have_what_learning_together_needs(make_model, console, drops, message):
    @dataclass(frozen=True)
    class Bare(LearnedStatic):
        name = "bare"
        learns = "together"

        def gate(self, site):
            gate = ConstantGate([0.5] * 3)
            gate.among = None
            return gate if not drops else ConstantGate([0.5] * 3)

    if drops:
        Bare.drop = 0.5
    with pytest.raises(MethodError, match=message):
        fit(make_model(Bare()), OWN, console=console)


def test_the_command_takes_data_of_some_adapters(make_model, tmp_path, adapters):
    from loraflow.cli.fit import TrainingData

    files = []
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in OWN[name]))
        files.append(f"{name}={tmp_path / name}.jsonl")
    found = TrainingData(adapter_data=files).read(Ramole(), list("abc"), None, 0)
    assert {name: len(own) for name, own in found.items()} == {"a": 6, "b": 9}
    with pytest.raises(LoraflowError, match=r"learns from each adapter's own data\. Give it with --adapter-data a="):
        TrainingData().read(Ramole(), list("abc"), None, 0)

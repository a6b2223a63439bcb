"""Runs on disk: one at a time in a place, decisions that are asked for, early ends, divergence, no pickle."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from loraflow import FitConfig, FusedModel
from loraflow.errors import LoraflowError, StorageError, TrainingError
from loraflow.files import alone
from loraflow.training import fit, search
from loraflow.training import trainer as trainer_module
from loraflow.training.checkpoints import COMPLETE, FINISHED, LAST_GOOD, complete_checkpoints
from loraflow.training.guard import exploded
from loraflow.training.state_files import load_random_state, save_random_state
from loraflow.training.trainer import WholeCheckpointTrainer
from tests.tiny import number_tokenizer
from tests.training.test_fit import QUICK, adapters, console, make_model, reversals

__all__ = ["adapters", "console", "make_model"]


class Interrupted(BaseException):
    """As a signal would."""


def interrupt(monkeypatch, step):
    """End the training process's work in the middle of a step."""
    original = WholeCheckpointTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Interrupted
        return original(self, *args, **kwargs)

    monkeypatch.setattr(WholeCheckpointTrainer, "training_step", training_step)


def test_a_run_that_was_moved_keeps_its_best(make_model, console, tmp_path, monkeypatch):
    """Trainer goes by the path that the best checkpoint had."""
    examples = reversals(8)
    config = dataclasses.replace(QUICK, epochs=3, learning_rate=0.3)
    model = make_model()
    expected = fit(model, examples, dev=reversals(6, 1), config=config, console=console)
    learned = {name: value.clone() for name, value in model.state_dict().items()}
    assert expected.kept_step < expected.steps, "the last checkpoint is the best one"
    with monkeypatch.context() as patch:
        patch.setattr(WholeCheckpointTrainer, "take_best", lambda *_: (_ for _ in ()).throw(Interrupted))
        settings = {"dev": reversals(6, 1), "config": config, "console": console}
        with pytest.raises(Interrupted):
            fit(make_model(), examples, checkpoints=tmp_path / "run", **settings)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    resumed = make_model()
    found = fit(resumed, examples, checkpoints=tmp_path / "moved", resume=True, **settings)
    assert found.kept_step == expected.kept_step
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, learned[name])


def test_a_training_that_ends_before_its_end_gives_the_terminal_back(make_model, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    terminal, before = Console(file=io.StringIO(), force_terminal=True), sys.stdout
    with pytest.raises(Interrupted):
        fit(make_model(), reversals(8), config=QUICK, console=terminal)
    assert sys.stdout is before
    assert not terminal._live_stack


# ---- Decisions ------------------------------------------------------------------------------------------------------


def test_nothing_to_resume_is_said(make_model, console, tmp_path, monkeypatch):
    settings = {"config": QUICK, "checkpoints": tmp_path / "run", "console": console}
    with pytest.raises(LoraflowError, match=r"There is nothing to resume in .*run: no run, or one"):
        fit(make_model(), reversals(8), resume=True, **settings)
    assert not (tmp_path / "run").exists()
    with pytest.raises(LoraflowError, match=r"`resume` \(=True\) needs the directory"):
        fit(make_model(), reversals(8), resume=True, console=console)
    with pytest.raises(LoraflowError, match="Say one of them"):
        fit(make_model(), reversals(8), resume=True, overwrite=True, **settings)
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(Interrupted):
            fit(make_model(), reversals(8), **settings)
    with pytest.raises(LoraflowError, match="interrupted before its first checkpoint"):
        fit(make_model(), reversals(8), resume=True, **settings)
    assert fit(make_model(), reversals(8), overwrite=True, **settings).steps == 4


@pytest.mark.parametrize("kind", ["fit", "search"])
def test_an_interrupted_run_is_not_started_over_in_silence(make_model, console, tmp_path, monkeypatch, kind):
    directory = tmp_path / "run"
    settings = {"config": QUICK, "checkpoints": directory, "console": console}
    learn = fit
    if kind == "search":
        learn, settings = search, {**settings, "dev": reversals(2, seed=1), "grid": [{"learning_rate": 1e-2}]}
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(Interrupted):
            learn(make_model(), reversals(8), **settings)
    before = sorted(directory.rglob("*"))
    with pytest.raises(LoraflowError, match=r"holds an interrupted run. Say `resume=True`.*or `overwrite=True`"):
        learn(make_model(), reversals(8), **settings)
    assert sorted(directory.rglob("*")) == before, "nothing is deleted"
    whole = make_model()
    learn(whole, reversals(8), **{**settings, "checkpoints": None})
    resumed = make_model()
    learn(resumed, reversals(8), resume=True, **settings)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())
    assert (directory / FINISHED).exists()
    # One that is finished may be started over: nothing is lost that was not kept.
    learn(make_model(), reversals(8), **settings)


# ---- One at a time --------------------------------------------------------------------------------------------------


def test_a_second_fit_is_refused_at_once(make_model, console, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    second = []

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 1:
                with pytest.raises(StorageError, match=r"Another fit is running in .*run\. Wait for it"):
                    fit(make_model(), reversals(8), config=QUICK, checkpoints=directory, console=console)
                second.append(True)

    original = trainer_module.make_trainer

    def make_trainer(*args, **kwargs):
        trainer = original(*args, **kwargs)
        trainer.add_callback(Second())
        return trainer

    monkeypatch.setattr(trainer_module, "make_trainer", make_trainer)
    assert fit(make_model(), reversals(8), config=QUICK, checkpoints=directory, console=console).steps == 4
    assert second == [True]


HOLD = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from loraflow.files import alone
    with alone(Path(sys.argv[1]), "fit"):
        print("held", flush=True)
        time.sleep(600)
    """
)


def test_a_hold_ends_with_its_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="Another fit is running"), alone(tmp_path, "fit"):
            pytest.fail("held twice")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with alone(tmp_path, "fit"):
        pass


def test_processes_of_one_training_hold_a_folder_together(tmp_path, monkeypatch):
    with alone(tmp_path, "fit"):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with alone(tmp_path, "fit"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(StorageError, match="Another fit"), alone(tmp_path, "fit"):
            pytest.fail("held twice")


def test_a_hold_leaves_no_folder_that_was_not_there(tmp_path):
    with alone(tmp_path / "new", "fit"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


# ---- Ends -----------------------------------------------------------------------------------------------------------


def scores(*values):
    """A score that is, evaluation after evaluation, one of these."""
    left = list(values)
    return lambda answer, record: left.pop(0)


def test_early_stopping_ends_and_keeps_the_best(make_model, console, tmp_path):
    config = FitConfig(epochs=9, learning_rate=1e-2, early_stopping=2, score_max_new_tokens=2)
    settings = {"dev": reversals(1, seed=1), "config": config, "checkpoints": tmp_path / "run", "console": console}
    model = make_model()
    # The first call is of the check before anything is trained.
    result = fit(model, reversals(8), score=scores(0, 0.1, 0.7, 0.7, 0.2, 1), **settings)
    assert (result.steps, result.kept_step, result.dev_score) == (8, 4, 0.7)
    # Killed after its last checkpoint, it has nothing left to do.
    resumed = make_model()
    again = fit(resumed, reversals(8), score=scores(0), resume=True, **settings)
    assert (again.steps, again.kept_step, again.log) == (8, 4, result.log)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in model.state_dict().items())


def test_early_stopping_needs_dev(make_model, console):
    with pytest.raises(LoraflowError, match=r"`early_stopping` \(=2\) needs dev examples"):
        fit(make_model(), reversals(4), config=FitConfig(early_stopping=2), console=console)


def test_so_many_checkpoints_are_kept_and_the_best(make_model, console, tmp_path):
    config = FitConfig(epochs=6, learning_rate=1e-2, keep_last=3, score_max_new_tokens=2)
    best_first = scores(0, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1)
    settings = {"dev": reversals(1, seed=1), "score": best_first, "config": config, "console": console}
    fit(make_model(), reversals(4), checkpoints=tmp_path, **settings)
    assert [int(path.name.split("-")[1]) for path in complete_checkpoints(tmp_path)] == [1, 4, 5, 6]


def test_a_run_may_go_on_with_other_trackers_and_more_checkpoints(make_model, console, tmp_path):
    fit(make_model(), reversals(8), config=QUICK, checkpoints=tmp_path, console=console)
    more = FitConfig(epochs=2, learning_rate=1e-2, keep_last=5)
    assert fit(make_model(), reversals(8), config=more, checkpoints=tmp_path, resume=True, console=console).steps == 4


# ---- Divergence -----------------------------------------------------------------------------------------------------


def spoil(monkeypatch, step, change):
    original = WholeCheckpointTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return change(loss) if self.state.global_step >= step else loss

    monkeypatch.setattr(WholeCheckpointTrainer, "compute_loss", compute_loss)


def test_a_loss_that_is_not_finite_stops(make_model, console, tmp_path, monkeypatch):
    good = make_model()
    # Two steps whose loss was good: what they started from, the second one's gates, is the last good.
    fit(good, reversals(12), config=FitConfig(epochs=3, max_steps=3, learning_rate=1e-2), console=console)
    spoil(monkeypatch, 3, lambda loss: loss * math.nan)
    model = make_model()
    examples = [{**example, "origin": "x"} for example in reversals(12)]
    config = FitConfig(epochs=3, max_steps=6, learning_rate=1e-2, batch_size=4)
    with pytest.raises(TrainingError) as caught:
        fit(model, examples, config=config, checkpoints=tmp_path / "run", console=console)
    message = str(caught.value)
    assert message.startswith("The loss of step 4 is not finite (nan); its examples: example ")
    assert message.count("example ") == 4
    assert "Lower `learning_rate`" in message
    assert "as it was after step 2, the last good one." in message
    assert message.endswith(f"It is saved in {tmp_path / 'run' / LAST_GOOD}.")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    saved = FusedModel.from_pretrained(
        tmp_path / "run" / LAST_GOOD, base=make_model().unload(), tokenizer=number_tokenizer()
    )
    assert all(torch.equal(saved.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops(make_model, console, monkeypatch):
    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    spoil(monkeypatch, 1, Spoiled.apply)
    with pytest.raises(TrainingError, match="The gradient's norm of step 2 is not finite"):
        fit(make_model(), reversals(8), config=QUICK, console=console)


def test_a_loss_that_explodes_stops(make_model, console, monkeypatch):
    spoil(monkeypatch, 12, lambda loss: loss * 40)
    config = FitConfig(epochs=20, learning_rate=1e-3)
    with pytest.raises(TrainingError, match=r"The loss has exploded at step \d+: .* over 10 steps") as caught:
        fit(make_model(), reversals(8), config=config, console=console)
    assert "after step 11, the last good one" in str(caught.value)


def test_what_an_explosion_is():
    assert not exploded([1e9] * 9, 10)
    assert not exploded([1e9] * 100, 10), "bad from its start, it has not become worse"
    assert not exploded([0.01] + [2.0] * 100, 10), "no worse than guessing"
    assert not exploded([3.0, *([500.0] + [3.0] * 200) * 3], 1000), "one odd example"
    assert exploded([3.0] + [20.0] * 10, 1000)


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_checkpoints_hold_no_pickle(make_model, console, tmp_path):
    fit(make_model(), reversals(8), dev=reversals(2), config=QUICK, checkpoints=tmp_path, console=console)
    newest = complete_checkpoints(tmp_path)[-1]
    names = {path.name for path in newest.rglob("*") if path.is_file()}
    assert {path.rpartition(".")[2] for path in names - {COMPLETE}} <= {"json", "safetensors", "md"}
    assert {"optimizer.safetensors", "scheduler.json", "rng_state_0.safetensors"} <= names
    assert load_file(newest / "optimizer.safetensors")
    assert json.loads((newest / "scheduler.json").read_text())["last_epoch"] == 4


def test_a_checkpoint_without_its_optimizer_is_refused(make_model, console, tmp_path):
    fit(make_model(), reversals(8), config=QUICK, checkpoints=tmp_path, console=console)
    shutil.rmtree(complete_checkpoints(tmp_path)[-1])
    (complete_checkpoints(tmp_path)[-1] / "optimizer.safetensors").unlink()
    with pytest.raises(LoraflowError, match=r"has no optimizer\.safetensors: .* Start over, with `overwrite=True`"):
        fit(make_model(), reversals(8), config=QUICK, checkpoints=tmp_path, resume=True, console=console)


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    random.gauss(0, 1), np.random.standard_normal()
    save_random_state(tmp_path / "state.safetensors", every_device=True)
    expected = draw()
    draw()
    load_random_state(tmp_path / "state.safetensors", every_device=True)
    assert draw() == expected


def test_the_environment_names_the_first_process(monkeypatch):
    from loraflow.files import is_first_process

    monkeypatch.delenv("RANK", raising=False)
    assert is_first_process()
    monkeypatch.setenv("RANK", "3")
    # A rank without others is a scheduler's own.
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_first_process()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not is_first_process()
    assert os.environ["RANK"] == "3"

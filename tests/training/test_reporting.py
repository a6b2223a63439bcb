"""Trackers: what they get, the picture at the end, and that nothing of it changes what is learned."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import sys
import types

import pytest
import torch

from loraflow import FitConfig
from loraflow.errors import LoraflowError
from loraflow.training import fit
from loraflow.training.data import prepare
from loraflow.training.reporting import COLLAPSED, PICTURE, check_trackers, watch_weights
from tests.tiny import set_random_gates
from tests.training.test_fit import QUICK, adapters, console, make_model, reversals

__all__ = ["adapters", "console", "make_model"]

CURVES = {"fusion_weights/entropy", "fusion_weights/collapsed", "fusion_weights/a", "fusion_weights/b/layer_1"}


def test_tensorboard_gets_curves_and_the_picture(make_model, console, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = make_model()
    expected = plain.fit(reversals(8), dev=reversals(3, seed=1), config=QUICK)
    model = make_model()
    config = dataclasses.replace(QUICK, report_to="tensorboard")
    settings = {"dev": reversals(3, seed=1), "reports": tmp_path / "reports", "console": console}
    result = fit(model, reversals(8), config=config, **settings)
    events = EventAccumulator(str(tmp_path / "reports")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in CURVES} | {"train/loss", "eval/loss"} <= tags
    assert [event.step for event in events.Scalars("train/fusion_weights/a")] == [2, 4]
    assert events.Tags()["images"] == ["fusion_weights"]
    assert (tmp_path / "reports" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert result.log == expected.log
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())


class Fake(types.ModuleType):
    """A tracker's package that notes what it is given."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.logged, self.ended, self.run = [], 0, None

    def log(self, values, **_):
        assert not self.ended
        self.logged.append(values)

    def Image(self, path):  # noqa: N802 (the trackers' own name)
        return ("image", path)

    def finish(self):
        self.ended += 1
        self.run = None


@pytest.fixture
def trackers(monkeypatch):
    """Packages of all trackers but TensorBoard, and callbacks that hand everything on, as transformers' do."""
    from transformers import TrainerCallback

    from loraflow.training import reporting

    fakes = {name: Fake(name) for name in ("wandb", "mlflow", "trackio")}
    fakes["mlflow"].log_artifact = lambda path: fakes["mlflow"].log({"artifact": path})

    def kind(name):
        class Tracker(TrainerCallback):
            def on_train_begin(self, *_, **__):
                fakes[name].run = name

            def on_log(self, args, state, control, logs=None, **_):
                fakes[name].log(logs)

        return Tracker

    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(reporting, "get_reporting_integration_callbacks", lambda names: [kind(name) for name in names])
    return fakes


def test_several_trackers_get_the_same(make_model, console, tmp_path, trackers):
    config = FitConfig(epochs=1, learning_rate=1e-2, report_to=("wandb", "mlflow", "trackio"))
    fit(make_model(), reversals(8), config=config, reports=tmp_path, console=console)
    picture = str(tmp_path / PICTURE)
    for name, fake in trackers.items():
        assert any(values.keys() >= CURVES for values in fake.logged), name
        shown = {"artifact": picture} if name == "mlflow" else {"fusion_weights": ("image", picture)}
        assert fake.logged[-1] == shown
    assert trackers["wandb"].ended == 1


def test_a_run_of_the_callers_own_goes_on(make_model, console, tmp_path, trackers):
    trackers["wandb"].run = "mine"
    config = FitConfig(epochs=1, report_to="wandb")
    fit(make_model(), reversals(4), config=config, reports=tmp_path, console=console)
    assert trackers["wandb"].ended == 0


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "tensorboard"])
def test_a_missing_tracker_is_said_before_anything_is_learned(make_model, console, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    message = rf"`report_to` \(='{name}'\) needs the package {name}\. Run: pip install {name}"
    with pytest.raises(LoraflowError, match=message):
        fit(make_model(), reversals(4), config=FitConfig(report_to=name), console=console)


def test_the_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_trackers(["wandb"], weights=False)
    with pytest.raises(LoraflowError, match="matplotlib"):
        check_trackers(["wandb"], weights=True)


def test_what_is_watched_against_a_loop(make_model):
    model = make_model()
    set_random_gates(model)
    rows = prepare(model, reversals(5), None, QUICK).train
    found = watch_weights(model, rows, 2)
    weights, collapsed = [], []
    for row in rows.rows:
        trace = model.trace(torch.tensor([row.input_ids])).weights[0].double()
        start = sum(label == -100 for label in row.labels)
        for position in range(start - 1, len(row.input_ids) - 1):
            weights.append(trace[position])
            for layer in trace[position].tolist():
                positive = [max(weight, 0.0) for weight in layer]
                collapsed.append(sum(positive) > 0 and max(positive) >= COLLAPSED * sum(positive))
    torch.testing.assert_close(found.answers.mean, torch.stack(weights).mean(dim=0))
    assert found.collapsed == pytest.approx(sum(collapsed) / len(collapsed))
    assert found.curves().keys() >= CURVES

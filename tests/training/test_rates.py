"""The range test of learning rates."""

from __future__ import annotations

import pytest
import torch

from loraflow import FitConfig
from loraflow.errors import LoraflowError, MethodError
from loraflow.training import find_learning_rate
from loraflow.training import rates as rates_module
from tests.tiny import set_random_gates
from tests.training.test_fit import adapters, console, make_model, reversals

__all__ = ["adapters", "console", "make_model"]


def test_a_suggestion_by_its_rule_and_gates_as_they_were(make_model, console):
    model = make_model()
    set_random_gates(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = find_learning_rate(model, reversals(16), console=console)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not model.training
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    assert found.rates[0] == pytest.approx(1e-6)
    ratios = [later / earlier for earlier, later in zip(found.rates, found.rates[1:], strict=False)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    lowest = found.rates[found.smoothed.index(min(found.smoothed))]
    assert found.suggestion == pytest.approx(lowest / 10, rel=0.5)
    assert FitConfig(learning_rate=found.suggestion)
    again = find_learning_rate(model, reversals(16), console=console)
    assert again == found


def test_a_rate_too_high_ends_the_test(make_model, console, monkeypatch):
    monkeypatch.setattr(rates_module, "HIGHEST", 1e12)
    found = find_learning_rate(make_model(), reversals(16), console=console)
    assert len(found.losses) < rates_module.STEPS


def test_where_nothing_lowers_the_loss_it_says_so(make_model, console, monkeypatch):
    monkeypatch.setattr(rates_module, "_losses", lambda *_: [1.0, 2.0, 3.0])
    with pytest.raises(LoraflowError, match=r"No learning rate from 1e-06 to .* lowers the loss \(=1 at the start\)"):
        find_learning_rate(make_model(), reversals(4), console=console)


def test_methods_without_a_rate_are_refused(make_model, console):
    with pytest.raises(MethodError, match="'lorahub' does not learn by gradient"):
        find_learning_rate(make_model("lorahub"), reversals(4), console=console)

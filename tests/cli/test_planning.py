"""The plan that `info` prints."""

from __future__ import annotations

import io

from rich.console import Console

from loraflow.cli.planning import print_plan
from loraflow.core.architecture import find_decoder_layers
from loraflow.core.attach import attach
from loraflow.errors import LoraflowError
from tests.tiny import random_adapter, tiny_model


def test_a_base_that_cannot_be_planned_says_why(monkeypatch):
    def refuse(model, layers):
        raise LoraflowError("What a step takes cannot be planned: it is odd")

    monkeypatch.setattr("loraflow.training.plan.footprints_of_empty", refuse)
    base = tiny_model()
    console = Console(file=io.StringIO(), width=80)
    print_plan(attach(base, find_decoder_layers(base), [random_adapter(base, "a")]), 10.0, console)
    said = "plan of a fit: only when the base is loaded. What a step takes cannot be planned: it is odd"
    assert console.file.getvalue().strip() == said

"""Training gates by gradient on examples of the task."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from transformers import set_seed

from loraflow.core.fusion import Fusion
from loraflow.methods.base import StartsAt
from loraflow.training.checkpoints import identity_of
from loraflow.training.config import FitConfig, FitResult, Run
from loraflow.training.data import FitData, TokenExamples, prepare
from loraflow.training.learners.base import Examples, Learner
from loraflow.training.loss import check_score, mean_loss
from loraflow.training.processes import ALONE, Processes
from loraflow.training.trainer import as_it_was, train


class Gradient(Learner):
    """Trains all gates, from the method's start."""

    name: ClassVar[str] = "gradient"
    has_grid: ClassVar[bool] = True

    def learn(self, fusion: Fusion, examples: Examples, dev: Examples | None, run: Run) -> FitResult:  # noqa: D102
        data = prepare(fusion, examples, dev, run.config)
        check_score(run.score, data.dev_examples)
        result = fit_gates(fusion, data, run, run.label or "fitting")
        fusion.training_record = self.record(run.config, data, result)
        return result


def fit_gates(fusion: Fusion, data: FitData, run: Run, label: str, *, fresh: bool = True) -> FitResult:
    """One run of the trainer over a fusion's gates, from the method's start if `fresh`, else from where they are."""
    started = time.perf_counter()
    fusion.training_record = None

    def start(config: FitConfig) -> dict[str, Any]:
        return {"start_losses": set_start(fusion, data.train, config, run.processes) if fresh else {}}

    with contextlib.ExitStack() as stack:
        stack.enter_context(as_it_was(fusion))
        stack.enter_context(fusion.attachment.dropping(run.config.adapter_dropout))
        outcome, recorded = train(fusion, data, run, identity_of(fusion, data, run), label, start)
    return dataclasses.replace(
        outcome,
        start=_start_weights(fusion, recorded["start_losses"]),
        start_losses=recorded["start_losses"],
        seconds=time.perf_counter() - started,
        truncated=data.train.truncated,
    )


def set_start(
    fusion: Fusion, examples: TokenExamples, config: FitConfig, processes: Processes = ALONE
) -> dict[str, float]:
    """Bring the gates to where training starts; gives the loss of each start where those decide."""
    losses: dict[str, float] = {}
    for name, weights in fusion.method.starts(fusion.adapter_names).items():
        with fusion.using(dict(zip(fusion.adapter_names, weights, strict=True))):
            losses[name] = mean_loss(fusion, examples, config.forward_size, processes=processes)
    # Gates with random parts start from the seed too.
    set_seed(config.seed)
    fusion.set_method(fusion.method)
    start = _start_weights(fusion, losses)
    for gate in fusion.gates.values() if start else ():
        cast(StartsAt, gate).start_at(list(start.values()))
    return losses


def _start_weights(fusion: Fusion, losses: Mapping[str, float]) -> dict[str, float]:
    best = min(losses, key=losses.__getitem__) if losses else None
    weights = fusion.method.start_weights(fusion.adapter_names, best)
    return {} if weights is None else dict(zip(fusion.adapter_names, weights, strict=True))

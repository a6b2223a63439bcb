"""Training each adapter's part of the gates on its own data, with no other adapter at work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

from loraflow.core.fusion import Fusion
from loraflow.methods.base import LearnsAlone
from loraflow.training.checkpoints import identity_of, keep_finished, load_finished, remove_checkpoints
from loraflow.training.config import FitResult, Run
from loraflow.training.data import prepare
from loraflow.training.learners.base import DECIDING, Examples, Learner
from loraflow.training.learners.gradient import fit_gates


class Experts(Learner):
    """Trains an expert after the other."""

    name: ClassVar[str] = "experts"
    reads: ClassVar[Literal["task", "adapters"]] = "adapters"
    needs_gates: ClassVar[type | None] = LearnsAlone
    idle: ClassVar[frozenset[str]] = DECIDING

    def learn(  # noqa: D102
        self, fusion: Fusion, examples: Mapping[str, Sequence[Any]], dev: Examples | None, run: Run
    ) -> FitResult:
        results, records = [], {}
        fusion.set_method(fusion.method)
        prepared = {name: prepare(fusion, own, None, run.config) for name, own in examples.items()}
        digests = {name: data.digest for name, data in prepared.items()}
        if not run.resume:
            run.processes.ask(lambda: remove_checkpoints(run.directory))
        for position, (name, data) in enumerate(prepared.items()):
            reports = None if run.reports is None else run.reports / name
            cell = dataclasses.replace(run, directory=run.directory / f"expert-{position}", reports=reports)
            # A finished cell holds the experts before it too: all data must be as they were.
            identity = {**identity_of(fusion, data, cell), "data": digests, "expert": name}
            result = load_finished(fusion, identity, cell.directory) if run.resume else None
            if result is None:
                label = f"fitting {name} on its own data ({position + 1}/{len(examples)})"
                with _expert(fusion, position):
                    result = fit_gates(fusion, data, cell, label, fresh=False)
                run.processes.ask(functools.partial(keep_finished, fusion, identity, result, cell.directory))
            results.append(result)
            records[name] = self.record(run.config, data, result)
        fusion.training_record = {"experts": records}
        losses = [result.train_loss for result in results if result.train_loss is not None]
        return FitResult(
            steps=sum(result.steps for result in results),
            train_loss=sum(losses) / len(losses),
            kept_step=results[-1].kept_step,
            seconds=sum(result.seconds for result in results),
            truncated=[origin for result in results for origin in result.truncated],
            log=[entry for result in results for entry in result.log],
        )


@contextlib.contextmanager
def _expert(fusion: Fusion, position: int) -> Iterator[None]:
    gates = [cast(LearnsAlone, gate) for gate in fusion.gates.values()]
    try:
        for gate in gates:
            gate.expert = position
        yield
    finally:
        for gate in gates:
            gate.expert = None

"""Fitting what a method learns, once or for each setting of a grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from loraflow.core.fusion import Fusion
from loraflow.errors import LoraflowError, MethodError, TrainingError
from loraflow.examples import parse_examples
from loraflow.training.checkpoints import identity_of, keep_finished, load_finished, remove_checkpoints, run_directory
from loraflow.training.config import FitConfig, FitResult, Run, Score, search_grid
from loraflow.training.data import note_endings, prepare
from loraflow.training.learners import learner_of
from loraflow.training.learners.base import Examples, Learner
from loraflow.training.loss import check_score


def fit(
    model: Fusion,
    examples: Examples | Mapping[str, Examples],
    *,
    dev: Examples | None = None,
    config: FitConfig | None = None,
    score: Score | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reports: str | Path | None = None,
    console: Console | None = None,
) -> FitResult:
    """Learn what a fused model's method learns; base and adapters stay as they are.

    Args:
        model: the fused model; its gates are changed in place.
        examples: training examples of the task, `{"prompt", "completion"}` or `{"messages"}`; for methods that learn
            from the adapters' own data, such examples of each adapter, by its name.
        dev: examples on which the best checkpoint is chosen; without them, the last one is kept.
        config: the recipe; by default the method's own.
        score: choose by the mean of this over generated answers to the dev examples, not by their loss.
        checkpoints: directory for checkpoints; a temporary one by default.
        resume: go on from the newest whole checkpoint there.
        overwrite: start over where there is an interrupted run.
        reports: directory for files of `config.report_to`, and the picture of the weights; by default one in `runs`.
        console: where progress is shown; standard error by default.

    Returns:
        Losses, time, and which examples were cut.

    Raises:
        LoraflowError: if `score` comes without `dev`, or there is a run and nothing is said of it, or the other way.
        StorageError: if another fit is running there.
        TrainingError: if the training diverges; the model has the last good gates then, and so has `last-good` among
            the checkpoints.
    """
    model.attachment.check_attached()
    learner = learner_of(model.method)
    if score is not None and dev is None:
        raise LoraflowError("Choosing by a score needs dev examples. Give `dev`.")
    learner.check_method(model)
    read = learner.check_examples(model, examples, dev)
    _note_endings(model, read)
    config, console = config or FitConfig.for_method(model.method), console or Console(stderr=True)
    files, lasting = Path(reports) if reports is not None else None, checkpoints is not None
    with run_directory(checkpoints, resume=resume, overwrite=overwrite) as directory, model.learning():
        run = Run(config, directory, resume, console, score, reports=files, lasting=lasting)
        return learner.learn(model, read, dev, run)


def search(
    model: Fusion,
    examples: Examples,
    *,
    dev: Examples,
    config: FitConfig | None = None,
    grid: Sequence[Mapping[str, Any]] | None = None,
    score: Score | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reports: str | Path | None = None,
    console: Console | None = None,
) -> FitResult:
    """Fit once for each setting of a grid; keep the gates that are best on the dev examples.

    Args:
        model: the fused model; its gates are changed in place.
        examples: training examples.
        dev: the examples that decide.
        config: the recipe that the grid's settings change.
        grid: settings, as fields of `FitConfig`; by default the method's learning rate and a tenth of it, with batches
            of 2, 4 and 8: the paper's grid, for its method.
        score: decide by the mean of this over generated answers, not by the loss.
        checkpoints: directory for checkpoints and finished settings; a temporary one by default.
        resume: keep finished settings there, and go on with the interrupted one.
        overwrite: start over where there is an interrupted search.
        reports: directory for files of `config.report_to`, in a folder for each setting; by default one in `runs`.
        console: where progress is shown; standard error by default.

    Returns:
        The best setting's result, with all settings' dev results in `search`.

    Raises:
        LoraflowError: if no setting gave a finite result.
        MethodError: if the method does not learn by gradient on examples of a task.
    """
    model.attachment.check_attached()
    learner = learner_of(model.method) if model.method.learns is not None else None
    if learner is None or not learner.has_grid:
        raise MethodError(
            f"The grid is of learning rates and batch sizes, and the method {model.method.name!r} does not learn by "
            "gradient on examples of a task. Fit it without a search."
        )
    learner.check_method(model)
    read = learner.check_examples(model, examples, dev)
    _note_endings(model, read)
    check_score(score, parse_examples(dev))
    config, console = config or FitConfig.for_method(model.method), console or Console(stderr=True)
    grid = search_grid(model.method) if grid is None else grid
    table: list[dict[str, Any]] = []
    best: tuple[FitResult, dict[str, Tensor], dict[str, Any] | None] | None = None
    with run_directory(checkpoints, resume=resume, overwrite=overwrite) as root, model.learning():
        if not resume:
            remove_checkpoints(root)
        for number, setting in enumerate(grid, start=1):
            cell = "-".join(f"{key}={value}" for key, value in setting.items())
            named = ", ".join(f"{key} {value}" for key, value in setting.items())
            label = f"search {number}/{len(grid)}, {named}"
            files = Path(reports) / cell if reports is not None else None
            run = Run(
                dataclasses.replace(config, **setting),
                root / cell,
                resume,
                console,
                score,
                label,
                files,
                checkpoints is not None,
            )
            result, record = _fit_cell(learner, model, read, dev, run)
            table.append({**setting, "dev_loss": result.dev_loss, "dev_score": result.dev_score})
            merit = _merit(result, score)
            # What is not finite is no result, were it the only one.
            if math.isfinite(merit) and (best is None or merit > _merit(best[0], score)):
                best = result, {name: value.clone() for name, value in model.state_dict().items()}, record
        if best is None:
            model.set_method(model.method)
            raise LoraflowError(
                f"None of the {len(grid)} settings gave a finite result on the dev examples: the training diverged in "
                "all of them. Try lower learning rates, and look for NaN in the data and the base's precision."
            )
        result, gates, record = best
        model.load_state_dict(gates)
        model.training_record = {**(record or {}), "search": table}
    return dataclasses.replace(result, search=table)


def _note_endings(model: Fusion, examples: Examples | Mapping[str, Examples]) -> None:
    for several in examples.values() if isinstance(examples, Mapping) else [examples]:
        note_endings(model, parse_examples(several))


def _fit_cell(
    learner: Learner, model: Fusion, examples: Any, dev: Examples, run: Run
) -> tuple[FitResult, dict[str, Any] | None]:
    """Fit one setting, or take it from where it is finished; its gates are the model's then."""
    data = prepare(model, examples, dev, run.config)
    identity = identity_of(model, data, run)
    result = load_finished(model, identity, run.directory) if run.resume else None
    if result is not None:
        record: dict[str, Any] | None = learner.record(run.config, data, result)
    else:
        try:
            result = learner.learn(model, examples, dev, run)
        except TrainingError as error:
            # Of a grid, some may diverge: the others are what it is for.
            run.console.print(f"{run.label}: {error}", markup=False, soft_wrap=True)
            result = FitResult(dev_loss=math.inf, dev_score=None if run.score is None else -math.inf)
        record = model.training_record
        keep_finished(model, identity, result, run.directory)
    scored = f", score {_merit(result, run.score):.4f}" if run.score is not None else ""
    run.console.print(f"{run.label}: dev loss {-_merit(result, None):.4f}{scored}")
    return result, record


def _merit(result: FitResult, score: Score | None) -> float:
    """How good a result is on the dev examples: its score, or else minus its loss."""
    value = result.dev_score if score is not None else result.dev_loss
    assert value is not None
    return value if score is not None else -value

"""Learning what a method learns: by gradient, with resume and grid search, or as `training.other_ways` does."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console

from loraflow.errors import DataError, LoraflowError, MethodError, did_you_mean
from loraflow.examples import parse_examples
from loraflow.methods.base import FITTING
from loraflow.training.config import FitConfig, FitResult, search_grid
from loraflow.training.loss import mean_loss
from loraflow.training.other_ways import fit_samples, search_weights
from loraflow.training.run import (
    Examples,
    RunData,
    Score,
    check_score,
    identity_of,
    keep_finished,
    load_finished,
    make_scorer,
    prepare,
    remove_checkpoints,
    run_trainer,
    training_record,
)

if TYPE_CHECKING:
    from loraflow.model import FusedModel


def fit(
    model: FusedModel,
    examples: Examples | Mapping[str, Examples],
    *,
    dev: Examples | None = None,
    config: FitConfig | None = None,
    score: Score | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
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
        resume: go on from the newest whole checkpoint there, if there is one.
        console: where progress is shown; standard error by default.

    Returns:
        Losses, time, and which examples were cut.

    Raises:
        DataError: if the examples are not what the method learns from.
        LoraflowError: if `score` comes without `dev`, or a resumed run differs from the interrupted one.
        MethodError: if the method learns nothing.
    """
    method = model.method
    config = config or FitConfig.for_method(method)
    console = console or Console(stderr=True)
    if method.learns is None:
        raise MethodError(f"The method {method.name!r} learns nothing: there is nothing to fit. Use it as it is.")
    if score is not None and dev is None:
        raise LoraflowError("Choosing by a score needs dev examples. Give `dev`.")
    _check_fitting(model)
    with contextlib.ExitStack() as stack:
        directory = Path(checkpoints or stack.enter_context(tempfile.TemporaryDirectory()))
        if method.learns in ("experts", "samples"):
            own = _own_examples(model, examples, dev)
            if method.learns == "experts":
                return _fit_experts(model, own, config, directory, resume, console)
            return fit_samples(model, own, console)
        if isinstance(examples, Mapping):
            raise DataError(f"The method {method.name!r} learns from examples of the task. Give a list of them.")
        data = prepare(model, examples, dev, config)
        if score is not None:
            check_score(score, data.dev_examples)
        if method.learns == "search":
            identity = identity_of(model, data, config, score)
            result = search_weights(model, data.train, identity, config, directory, resume, console)
            result = _with_dev(model, data, config, score, result)
        else:
            result = run_trainer(model, data, config, score, directory, resume, console, "fitting gates")
    model.training_record = training_record(config, data, result)
    return result


def _check_fitting(model: FusedModel) -> None:
    """Check that a method, perhaps of another package, has what its way to learn needs.

    Raises:
        MethodError: if it has not.
    """
    method = model.method
    if method.learns not in FITTING:
        raise MethodError(
            f"The method {method.name!r} learns by {method.learns!r}. {did_you_mean(str(method.learns), FITTING)}"
        )
    of_method, of_gates = FITTING[method.learns]
    gates = [] if of_gates is None else [(gate, of_gates) for gate in model.gates.values()]
    for thing, needed in [*gates, *([] if of_method is None else [(method, of_method)])]:
        if not isinstance(thing, needed):
            raise MethodError(
                f"The method {method.name!r} learns by {method.learns!r}, for which its {type(thing).__name__} must be "
                f"as `loraflow.methods.base.{needed.__name__}` says. Add what is missing."
            )


def _own_examples(model: FusedModel, examples: Any, dev: Any) -> dict[str, Sequence[Any]]:
    """Each adapter's own examples, in the adapters' order.

    Raises:
        DataError: if they are not given by adapter, or dev examples are given.
    """
    name = model.method.name
    if dev is not None:
        raise DataError(f"The method {name!r} learns from the adapters' own data, not from a task. Leave `dev` out.")
    if not isinstance(examples, Mapping):
        raise DataError(
            f"The method {name!r} learns from each adapter's own data. Give examples by adapter name: "
            f"{{{', '.join(f'{adapter!r}: [...]' for adapter in model.adapter_names)}}}."
        )
    for adapter in examples:
        if adapter not in model.adapter_names:
            raise DataError(
                f"Examples are given for the unknown adapter {adapter!r}. {did_you_mean(adapter, model.adapter_names)}"
            )
    missing = [adapter for adapter in model.adapter_names if adapter not in examples]
    if missing:
        raise DataError(f"The method {name!r} learns from each adapter's own data; there is none for {missing[0]!r}.")
    return {adapter: examples[adapter] for adapter in model.adapter_names}


def _fit_experts(
    model: FusedModel,
    examples: Mapping[str, Sequence[Any]],
    config: FitConfig,
    directory: Path,
    resume: bool,
    console: Console,
) -> FitResult:
    """Train each adapter's part of the gates on its own data, with no other adapter at work."""
    results, records = [], {}
    model.set_method(model.method)
    prepared = {name: prepare(model, own, None, config) for name, own in examples.items()}
    digests = {name: data.digest for name, data in prepared.items()}
    if not resume:
        remove_checkpoints(directory)
    for position, (name, data) in enumerate(prepared.items()):
        cell = directory / f"expert-{position}"
        # A finished cell holds the experts before it too: all data must be as they were.
        identity = {**identity_of(model, data, config, None), "data": digests, "expert": name}
        result = load_finished(model, identity, cell) if resume else None
        if result is None:
            label = f"fitting {name} on its own data ({position + 1}/{len(examples)})"
            with _expert(model, position):
                result = run_trainer(model, data, config, None, cell, resume, console, label, fresh=False)
            keep_finished(model, identity, result, cell)
        results.append(result)
        records[name] = training_record(config, data, result)
    model.training_record = {"experts": records}
    losses = [result.train_loss for result in results if result.train_loss is not None]
    return FitResult(
        start={},
        start_losses={},
        steps=sum(result.steps for result in results),
        train_loss=sum(losses) / len(losses),
        dev_loss=None,
        dev_score=None,
        kept_step=results[-1].kept_step,
        seconds=sum(result.seconds for result in results),
        truncated=[origin for result in results for origin in result.truncated],
        log=[entry for result in results for entry in result.log],
    )


@contextlib.contextmanager
def _expert(model: FusedModel, position: int) -> Iterator[None]:
    gates = [cast(Any, gate) for gate in model.gates.values()]
    try:
        for gate in gates:
            gate.expert = position
        yield
    finally:
        for gate in gates:
            gate.expert = None


def _with_dev(model: FusedModel, data: RunData, config: FitConfig, score: Score | None, result: FitResult) -> FitResult:
    """A result with the loss, and the score, on the dev examples, where there are some."""
    if data.dev is None:
        return result
    dev_score = None if score is None else make_scorer(model, data.dev_examples, config, score)()
    return dataclasses.replace(result, dev_loss=mean_loss(model, data.dev, config.batch_size), dev_score=dev_score)


def search(
    model: FusedModel,
    examples: Examples,
    *,
    dev: Examples,
    config: FitConfig | None = None,
    grid: Sequence[Mapping[str, Any]] | None = None,
    score: Score | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
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
        console: where progress is shown; standard error by default.

    Returns:
        The best setting's result, with all settings' dev results in `search`.

    Raises:
        MethodError: if the method does not learn by gradient on examples of a task.
    """
    config = config or FitConfig.for_method(model.method)
    console = console or Console(stderr=True)
    if model.method.learns != "gradient":
        raise MethodError(
            f"The grid is of learning rates and batch sizes, and the method {model.method.name!r} does not learn by "
            "gradient on examples of a task. Fit it without a search."
        )
    grid = search_grid(model.method) if grid is None else grid
    if score is not None:
        check_score(score, parse_examples(dev))
    table: list[dict[str, Any]] = []
    best: tuple[float, FitResult, dict[str, torch.Tensor], dict[str, Any]] | None = None
    with contextlib.ExitStack() as stack:
        root = Path(checkpoints or stack.enter_context(tempfile.TemporaryDirectory()))
        for number, setting in enumerate(grid, start=1):
            cell = dataclasses.replace(config, **setting)
            directory = root / "-".join(f"{key}={value}" for key, value in setting.items())
            data = prepare(model, examples, dev, cell)
            label = f"search {number}/{len(grid)}, " + ", ".join(f"{key} {value}" for key, value in setting.items())
            identity = identity_of(model, data, cell, score)
            result = load_finished(model, identity, directory) if resume else None
            if result is None:
                result = run_trainer(model, data, cell, score, directory, resume, console, label)
                keep_finished(model, identity, result, directory)
            merit = result.dev_score if score is not None else -_known(result.dev_loss)
            console.print(
                f"{label}: dev loss {_known(result.dev_loss):.4f}" + (f", score {merit:.4f}" if score else "")
            )
            table.append({**setting, "dev_loss": result.dev_loss, "dev_score": result.dev_score})
            if best is None or _known(merit) > best[0]:
                gates = {name: value.clone() for name, value in model.state_dict().items()}
                best = (_known(merit), result, gates, training_record(cell, data, result))
    assert best is not None
    model.load_state_dict(best[2])
    model.training_record = {**best[3], "search": table}
    return dataclasses.replace(best[1], search=table)


def _known(value: float | None) -> float:
    assert value is not None
    return value

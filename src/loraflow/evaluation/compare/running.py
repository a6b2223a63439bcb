"""A comparison in a directory: measured where it was left, or its answers scored anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml
from rich.console import Console

from loraflow.bases import BaseOptions, read_base_config
from loraflow.errors import LoraflowError, SandboxError
from loraflow.evaluation.compare.comparison import Comparison, open_comparison, unfinished
from loraflow.evaluation.compare.measure import score_again
from loraflow.evaluation.compare.plan import Plan
from loraflow.evaluation.compare.store import PLAN_FILE, Store
from loraflow.evaluation.compare.workers import Options, measure_cells
from loraflow.evaluation.harness.evaluate import check_task
from loraflow.evaluation.sandbox import check_available
from loraflow.files import alone, write_atomically


def compare(
    plan: Plan,
    output: str | Path,
    *,
    options: Options | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Measure every cell of a plan that is not finished yet.

    Args:
        plan: what to compare.
        output: directory of the run; cells that are finished there are kept.
        options: how to run it.
        overwrite: measure cells anew that were measured otherwise.
        console: where progress is shown; standard error by default.

    Returns:
        How many cells failed; what they said was printed.

    Raises:
        LoraflowError: if the plan is wrong, or cells there were measured otherwise and `overwrite` is not given.
    """
    options = options or Options()
    console = console or Console(stderr=True)
    comparison = open_comparison(plan, allow_code=options.allow_code)
    _check_tasks(comparison, options.allow_code)
    read_base_config(comparison.setting.base, BaseOptions(comparison.setting.revision))
    store = Store(output)
    with alone(store.root, "comparison"):
        missing = unfinished(comparison, store, overwrite=overwrite)
        text = yaml.safe_dump(plan.model_dump(mode="json", exclude_defaults=True), allow_unicode=True, sort_keys=False)
        write_atomically(store.root / PLAN_FILE, text.encode())
        finished = len(comparison.cells) - len(missing)
        for reason in comparison.left_out:
            console.print(f"left out: {reason}", markup=False)
        console.print(f"{len(comparison.cells)} cells, {finished} of them finished before")
        return measure_cells(comparison, missing, store, options, console) if missing else 0


def _check_tasks(comparison: Comparison, allow_code: bool) -> None:
    """Refuse tasks that there are not, and those that run code unless that is allowed and can be done safely.

    Raises:
        SandboxError: if one runs code and may not.
    """
    runs_code = False
    for name in dict.fromkeys(cell.task for cell in comparison.cells):
        task = comparison.setting.tasks[name]
        if task.runs_code and not allow_code:
            raise SandboxError(f"The task {name!r} runs generated code. Say `allow_code=True`, or leave it out.")
        runs_code |= task.runs_code
        if task.harness is not None:
            runs_code |= check_task(task.harness.name, allow_code=allow_code, include_path=task.harness.folder)
    if runs_code:
        check_available()


def rescore(plan: Plan, output: str | Path, *, allow_code: bool = False) -> int:
    """Score the kept answers of all finished cells anew, without a model.

    Returns:
        In how many cells a score changed.

    Raises:
        LoraflowError: if there are no finished cells.
    """
    comparison = open_comparison(plan, allow_code=allow_code)
    _check_tasks(comparison, allow_code)
    store, changed, found = Store(output), 0, 0
    with alone(store.root, "comparison"):
        for cell in comparison.cells:
            record = store.read(cell)
            if record is None:
                continue
            found += 1
            items = store.read_items(cell)
            task = comparison.setting.tasks[cell.task]
            if record.identity.get("problems") != task.test_digest(plan.limit) or len(items) != len(record.scores):
                raise LoraflowError(
                    f"{store.answers_path(cell)} holds answers to other problems than the plan's. Give the plan and "
                    "the limit that they were measured with, or measure them anew."
                )
            new = score_again(task, items, record.metric, allow_code=allow_code)
            changed += new != items
            decided = [item.scores[record.metric] for item in new]
            store.write(dataclasses.replace(record, scores=decided), new)
    if not found:
        raise LoraflowError(f"{store.root} has no finished cells of this plan. Run it first.")
    return changed

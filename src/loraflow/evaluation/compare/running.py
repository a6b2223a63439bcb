"""A comparison in a directory: measured where it was left, or its answers scored anew."""

from __future__ import annotations

import dataclasses
import multiprocessing
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from loraflow.bases import BaseOptions, read_base_config
from loraflow.errors import LoraflowError
from loraflow.evaluation.compare.cluster import measure_on_cluster
from loraflow.evaluation.compare.comparison import Comparison, check_tasks, open_comparison, unfinished
from loraflow.evaluation.compare.measure import score_again
from loraflow.evaluation.compare.options import Options
from loraflow.evaluation.compare.plan import Plan
from loraflow.evaluation.compare.progress import Board
from loraflow.evaluation.compare.store import PLAN_FILE, Cell, Store
from loraflow.evaluation.compare.workers import Job, measure_here, measure_in_processes
from loraflow.files import alone, write_atomically

# Answers to a task of lm-evaluation-harness, as far as the progress bar knows before the task is loaded.
_HARNESS_GUESS = 100


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
    check_tasks(comparison, options.allow_code)
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
        return _measure(comparison, missing, store, options, console) if missing else 0


def _measure(comparison: Comparison, missing: Job, store: Store, options: Options, console: Console) -> int:
    """Measure cells and keep what they come to.

    Returns:
        How many failed.
    """
    jobs: dict[tuple[str, str, int | None], dict[Cell, Mapping[str, Any]]] = {}
    for cell, identity in missing.items():
        jobs.setdefault((comparison.learned_on(cell), cell.method, cell.seed), {})[cell] = identity
    events: Any = multiprocessing.get_context("spawn").Queue() if options.workers > 1 else queue.SimpleQueue()
    board = Board({cell: _size(comparison, cell) for cell in missing}, console)
    watcher = threading.Thread(target=board.watch, args=(events,), daemon=True)
    with board:
        watcher.start()
        try:
            measure = measure_here if options.workers == 1 else measure_in_processes
            if options.cluster is not None:
                measure = measure_on_cluster
            measure(comparison, list(jobs.values()), store, options, events)
        finally:
            events.put(None)
            watcher.join(timeout=30)
    return board.failed


def _size(comparison: Comparison, cell: Cell) -> int:
    """How many answers a cell has, as far as that is known."""
    task, limit = comparison.setting.tasks[cell.task], comparison.plan.limit
    return max(1, len(task.test[:limit]) if task.harness is None else limit or _HARNESS_GUESS)


def rescore(plan: Plan, output: str | Path, *, allow_code: bool = False) -> int:
    """Score the kept answers of all finished cells anew, without a model.

    Returns:
        In how many cells a score changed.

    Raises:
        LoraflowError: if there are no finished cells.
    """
    comparison = open_comparison(plan, allow_code=allow_code)
    check_tasks(comparison, allow_code)
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

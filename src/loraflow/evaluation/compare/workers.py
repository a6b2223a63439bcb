"""Measuring cells, in this process or in several at the same time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console

from loraflow.errors import LoraflowError
from loraflow.evaluation.compare.comparison import Comparison, open_comparison
from loraflow.evaluation.compare.measure import answer_task, mean_answer_weights
from loraflow.evaluation.compare.plan import Plan
from loraflow.evaluation.compare.prepare import Bench, prepare
from loraflow.evaluation.compare.progress import Board
from loraflow.evaluation.compare.store import Cell, Record, Store

# Answers to a task of lm-evaluation-harness, as far as the progress bar knows before the task is loaded.
_HARNESS_GUESS = 100

Job = Mapping[Cell, Mapping[str, Any]]
"""Cells that share what was learned, each with its identity, for one worker, one after the other."""


@dataclass(frozen=True)
class Options:
    """How a comparison runs; none of it changes a score.

    Attributes:
        device: cpu, cuda, ...; None is a GPU if there is one.
        workers: processes that measure cells at the same time; with several GPUs, each takes the next one.
        allow_code: whether scorers may run what a model wrote, in the sandbox.
    """

    device: str | None = None
    workers: int = 1
    allow_code: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise LoraflowError(f"`workers` (={self.workers}) must be at least 1.")


def measure_cells(comparison: Comparison, missing: Job, store: Store, options: Options, console: Console) -> int:
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
            if options.workers == 1:
                worker = _Worker(comparison, store, options, events)
                for job in jobs.values():
                    worker.run(job)
            else:
                _share(comparison.plan, list(jobs.values()), store, options, events)
        finally:
            events.put(None)
            watcher.join(timeout=30)
    return board.failed


def _size(comparison: Comparison, cell: Cell) -> int:
    """How many answers a cell has, as far as that is known."""
    task, limit = comparison.setting.tasks[cell.task], comparison.plan.limit
    return max(1, len(task.test[:limit]) if task.harness is None else limit or _HARNESS_GUESS)


def _share(plan: Plan, jobs: Sequence[Job], store: Store, options: Options, events: Any) -> None:
    """Let several processes do the jobs."""
    threads = max(1, torch.get_num_threads() // options.workers)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(options.workers, len(jobs)),
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(plan, store, options, events, threads, os.getpid()),
    )
    try:
        for future in concurrent.futures.as_completed([pool.submit(_run_in_worker, job) for job in jobs]):
            future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise LoraflowError(
            "A worker ended without a word: it may have been killed for want of memory. Give the same command again, "
            "with fewer workers; what is finished is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: _Worker | None = None


def _start_worker(plan: Plan, store: Store, options: Options, events: Any, threads: int, parent: int) -> None:
    global _worker
    # The parent says who it is: it may be gone by now, and somebody else this process's parent.
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.device is None and torch.cuda.device_count() > 1:
        number = int(multiprocessing.current_process().name.rpartition("-")[2]) - 1
        options = dataclasses.replace(options, device=f"cuda:{number % torch.cuda.device_count()}")
    _worker = _Worker(open_comparison(plan, allow_code=options.allow_code), store, options, events)


def _end_with_parent(parent: int) -> None:
    # A parent that is killed cannot tell its workers, which would go on writing to a run that somebody resumes.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_in_worker(job: Job) -> None:
    assert _worker is not None
    _worker.run(job)


class _Worker:
    """Measures cells, with the base model loaded once."""

    def __init__(self, comparison: Comparison, store: Store, options: Options, events: Any) -> None:
        self._comparison = comparison
        self._store = store
        self._allow_code = options.allow_code
        self._events = events
        self._bench = Bench(comparison.setting, options.device)

    def run(self, job: Job) -> None:
        """Measure the cells of one job; one that fails does not keep the others from being measured."""
        for cell, identity in job.items():
            try:
                self._events.put(("start", cell, 0))
                record = self._measure(cell, identity)
            except Exception:
                self._events.put(("failed", cell, traceback.format_exc()))
            else:
                mean = 100 * sum(record.scores) / len(record.scores)
                learned = f"{record.fit_s:.0f} s to learn, " if record.examples else ""
                said = f"{record.metric} {mean:.1f} %; {learned}{record.answer_s:.0f} s to answer"
                self._events.put(("done", cell, said))

    def _measure(self, cell: Cell, identity: Mapping[str, Any]) -> Record:
        row = self._comparison.rows[cell.method]
        task, plan = self._comparison.setting.tasks[cell.task], self._comparison.plan
        directory = self._store.learned_path(cell.method, self._comparison.learned_on(cell), cell.seed)

        def say(text: str) -> None:
            self._events.put(("learning", cell, text))

        def progress(done: int, total: int) -> None:
            self._events.put(("answered", cell, (done, total)))

        model, learned = prepare(self._bench, row, task, cell.seed, directory, say)
        self._events.put(("answering", cell, 0))
        record = self._store.read(cell)
        if record is not None:
            # All but its weights, which nobody asked for before.
            items = self._store.read_items(cell)
            record = dataclasses.replace(record, weights=mean_answer_weights(model, task, items))
        else:
            items, measured = answer_task(
                model,
                task,
                limit=plan.limit,
                batch_size=plan.batch_size,
                allow_code=self._allow_code,
                progress=progress,
            )
            record = Record(
                cell=cell,
                identity=identity,
                scores=[item.scores[measured["metric"]] for item in items],
                fitted_on=row.spec.fitted_on,
                weights=mean_answer_weights(model, task, items) if plan.weights else None,
                **learned,
                **measured,
            )
        self._store.write(record, items)
        return record

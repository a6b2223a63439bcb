"""Measuring cells on one machine, in this process or in several at the same time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from loraflow.errors import LoraflowError
from loraflow.evaluation.compare.comparison import Comparison, open_comparison
from loraflow.evaluation.compare.measure import answer_task, weigh_answers
from loraflow.evaluation.compare.options import Options
from loraflow.evaluation.compare.plan import Plan
from loraflow.evaluation.compare.prepare import Bench, prepare
from loraflow.evaluation.compare.store import Cell, Record, Store

Job = Mapping[Cell, Mapping[str, Any]]
"""Cells that share what was learned, each with its identity, for one worker, one after the other."""


def measure_here(comparison: Comparison, jobs: Sequence[Job], store: Store, options: Options, events: Any) -> None:
    """Do jobs one after the other, in this process."""
    worker = Worker(comparison, store, options, events)
    for job in jobs:
        worker.run(job)


def measure_in_processes(
    comparison: Comparison, jobs: Sequence[Job], store: Store, options: Options, events: Any
) -> None:
    """Let several processes of this machine do jobs.

    Raises:
        LoraflowError: if one of them was killed.
    """
    threads = max(1, torch.get_num_threads() // options.workers)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(options.workers, len(jobs)),
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(comparison.plan, store, options, events, threads, os.getpid()),
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


_worker: Worker | None = None


def _start_worker(plan: Plan, store: Store, options: Options, events: Any, threads: int, parent: int) -> None:
    global _worker
    # The parent says who it is: it may be gone by now, and somebody else this process's parent.
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    be_quiet()
    if options.device is None and torch.cuda.device_count() > 1:
        number = int(multiprocessing.current_process().name.rpartition("-")[2]) - 1
        options = dataclasses.replace(options, device=f"cuda:{number % torch.cuda.device_count()}")
    _worker = Worker(open_comparison(plan, allow_code=options.allow_code), store, options, events)


def _end_with_parent(parent: int) -> None:
    # A parent that is killed cannot tell its workers, which would go on writing to a run that somebody resumes.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_in_worker(job: Job) -> None:
    assert _worker is not None
    _worker.run(job)


def be_quiet() -> None:
    """Keep transformers from writing between the lines of several workers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def outcome(record: Record) -> str:
    """What a finished cell came to, in a line."""
    mean = 100 * sum(record.scores) / len(record.scores)
    learned = f"{record.fit_s:.0f} s to learn, " if record.examples else ""
    return f"{record.metric} {mean:.1f} %; {learned}{record.answer_s:.0f} s to answer"


class Worker:
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
                self._events.put(("done", cell, outcome(record)))

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
            record = dataclasses.replace(record, **weigh_answers(model, task, items))
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
                **(weigh_answers(model, task, items) if plan.weights else {}),
                **learned,
                **measured,
            )
        self._store.write(record, items)
        return record

"""Methods x tasks x seeds in one run, that goes on where it was interrupted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from filelock import FileLock, Timeout
from rich.console import Console

from loraflow.adapters import load_adapter
from loraflow.bases import BaseOptions, read_base_config
from loraflow.errors import DataError, LoraflowError, SandboxError
from loraflow.evaluation.compare.contenders import Bench, Contender, Prepared, prepare
from loraflow.evaluation.compare.measure import Measured, answer_task, mean_answer_weights, score_again
from loraflow.evaluation.compare.plan import EVERY_TASK, Plan
from loraflow.evaluation.compare.progress import Board
from loraflow.evaluation.compare.store import Cell, Record, Store
from loraflow.evaluation.compare.tasks import Setting, load_setting
from loraflow.evaluation.harness.evaluate import check_task
from loraflow.evaluation.sandbox import check_available
from loraflow.files import make_folder, write_atomically
from loraflow.saved.fusion import SavedFusion

PLAN_FILE = "plan.yaml"
# Answers to a task of lm-evaluation-harness, as far as the progress bar knows before the task is loaded.
_HARNESS_GUESS = 100


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


@dataclass(frozen=True)
class Comparison:
    """A plan with all that it names.

    Attributes:
        plan: the plan.
        setting: its setting, with the problems.
        contenders: the rows, by name; those that are to learn on every task are one for each.
        cells: what is to be measured, task by task.
        left_out: why rows are missing in some tasks where they cannot be.
    """

    plan: Plan
    setting: Setting
    contenders: Mapping[str, Contender]
    cells: Sequence[Cell]
    left_out: Sequence[str] = ()

    @property
    def reference(self) -> str:
        """The row that the others are tested against."""
        named = self.plan.reference
        return named if named is not None and named in self.contenders else list(self.contenders)[-1]


def open_comparison(plan: Plan, *, allow_code: bool = False) -> Comparison:
    """Read all that a plan names, and find out what is wrong with it before anything is measured.

    Args:
        plan: the plan.
        allow_code: whether scorers may run what a model wrote, in the sandbox.

    Returns:
        The comparison.

    Raises:
        DataError: if a row cannot be measured on one of the tasks.
        LoraflowError: if something else in the plan is wrong.
    """
    # Rows may learn on tasks that are not answered.
    sources = {s.fitted_on for s in plan.methods.values() if s.fitted_on not in (None, EVERY_TASK)}
    names = None if plan.tasks is None else [*plan.tasks, *sorted(sources - set(plan.tasks))]
    setting = load_setting(plan.setting, tasks=names, allow_code=allow_code)
    tasks = plan.tasks or list(setting.tasks)
    contenders = {c.name: c for name, spec in plan.methods.items() for c in _contenders(name, spec, setting, tasks)}
    cells: list[Cell] = []
    left_out: list[str] = []
    for task in tasks:
        for contender in contenders.values():
            try:
                contender.check(setting.tasks[task])
            except DataError as error:
                if not contender.spec.if_possible:
                    raise
                left_out.append(f"{contender.name} on {task}: {error}")
                continue
            seeds = plan.seeds if contender.seeded(setting.tasks[task]) else [None]
            cells.extend(Cell(task, contender.name, seed) for seed in seeds)
    return Comparison(plan, setting, contenders, cells, left_out)


def _contenders(name: str, spec: Any, setting: Setting, tasks: Sequence[str]) -> Iterator[Contender]:
    if spec.fitted_on != EVERY_TASK:
        yield Contender(name, spec, setting)
        return
    for task in tasks:
        yield Contender(f"{name} of {task}", spec.model_copy(update={"fitted_on": task}), setting)


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
    wanted = identities(comparison)
    store = Store(output)
    make_folder(store.root)
    with _alone(store.root):
        missing = _unfinished(wanted, store, overwrite=overwrite, weights=plan.weights)
        text = yaml.safe_dump(plan.model_dump(mode="json", exclude_defaults=True), allow_unicode=True, sort_keys=False)
        write_atomically(store.root / PLAN_FILE, text.encode())
        finished = len(comparison.cells) - len(missing)
        for reason in comparison.left_out:
            console.print(f"left out: {reason}", markup=False)
        console.print(f"{len(comparison.cells)} cells, {finished} of them finished before")
        return _measure_all(comparison, missing, store, options, console) if missing else 0


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


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LoraflowError(f"Another comparison is running in {root}. Wait for it, or give another place.") from error
    try:
        yield
    finally:
        lock.release()


# What there is to do.


def identities(comparison: Comparison) -> dict[Cell, dict[str, Any]]:
    """What makes each cell the measurement that it is, as JSON values."""
    setting, plan = comparison.setting, comparison.plan
    digests: dict[str, str] = {}
    tests = {name: task.test_digest(plan.limit) for name, task in setting.tasks.items()}
    base = setting.base_identity()
    found = {}
    for cell in comparison.cells:
        contender, task = comparison.contenders[cell.method], setting.tasks[cell.task]
        adapters = [] if contender.spec.fusion is not None else contender.adapters(task)
        for name in adapters:
            if name not in digests:
                digests[name] = load_adapter(name, setting.adapters[name]).digest
        fusion = contender.spec.fusion
        found[cell] = {
            "method": contender.spec.short(),
            "base": base,
            "adapters": [[name, digests[name]] for name in adapters],
            "fusion": None if fusion is None else _fusion_identity(fusion),
            "learned": contender.fit_identity(task, cell.seed),
            # Before the problems, of which it decides how many there are: people know it.
            "limit": plan.limit,
            "problems": tests[cell.task],
        }
    return found


def _fusion_identity(fusion: str) -> dict[str, Any]:
    config = SavedFusion.open(fusion).config
    return {
        "adapters": [[adapter.name, adapter.digest] for adapter in config.adapters],
        "method": config.method.model_dump(mode="json"),
        "prompt": config.prompt.model_dump(mode="json"),
        "learned": config.weights_digest,
    }


def _unfinished(
    wanted: Mapping[Cell, Mapping[str, Any]], store: Store, *, overwrite: bool, weights: bool
) -> list[Cell]:
    """The cells that are to be measured, or whose weights are to be recorded.

    Raises:
        LoraflowError: if a finished one was measured otherwise, and may not be replaced.
    """
    missing = []
    for cell, identity in wanted.items():
        record = store.read(cell)
        if record is not None and record.identity != identity:
            if not overwrite:
                known = {**identity, **record.identity}
                key = next(key for key in known if record.identity.get(key) != identity.get(key))
                raise LoraflowError(
                    f"{store.record_path(cell)} was measured with another `{key}`: {_shown(record.identity.get(key))}, "
                    f"not {_shown(identity.get(key))}. Give another directory, or replace such "
                    "cells with `overwrite=True`."
                )
            store.remove(cell)
            record = None
        if record is None or (weights and record.weights is None):
            missing.append(cell)
    return missing


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _jobs(comparison: Comparison, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share what was learned go to one worker, one after the other."""
    jobs: dict[tuple[str, str, int | None], list[Cell]] = {}
    for cell in cells:
        source = _learned_on(comparison, cell)
        jobs.setdefault((source, cell.method, cell.seed), []).append(cell)
    return list(jobs.values())


def _learned_on(comparison: Comparison, cell: Cell) -> str:
    """The task under whose name a cell's contender keeps what it learned."""
    fitted_on = comparison.contenders[cell.method].spec.fitted_on
    return comparison.setting.tasks[fitted_on or cell.task].learns_as


# Measuring.


def _measure_all(
    comparison: Comparison, missing: Sequence[Cell], store: Store, options: Options, console: Console
) -> int:
    jobs = _jobs(comparison, missing)
    events: Any = multiprocessing.get_context("spawn").Queue() if options.workers > 1 else queue.SimpleQueue()
    board = Board({cell: _size(comparison, cell) for cell in missing}, console)
    watcher = threading.Thread(target=board.watch, args=(events,), daemon=True)
    with board:
        watcher.start()
        try:
            if options.workers == 1:
                worker = _Worker(comparison, store, options.device, options.allow_code, events)
                for job in jobs:
                    worker.run(job)
            else:
                _share(comparison.plan, jobs, store, options, events)
        finally:
            events.put(None)
            watcher.join(timeout=30)
    return board.failed


def _size(comparison: Comparison, cell: Cell) -> int:
    """How many answers a cell has, as far as that is known."""
    task, limit = comparison.setting.tasks[cell.task], comparison.plan.limit
    return max(1, len(task.test[:limit]) if task.harness is None else limit or _HARNESS_GUESS)


def _share(plan: Plan, jobs: Sequence[list[Cell]], store: Store, options: Options, events: Any) -> None:
    """Let several processes do the jobs."""
    threads = max(1, torch.get_num_threads() // options.workers)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(options.workers, len(jobs)),
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(plan, store.root, options, events, threads, os.getpid()),
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
_numbers: Any = None


def _start_worker(plan: Plan, root: Path, options: Options, events: Any, threads: int, parent: int) -> None:
    global _worker
    # The parent says who it is: it may be gone by now, and somebody else this process's parent.
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = options.device
    if device is None and torch.cuda.device_count() > 1:
        number = int(multiprocessing.current_process().name.rpartition("-")[2]) - 1
        device = f"cuda:{number % torch.cuda.device_count()}"
    comparison = open_comparison(plan, allow_code=options.allow_code)
    _worker = _Worker(comparison, Store(root), device, options.allow_code, events)


def _end_with_parent(parent: int) -> None:
    # A parent that is killed cannot tell its workers, which would go on writing to a run that somebody resumes.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_in_worker(job: list[Cell]) -> None:
    assert _worker is not None
    _worker.run(job)


class _Worker:
    """Measures cells, with the base model loaded once."""

    def __init__(self, comparison: Comparison, store: Store, device: str | None, allow_code: bool, events: Any) -> None:
        self._comparison = comparison
        self._store = store
        self._allow_code = allow_code
        self._events = events
        self._bench = Bench(comparison.setting, device)
        self._identities = identities(comparison)

    def run(self, job: Sequence[Cell]) -> None:
        """Measure the cells of one job; one that fails does not keep the others from being measured."""
        for cell in job:
            try:
                self._events.put(("start", cell, 0))
                record = self._measure(cell)
            except Exception:
                self._events.put(("failed", cell, traceback.format_exc()))
            else:
                self._events.put(("done", cell, _line(record)))

    def _measure(self, cell: Cell) -> Record:
        contender = self._comparison.contenders[cell.method]
        task, plan = self._comparison.setting.tasks[cell.task], self._comparison.plan
        directory = self._store.learned_path(cell.method, _learned_on(self._comparison, cell), cell.seed)

        def say(text: str) -> None:
            self._events.put(("learning", cell, text))

        prepared = prepare(self._bench, contender, task, cell.seed, directory, say)
        self._events.put(("answering", cell, 0))
        finished = self._store.read(cell)
        if finished is not None:
            # All but its weights, which nobody asked for before.
            items = self._store.read_items(cell)
            record = dataclasses.replace(finished, weights=mean_answer_weights(prepared.model, task, items))
            self._store.write(record, items)
            return record

        def progress(done: int, total: int) -> None:
            self._events.put(("answered", cell, (done, total)))

        measured = answer_task(
            prepared.model,
            task,
            limit=plan.limit,
            batch_size=plan.batch_size,
            allow_code=self._allow_code,
            progress=progress,
        )
        weights = mean_answer_weights(prepared.model, task, measured.items) if plan.weights else None
        record = _record(cell, self._identities[cell], prepared, measured, contender.spec.fitted_on, weights)
        self._store.write(record, measured.items)
        return record


def _record(
    cell: Cell,
    identity: Mapping[str, Any],
    prepared: Prepared,
    measured: Measured,
    fitted_on: str | None,
    weights: Mapping[str, tuple[float, float]] | None,
) -> Record:
    return Record(
        cell=cell,
        identity=identity,
        metric=measured.metric,
        scores=[item.scores[measured.metric] for item in measured.items],
        learned_parameters=prepared.learned_parameters,
        examples=prepared.examples,
        fit_s=prepared.fit_s,
        answer_s=measured.seconds,
        tokens=measured.tokens,
        memory_mib=measured.memory_mib,
        fitted_on=fitted_on,
        weights=weights,
        details=prepared.details,
        higher_is_better=measured.higher_is_better,
        notice=measured.notice,
    )


def _line(record: Record) -> str:
    mean = sum(record.scores) / len(record.scores)
    learned = f"{record.fit_s:.0f} s to learn, " if record.examples else ""
    return f"{record.metric} {100 * mean:.1f} %; {learned}{record.answer_s:.0f} s to answer"


def rescore(plan: Plan, output: str | Path, *, allow_code: bool = False) -> int:
    """Score the kept answers of all finished cells anew, without a model.

    Args:
        plan: what was compared.
        output: directory of the run.
        allow_code: whether scorers may run what a model wrote, in the sandbox.

    Returns:
        In how many cells a score changed.

    Raises:
        LoraflowError: if there are no finished cells.
    """
    comparison = open_comparison(plan, allow_code=allow_code)
    _check_tasks(comparison, allow_code)
    store, changed, found = Store(output), 0, 0
    with _alone(store.root):
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

"""How well every method does on the small world's six tasks, in one table.

    python benchmarks/world.py --output runs/world.jsonl                     # everything: hours
    python benchmarks/world.py --output runs/world.jsonl --tasks zh-math --methods base average "lora-flow layer"
    python benchmarks/world.py --output runs/world.jsonl --table             # the table of what is there

A cell is one method on one task with one seed. Cells are independent: each is appended to --output when it is finished,
cells that are there are not measured again, and a run that was interrupted goes on. Methods that draw nothing at
random are run once.

The figure is the share of test problems that are right and in the asked language, answered greedily. Test problems
decide nothing: what learns by gradient on a task learns on its 200 training problems and keeps the checkpoint with the
lowest loss on its 100 dev problems. Generated code runs in the sandbox.

Intervals are 95 % bootstrap intervals over problems and seeds jointly. The three tasks of one skill are the same
problems in three languages, and are resampled as such; differences between methods are on the same problems.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from rich.console import Console

import loraflow
from loraflow import FusedModel
from loraflow.demo import run
from loraflow.demo.samples import adapter_samples
from loraflow.demo.tasks import TASKS, Task, load_task
from loraflow.demo.world import adapter_paths, base_path
from loraflow.evaluation.statistics import bootstrap_means, percentile_interval
from loraflow.methods import (
    Arrow,
    Centroid,
    LearnedStatic,
    Logo,
    LoraFlow,
    LoraHub,
    Method,
    Phatgoose,
    QaFlora,
)
from loraflow.training import FitConfig, fit
from loraflow.training.finetune import LoraSettings, finetune

REFERENCE = "lora-flow layer"
# Rank and alpha of most shipped adapters. The rate, with which those were trained too, has the lowest mean dev loss of
# 1e-3, 2e-3 and 5e-3 on zh-math and ru-code, for a new LoRA and the skill adapter (seed 0).
NEW_LORA = LoraSettings(r=8, alpha=16)
FINETUNE_RATE = 2e-3
QUIET = Console(quiet=True)

Prepare = Callable[[FusedModel, Task, int], tuple[FusedModel, dict[str, Any]]]
"""Makes what is measured of a task's model, the task and a seed; also gives what is worth keeping about it."""


# The contenders.


@dataclass(frozen=True)
class Contender:
    """One row of the table: how it is made, and whether its seed matters."""

    prepare: Prepare
    seeded: bool = False


def fused(method: str | Method) -> Contender:
    """A method on the task's two adapters, learned as it learns."""

    def prepare(model: FusedModel, task: Task, seed: int) -> tuple[FusedModel, dict[str, Any]]:
        model.set_method(method)
        return model, learn(model, task, seed)

    return Contender(prepare, getattr(method, "learns", None) in ("gradient", "search", "experts"))


def alone(position: int) -> Contender:
    """One of the task's two adapters: 0 is the language's, 1 the skill's."""

    def prepare(model: FusedModel, task: Task, seed: int) -> tuple[FusedModel, dict[str, Any]]:
        model.set_method(task.adapters[position])
        return model, {}

    return Contender(prepare)


def tuned(position: int | None) -> Contender:
    """A LoRA trained on the task's problems: one of its two adapters further, or a new one."""

    def prepare(model: FusedModel, task: Task, seed: int) -> tuple[FusedModel, dict[str, Any]]:
        start = {"lora": NEW_LORA} if position is None else {"adapter": adapter_paths()[task.adapters[position]]}
        config = FitConfig(learning_rate=FINETUNE_RATE, seed=seed)
        train, dev = run.as_records(task.train), run.as_records(task.dev)
        with tempfile.TemporaryDirectory() as directory:
            result = finetune(base_path(), train, directory, dev=dev, config=config, console=QUIET, **start)
            tuned_model = FusedModel.from_adapters(base_path(), {"tuned": directory}, "tuned")
        return tuned_model, {"dev_loss": result.dev_loss, "kept_step": result.kept_step}

    return Contender(prepare, seeded=True)


def learn(model: FusedModel, task: Task, seed: int) -> dict[str, Any]:
    """Learn what the model's method learns, by its own recipe; gates by the demo's learning rate."""
    method = model.method
    if method.learns is None:
        return {}
    overrides = {"learning_rate": run.RECIPE.learning_rate} if isinstance(method, LoraFlow) else {}
    config = FitConfig.for_method(method, **overrides, seed=seed)
    if method.learns in ("experts", "samples"):
        result = fit(model, {name: adapter_samples(name) for name in task.adapters}, config=config, console=QUIET)
    else:
        dev = run.as_records(task.dev)
        result = fit(model, run.as_records(task.train), dev=dev, config=config, console=QUIET)
    return {"start": dict(result.start), "dev_loss": result.dev_loss, "kept_step": result.kept_step}


CONTENDERS: dict[str, Contender] = {
    "base": fused("base"),
    "language adapter": alone(0),
    "skill adapter": alone(1),
    "average": fused("average"),
    "learned-static task": fused(LearnedStatic(granularity="task")),
    "learned-static layer": fused(LearnedStatic(granularity="layer")),
    "lorahub parameters": fused(LoraHub(mixes="parameters")),
    "lorahub outputs": fused(LoraHub(mixes="outputs")),
    "qa-flora": fused(QaFlora()),
    "logo norm": fused(Logo(score="norm")),
    "logo entropy": fused(Logo(score="entropy")),
    "centroid": fused(Centroid()),
    "arrow": fused(Arrow()),
    "phatgoose": fused(Phatgoose()),
    "lora-flow step": fused(LoraFlow(granularity="step")),
    "lora-flow layer": fused(LoraFlow(granularity="layer")),
    "lora-flow module": fused(LoraFlow(granularity="module")),
    "layer, normalized": fused(LoraFlow(reads="normalized")),
    "layer, low-rank": fused(LoraFlow(reads="normalized", scorer="low-rank")),
    "layer, two-layer": fused(LoraFlow(reads="normalized", scorer="two-layer")),
    "layer, attention": fused(LoraFlow(reads="normalized", scorer="attention")),
    "layer, sigmoid": fused(LoraFlow(activation="sigmoid")),
    "layer, top-1": fused(LoraFlow(top_k=1)),
    "module, normalized": fused(LoraFlow(granularity="module", reads="normalized")),
    "new LoRA": tuned(None),
    "skill adapter, tuned": tuned(1),
    "language adapter, tuned": tuned(0),
}


# Measuring.


@dataclass(frozen=True)
class Cell:
    """One measurement; `seed` is None where it would change nothing."""

    task: str
    method: str
    seed: int | None
    problems: int


def main() -> int:
    """Measure what is missing, and print the table."""
    args = parse_arguments()
    print_setting(args)
    failed = 0 if args.table else measure_all(args)
    print_table(read_results(args.output), args)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--problems", type=int, default=500, help="test problems of each task, at most 500")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, default=Path("runs/world.jsonl"), help="finished cells, one a line")
    parser.add_argument("--table", action="store_true", help="only print the table of the cells that are there")
    args = parser.parse_args()
    if not 1 <= args.problems <= len(load_task(TASKS[0]).test):
        parser.error(f"--problems (={args.problems}) must be between 1 and {len(load_task(TASKS[0]).test)}.")
    return args


def print_setting(args: argparse.Namespace) -> None:
    """Print all that the figures depend on."""
    task = load_task(args.tasks[0])
    print(f"machine: {processor()}, {os.cpu_count()} cores; {args.workers} workers of one thread each")
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, loraflow {loraflow.__version__}"
    )
    print(
        f"{len(task.train)} training, {len(task.dev)} dev, {args.problems} test problems of each task; "
        f"seeds {', '.join(map(str, args.seeds))}"
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure_all(args: argparse.Namespace) -> int:
    """Measure all cells that are not in the output yet; returns how many failed."""
    done = {cell_of(row) for row in read_results(args.output)}
    wanted = [
        Cell(task, method, seed, args.problems)
        for task in args.tasks
        for method in args.methods
        for seed in (args.seeds if CONTENDERS[method].seeded else [None])
    ]
    missing = [cell for cell in wanted if cell not in done]
    print(f"{len(wanted)} cells, {len(wanted) - len(missing)} of them finished before", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    drop_half_line(args.output)
    # Inherited by the workers, before they import torch.
    os.environ["OMP_NUM_THREADS"] = "1"
    started, failed = time.perf_counter(), 0
    pool = concurrent.futures.ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), initializer=start_worker
    )
    futures = {pool.submit(measure, cell): cell for cell in missing}
    try:
        for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            cell, error = futures[future], future.exception()
            where = f"[{number}/{len(missing)}, {time.perf_counter() - started:.0f} s] {cell.task}, {cell.method}"
            where += f", seed {cell.seed}" if cell.seed is not None else ""
            if error is not None:
                failed += 1
                print(f"{where}: FAILED: {''.join(traceback.format_exception(error))}", flush=True)
                continue
            row = future.result()
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            spoken, right = (100 * row[key].count("1") / cell.problems for key in ("spoken", "right"))
            print(
                f"{where}: {spoken:.1f} % right in the language, {right:.1f} % in any; "
                f"{row['prepare_s']:.0f} s to learn, {row['answer_s']:.0f} s to answer",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def start_worker() -> None:
    """One thread, and no chatter."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@functools.lru_cache(maxsize=1)
def task_and_model(name: str) -> tuple[Task, FusedModel]:
    """A task with its model, kept as long as the worker stays with it."""
    task = load_task(name)
    return task, run.load_task_model(task, "base")


def measure(cell: Cell) -> dict[str, Any]:
    """Measure one cell; `right` and `spoken` (right and in the language) have a 0 or 1 for each problem."""
    task, task_model = task_and_model(cell.task)
    started = time.perf_counter()
    model, details = CONTENDERS[cell.method].prepare(task_model, task, cell.seed or 0)
    prepare_s = time.perf_counter() - started
    result = run.evaluate(model, task, cell.method, cell.problems, None, lambda count: None)
    outcomes = {
        key: "".join(str(int(value)) for value in values)
        for key, values in (("right", result.right), ("spoken", result.in_language))
    }
    return {**dataclasses.asdict(cell), **outcomes, "prepare_s": prepare_s, "answer_s": result.seconds, **details}


def read_results(path: Path) -> list[dict[str, Any]]:
    """All finished cells; half a line that a crash left is none."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]


def drop_half_line(path: Path) -> None:
    """Remove what a crash left behind the last whole line."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell of a result."""
    return Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})


# The table.


def print_table(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Print a Markdown table: means over seeds in per cent, each with its interval."""
    resampled = resampled_means(rows, args)
    reference = average_of(resampled.get(REFERENCE, {}), args.tasks)
    print("\n| method | seeds | " + " | ".join(args.tasks) + f" | average | difference to {REFERENCE} |")
    print("|---" * (len(args.tasks) + 4) + "|")
    for method in args.methods:
        mine = resampled.get(method, {})
        if not mine:
            continue
        cells = [estimate(*mine[task][:2]) if task in mine else "" for task in args.tasks]
        average = average_of(mine, args.tasks)
        cells.append(estimate(*average) if average else "")
        if average is None or reference is None or method == REFERENCE:
            cells.append("")
        else:
            cells.append(estimate(average[0] - reference[0], average[1] - reference[1], "+"))
        seeds = sorted({seeds for _, _, seeds in mine.values()})
        cells.insert(0, "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))))
        print(f"| {method} | " + " | ".join(cells) + " |")


Means = tuple[float, np.ndarray, int]
"""A mean, its bootstrap resamples, and the number of seeds."""


def resampled_means(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> dict[str, dict[str, Means]]:
    """By method and task."""
    found: dict[str, dict[str, dict[int | None, list[int]]]] = {}
    for row in rows:
        wanted = row["seed"] is None or row["seed"] in args.seeds
        if wanted and row["problems"] == args.problems and row["task"] in args.tasks:
            spoken = [int(digit) for digit in row["spoken"]]
            found.setdefault(row["method"], {}).setdefault(row["task"], {})[row["seed"]] = spoken
    means: dict[str, dict[str, Means]] = {}
    for method, by_task in found.items():
        for task, by_seed in by_task.items():
            outcomes = np.array(list(by_seed.values()), dtype=float)
            skill = task.partition("-")[2]
            resampled = bootstrap_means(outcomes, problems_seed=number(skill), runs_seed=number(f"{task} {method}"))
            means.setdefault(method, {})[task] = (float(outcomes.mean()), resampled, len(by_seed))
    return means


def average_of(means: Mapping[str, Means], tasks: Sequence[str]) -> tuple[float, np.ndarray] | None:
    """The mean over all tasks; None where one of them is missing."""
    if any(task not in means for task in tasks):
        return None
    return float(np.mean([means[task][0] for task in tasks])), np.mean([means[task][1] for task in tasks], axis=0)


def estimate(mean: float, resampled: np.ndarray, sign: str = "") -> str:
    """A mean and its interval, in per cent."""
    low, high = percentile_interval(resampled)
    return f"{100 * mean:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def number(text: str) -> int:
    """A seed for each text."""
    return zlib.crc32(text.encode())


if __name__ == "__main__":
    sys.exit(main())

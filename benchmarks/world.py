"""How well LoRA-Flow does on the small world's tasks, beside the base, each adapter, their average and static weights.

    python benchmarks/world.py                                    # all six tasks, three seeds
    python benchmarks/world.py --tasks zh-math --seeds 0 1 2 3 4 --granularities layer step module

Static weights are the best of a grid on the dev problems; gates are fitted by the demo's recipe, keeping the best epoch
on the dev problems' loss. Every figure is a percentage of the test problems, answered greedily; the test problems
decide nothing. Generated code runs in the sandbox. Results are appended to --output as they come, and a run that was
interrupted goes on there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console

import loraflow
from loraflow import LoraFlow, Static
from loraflow.demo import run
from loraflow.demo.tasks import TASKS, Problem, Task, load_task
from loraflow.model import FusedModel
from loraflow.training import fit

STATIC_GRID = [(a, b) for b in (0.5, 0.75, 1.0) for a in (0.25, 0.5, 0.75, 1.0)]


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(
        f"machine: {platform.processor() or platform.machine()}, {args.threads} threads; torch {torch.__version__}, ",
        end="",
    )
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, loraflow {loraflow.__version__}")
    print(" ".join(f"{key}={value}" for key, value in vars(args).items()))
    for name in args.tasks:
        measure_task(load_task(name), args)
    report(read_results(args.output), args.tasks)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--granularities", nargs="+", default=["layer"], choices=["step", "layer", "module"])
    parser.add_argument("--problems", type=int, default=500, help="test problems")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("runs/world.jsonl"))
    return parser.parse_args()


def measure_task(task: Task, args: argparse.Namespace) -> None:
    """Measure what is not measured yet of one task, and append it to the results."""
    model = run.load_task_model(task)
    done = {(row["task"], row["model"], row["seed"]) for row in read_results(args.output)}

    def measure(label: str, prepare: Callable[[], dict[str, Any]], seed: int | None = None) -> None:
        if (task.name, label, seed) in done:
            return
        started = time.perf_counter()
        details = prepare()
        ready = time.perf_counter() - started
        row = {"task": task.name, "model": label, "seed": seed, "seconds": ready, **details}
        row |= shares(model, task.test[: args.problems])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{task.name} {label} seed {seed}: right {row['right']:.1f}, in the language too {row['spoken']:.1f}",
            flush=True,
        )

    for method in run.contenders(task):
        measure(method, lambda method=method: model.set_method(method) or {})
    measure("best static", lambda: best_static(model, task))
    for granularity, seed in itertools.product(args.granularities, args.seeds):
        measure(f"lora-flow, {granularity}", lambda g=granularity, s=seed: fitted(model, task, g, s), seed)


def best_static(model: FusedModel, task: Task) -> dict[str, Any]:
    """Use the static weights of the grid that are best on the dev problems, in the language."""
    scores = {}
    for weights in STATIC_GRID:
        model.set_method(Static(dict(zip(task.adapters, weights, strict=True))))
        scores[weights] = shares(model, task.dev)["spoken"]
    best = max(scores, key=scores.__getitem__)
    model.set_method(Static(dict(zip(task.adapters, best, strict=True))))
    return {"weights": best}


def fitted(model: FusedModel, task: Task, granularity: str, seed: int) -> dict[str, Any]:
    """Fit LoRA-Flow's gates by the demo's recipe."""
    model.set_method(LoraFlow(granularity=granularity))
    config = dataclasses.replace(run.RECIPE, seed=seed)
    dev = run.as_records(task.dev)
    result = fit(model, run.as_records(task.train), dev=dev, config=config, console=Console(quiet=True))
    return {"dev_loss": result.dev_loss, "start": dict(result.start)}


def shares(model: FusedModel, problems: tuple[Problem, ...]) -> dict[str, float]:
    """Percent right, and percent right and in the language."""
    result = run.evaluate(model, problems, "", None, lambda count: None)
    return {"right": 100 * sum(result.right) / len(problems), "spoken": 100 * sum(result.in_language) / len(problems)}


def read_results(path: Path) -> list[dict[str, Any]]:
    """All results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(rows: list[dict[str, Any]], tasks: list[str]) -> None:
    """Print a Markdown table: right and in the language (right, whatever the language); means and ranges over seeds."""
    models: dict[str, None] = {}
    for row in rows:
        models[label(row)] = None
    print("\n| task | " + " | ".join(models) + " |")
    print("|---" * (len(models) + 1) + "|")
    for task in tasks:
        cells = [cell([row for row in rows if row["task"] == task and label(row) == model]) for model in models]
        print(f"| {task} | " + " | ".join(cells) + " |")


def label(row: dict[str, Any]) -> str:
    """The column of a result: chat and skill adapters of all tasks share two."""
    if row["model"].endswith("-chat"):
        return "language adapter"
    return "skill adapter" if row["model"] in ("math", "code") else row["model"]


def cell(rows: list[dict[str, Any]]) -> str:
    """One cell of the table."""
    if not rows:
        return ""
    spoken, right = [row["spoken"] for row in rows], [row["right"] for row in rows]
    spread = f" [{min(spoken):.1f}, {max(spoken):.1f}]" if len(rows) > 1 else ""
    return f"{statistics.mean(spoken):.1f}{spread} ({statistics.mean(right):.1f})"


if __name__ == "__main__":
    main()

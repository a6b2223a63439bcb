"""What the demo compares on one task of the small world, and the files that it leaves."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraflow.demo.setting import METRIC, RECIPES
from loraflow.demo.tasks import DemoTask
from loraflow.evaluation.compare import Cell, Plan, Store, make_plan
from loraflow.evaluation.statistics import wilson_interval
from loraflow.files import write_atomically
from loraflow.training import FitConfig


@dataclass(frozen=True)
class Size:
    """How much of the demo is done.

    Attributes:
        problems: test problems that each method answers.
        steps: steps of the gates' fit; None for as many as its recipe has.
    """

    problems: int
    steps: int | None = None

    def less_than_whole(self, task: DemoTask) -> str:
        """What is smaller than in the whole demo, and what that means for its table; empty where nothing is."""
        recipe = FitConfig(**RECIPES["lora-flow"])
        per_epoch = math.ceil(len(task.train) / recipe.batch_size)
        whole = recipe.epochs_over(len(task.train)) * per_epoch
        smaller = []
        if self.steps is not None and self.steps < whole:
            smaller.append(f"the gates learn for {self.steps} steps instead of {whole}, and are not at their best")
        if self.problems < len(task.test):
            # An interval is as wide as one over the root of the problems.
            wider = math.sqrt(len(task.test) / self.problems)
            smaller.append(
                f"{self.problems} of {len(task.test)} test problems, so intervals are some {wider:.1f} times as wide"
            )
        return "; ".join(smaller)


QUICK = Size(problems=100, steps=100)


def demo_plan(task: DemoTask, options: Mapping[str, Any], seed: int, size: Size) -> Plan:
    """The base, each adapter alone, their average and, last, LoRA-Flow fitted on the task."""
    rows = dict.fromkeys(("base", *task.adapters, "average"))
    fit = {} if size.steps is None else {"max_steps": size.steps}
    content = {
        "setting": "small-world",
        "tasks": [task.name],
        "methods": {**rows, "lora-flow": {"options": options, "fit": fit}},
        "seeds": [seed],
        "limit": size.problems,
        "batch_size": 64,
    }
    return make_plan(content, Path())


@dataclass(frozen=True)
class Result:
    """How one method did on a task's problems.

    Attributes:
        right: for each problem, whether the answer is right (its final number, or its code passes the tests).
        in_language: for each problem, whether the answer is right and in the asked language.
    """

    method: str
    answers: Sequence[str]
    right: Sequence[bool]
    in_language: Sequence[bool]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Shares with their 95 % intervals, as JSON values."""
        right, spoken, count = sum(self.right), sum(self.in_language), len(self.answers)
        return {
            "method": self.method,
            "problems": count,
            "accuracy": right / count,
            "accuracy_interval": wilson_interval(right, count),
            "in_language_accuracy": spoken / count,
            "in_language_interval": wilson_interval(spoken, count),
            "seconds": self.seconds,
        }


def read_result(store: Store, cell: Cell) -> Result:
    """What a finished measurement came to, by both scores."""
    record, items = store.read(cell), store.read_items(cell)
    assert record is not None
    right, spoken = ([bool(item.scores[name]) for item in items] for name in ("right", METRIC))
    return Result(cell.method, [item.answer for item in items], right, spoken, record.answer_s)


def write_task(task: DemoTask, directory: Path) -> None:
    """Write a task's three splits as JSON lines, as `loraflow fit --data` reads them."""
    for split, problems in (("train", task.train), ("dev", task.dev), ("test", task.test)):
        _write_lines(directory / f"{split}.jsonl", map(dataclasses.asdict, problems))


def write_results(task: DemoTask, seed: int, results: Sequence[Result], directory: Path) -> None:
    """Write `results.json`, and every answer with its verdicts into `answers`."""
    for result in results:
        rows = zip(task.test, result.answers, result.right, result.in_language, strict=False)
        records = ({"prompt": p.prompt, "answer": a, "right": r, "in_language": s} for p, a, r, s in rows)
        _write_lines(directory / "answers" / f"{result.method}.jsonl", records)
    content = {"task": task.name, "seed": seed, "results": [result.summary() for result in results]}
    write_atomically(directory / "results.json", json.dumps(content, indent=2).encode())


def _write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())

"""The demo: fit LoRA-Flow for one task of the small world, and compare it with what there was before."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraflow.demo.setting import METRIC, RECIPES, small_world
from loraflow.demo.tasks import Problem, Task
from loraflow.demo.world import adapter_paths, base_path
from loraflow.evaluation.compare.measure import Progress, answer_task
from loraflow.evaluation.compare.tasks import Task as SettingTask
from loraflow.evaluation.statistics import wilson_interval
from loraflow.files import write_atomically
from loraflow.methods import Method
from loraflow.model import FusedModel
from loraflow.training import FitConfig

RECIPE = FitConfig(**RECIPES["lora-flow"])


@dataclass(frozen=True)
class Result:
    """How one method did on a task's problems.

    Attributes:
        method: the method's name.
        right: for each problem, whether the answer is right (its final number, or its code passes the tests).
        in_language: for each problem, whether the answer is right and in the asked language.
        seconds: time to generate all answers.
    """

    method: str
    right: list[bool]
    in_language: list[bool]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Shares with their 95 % intervals, as JSON values."""
        return {
            "method": self.method,
            "problems": len(self.right),
            "accuracy": sum(self.right) / len(self.right),
            "accuracy_interval": wilson_interval(sum(self.right), len(self.right)),
            "in_language_accuracy": sum(self.in_language) / len(self.in_language),
            "in_language_interval": wilson_interval(sum(self.in_language), len(self.in_language)),
            "seconds": self.seconds,
        }


def load_task_model(task: Task, method: str | Method = "lora-flow") -> FusedModel:
    """The small world's base with a task's two adapters, the language's first."""
    paths = adapter_paths()
    return FusedModel.from_adapters(base_path(), {name: paths[name] for name in task.adapters}, method)


def contenders(task: Task) -> list[str]:
    """What the fitted fusion is compared with: the base, each adapter alone, and their average."""
    return ["base", *task.adapters, "average"]


def as_records(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Problems as the records that `loraflow fit --data` reads."""
    return [dataclasses.asdict(problem) for problem in problems]


def write_task(task: Task, directory: Path) -> None:
    """Write a task's three splits as JSON lines."""
    for split, problems in (("train", task.train), ("dev", task.dev), ("test", task.test)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in as_records(problems))
        write_atomically(directory / f"{split}.jsonl", lines.encode())


def evaluate(
    model: FusedModel, task: Task, method: str, count: int, answers_file: Path | None, progress: Progress
) -> Result:
    """Answer the first problems of a task greedily with the model as it is, keep the answers, and score them.

    Args:
        model: the fused model.
        task: the task.
        method: what the result is called.
        count: how many problems.
        answers_file: where the answers go, one JSON object a line.
        progress: called after each batch with how many are answered, and how many there are.
    """
    problems = _setting_task(task.name)
    measured = answer_task(model, problems, limit=count, batch_size=64, progress=progress)
    right, spoken = ([bool(item.scores[name]) for item in measured.items] for name in ("right", METRIC))
    lines = [
        json.dumps({"prompt": p.prompt, "answer": i.answer, "right": r, "in_language": s}, ensure_ascii=False)
        for p, i, r, s in zip(task.test, measured.items, right, spoken, strict=False)
    ]
    if answers_file is not None:
        write_atomically(answers_file, ("\n".join(lines) + "\n").encode())
    return Result(method, right, spoken, measured.seconds)


@functools.cache
def _setting_task(name: str) -> SettingTask:
    # Whoever calls has been asked whether code may run.
    return small_world([name], allow_code=True).tasks[name]

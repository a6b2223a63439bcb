"""The demo: fit LoRA-Flow for one task of the small world, and compare it with what there was before."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraflow.answers import generate_answers, require_tokenizer
from loraflow.demo.tasks import Problem, Task, in_language
from loraflow.demo.world import adapter_paths, base_path
from loraflow.evaluation.sandbox import check_available, run_many
from loraflow.evaluation.scoring import extract_code, same_number
from loraflow.evaluation.statistics import wilson_interval
from loraflow.methods import Method
from loraflow.model import FusedModel
from loraflow.storage import write_atomically
from loraflow.training import FitConfig

# The paper's recipe but for the learning rate: chosen on dev problems, a small model wants a larger one.
RECIPE = FitConfig(learning_rate=1e-2)
LONGEST_ANSWER = 120


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
    directory.mkdir(parents=True, exist_ok=True)
    for split, problems in (("train", task.train), ("dev", task.dev), ("test", task.test)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in as_records(problems))
        write_atomically(directory / f"{split}.jsonl", lines.encode())


def evaluate(
    model: FusedModel,
    problems: Sequence[Problem],
    name: str,
    answers_file: Path | None,
    on_batch: Callable[[int], None],
) -> Result:
    """Answer all problems greedily with the model as it is, keep the answers, and score them."""
    started = time.perf_counter()
    answers = generate_answers(
        model,
        [[{"role": "user", "content": problem.prompt}] for problem in problems],
        tokenizer=require_tokenizer(model.tokenizer),
        prompt=model.prompt,
        max_new_tokens=LONGEST_ANSWER,
        batch_size=64,
        on_batch=on_batch,
    )
    seconds = time.perf_counter() - started
    right = score(answers, problems)
    spoken = [ok and in_language(answer, p.language) for ok, answer, p in zip(right, answers, problems, strict=True)]
    lines = [
        json.dumps({"prompt": p.prompt, "answer": a, "right": r, "in_language": s}, ensure_ascii=False)
        for p, a, r, s in zip(problems, answers, right, spoken, strict=True)
    ]
    if answers_file is not None:
        answers_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(answers_file, ("\n".join(lines) + "\n").encode())
    return Result(name, right, spoken, seconds)


def score(answers: Sequence[str], problems: Sequence[Problem]) -> list[bool]:
    """Whether each answer is right: by its last number, or by running its code in the sandbox."""
    if problems[0].tests:
        check_available()
        programs = [(extract_code(answer), p.tests) for answer, p in zip(answers, problems, strict=True)]
        return [result.passed for result in run_many(programs)]
    return [same_number(answer, str(p.answer)) for answer, p in zip(answers, problems, strict=True)]

"""The small world as a setting that methods are compared on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from loraflow.demo.samples import adapter_samples
from loraflow.demo.tasks import TASKS, Problem, in_language, load_task, more_training
from loraflow.demo.world import adapter_paths, base_path
from loraflow.errors import DataError, did_you_mean
from loraflow.evaluation.compare.tasks import Setting, Task, mix_tasks
from loraflow.evaluation.scoring import Scorer, get_scorer
from loraflow.examples import Example, parse_examples

LONGEST_ANSWER = 120
METRIC = "right and in the language"
# The paper's recipes but for what a small model wants otherwise. Gates: chosen on dev problems. Fine-tuning: the rank,
# alpha and rate of most shipped adapters; the rate has the lowest mean dev loss of 1e-3, 2e-3 and 5e-3 on zh-math and
# ru-code, for a new LoRA and the skill adapter (seed 0).
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "lora-flow": {"learning_rate": 1e-2},
    "finetune": {"learning_rate": 2e-3, "r": 8, "alpha": 16},
}
# Every language of the tasks with the next one.
_OTHER = {"zh": "es", "es": "ru", "ru": "zh"}
MORE_EXAMPLES = 1_800
MIXED = {f"{name}-{how}": (name, how) for name in TASKS if name.endswith("math") for how in ("alternate", "question")}


@dataclasses.dataclass(frozen=True)
class InLanguage:
    """1 if an answer is right by another scorer, and its prose is in the language of the question."""

    right: Scorer

    def __call__(self, generated: str, example: Mapping[str, Any]) -> float:
        """Score one answer; the example's `language` says which."""
        return self.right(generated, example) if in_language(generated, example["language"]) else 0.0


def small_world(tasks: Sequence[str] | None = None, allow_code: bool = False) -> Setting:
    """The small world's base, adapters, and tasks; those that run code want `allow_code`.

    Beside the six tasks there are those of `MIXED`, whose questions are in two languages. All can be learned from 2,000
    training problems instead of 200.

    Raises:
        DataError: if there is no such task.
    """
    known = [*TASKS, *MIXED]
    for name in tasks or ():
        if name not in known:
            raise DataError(f"The small world has no task {name!r}. {did_you_mean(name, known)}")
    return Setting(
        base=str(base_path()),
        adapters={name: str(path) for name, path in adapter_paths().items()},
        tasks={name: _task(name, allow_code) for name in tasks or TASKS},
        recipes=RECIPES,
        adapter_examples=adapter_samples,
    )


def _task(name: str, allow_code: bool) -> Task:
    if name in MIXED:
        source, how = MIXED[name]
        language, _, skill = source.partition("-")
        mixed = mix_tasks(name, _task(source, allow_code), _task(f"{_OTHER[language]}-{skill}", allow_code), how)
        # Which language such a question wants is open.
        return dataclasses.replace(mixed, scorers={"right": mixed.scorers["right"]})
    drawn = load_task(name)
    right = get_scorer("code-tests", allow_code) if drawn.skill == "code" else get_scorer("last-number")
    if drawn.skill == "code":
        # Both scores ask for the same programs' verdicts.
        right = _once(right)
    return Task(
        name=name,
        adapters=drawn.adapters,
        train=_examples(drawn.train),
        more_train=functools.cache(lambda: _examples(more_training(drawn, MORE_EXAMPLES))),
        dev=_examples(drawn.dev),
        test=_examples(drawn.test),
        scorers={METRIC: InLanguage(right), "right": right},
        max_new_tokens=LONGEST_ANSWER,
        problems=drawn.skill,
        learns_as=name,
        runs_code=drawn.skill == "code",
    )


def _examples(problems: Sequence[Problem]) -> tuple[Example, ...]:
    return tuple(parse_examples([dataclasses.asdict(problem) for problem in problems]))


def _once(scorer: Scorer) -> Scorer:
    @functools.lru_cache(maxsize=4096)
    def verdict(generated: str, tests: tuple[str, ...]) -> float:
        return scorer(generated, {"tests": tests})

    return lambda generated, example: verdict(generated, tuple(example["tests"]))

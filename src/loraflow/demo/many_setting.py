"""The many world as a setting that methods are compared on: 48 adapters, of which one is each task's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraflow.demo.many import SPECIALITIES, TASKS, problems, speciality_of
from loraflow.demo.world import base_path, many_adapter_paths
from loraflow.errors import DataError, did_you_mean
from loraflow.evaluation.compare.tasks import Setting, Task, join_tasks
from loraflow.evaluation.scoring import get_scorer
from loraflow.examples import Example, parse_examples

TOGETHER = "together"
"""The task that has the problems of all `TASKS` in turns."""

LONGEST_ANSWER = 48
METRIC = "exact-match"
TRAIN, DEV, TEST, OWN_EXAMPLES = 60, 20, 40, 20


def many_world(tasks: Sequence[str] | None = None, allow_code: bool = False) -> Setting:
    """The many world: by default the tasks of `TASKS`; those of the other adapters, and `together`, by name.

    Args:
        tasks: the tasks that are wanted.
        allow_code: makes no difference; answers are compared with the right one as text, programs too.

    Raises:
        DataError: if there is no such task.
    """
    known = [*SPECIALITIES, TOGETHER]
    for name in tasks or ():
        if name not in known:
            raise DataError(f"The many world has no task {name!r}. {did_you_mean(name, known)}")
    return Setting(
        base=str(base_path()),
        adapters={name: str(path) for name, path in many_adapter_paths().items()},
        tasks={name: _task(name) for name in tasks or TASKS},
        adapter_examples=lambda adapter: problems(adapter, OWN_EXAMPLES, "own"),
    )


def _task(name: str) -> Task:
    if name == TOGETHER:
        return join_tasks(name, [_task(one) for one in TASKS])
    speciality = speciality_of(name)
    return Task(
        name=name,
        adapters=tuple(SPECIALITIES),
        own=(name,),
        train=_examples(problems(name, TRAIN, "train")),
        dev=_examples(problems(name, DEV, "dev")),
        test=_examples(problems(name, TEST, "test")),
        scorers={METRIC: get_scorer(METRIC)},
        max_new_tokens=LONGEST_ANSWER,
        # The tasks of one skill are the same problems.
        problems=speciality.skill,
        learns_as=name,
    )


def _examples(drawn: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    return tuple(parse_examples(list(drawn)))

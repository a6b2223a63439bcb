"""Finding a task of lm-evaluation-harness by its name, and loading it."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraflow.errors import LoraflowError

PAPER_TASKS = Path(__file__).parents[1] / "paper"
"""The paper's six tasks, for lm-eval's own `--include_path`."""

_NEAREST = 5


def _own_tasks(include_path: Path | None) -> Any:
    """Read anew each time: a user may be writing the files."""
    from lm_eval.tasks import TaskManager

    # The last of two tasks of the same name counts.
    folders: Any = [PAPER_TASKS] if include_path is None else [PAPER_TASKS, include_path]
    return TaskManager(include_path=folders, include_defaults=False)


@functools.cache
def _stock_tasks() -> Any:
    """lm-eval's thousands of task files, which take some seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def find_task(task: str, include_path: Path | None) -> tuple[Any, Any]:
    """The index with a task in it, and the task's entry.

    Raises:
        LoraflowError: if there is no such task or folder, or the name is that of several tasks.
    """
    if include_path is not None and not include_path.is_dir():
        raise LoraflowError(f"`include_path` (={str(include_path)!r}) must be a folder with task files (*.yaml).")
    manager = _own_tasks(include_path)
    if task not in manager.task_index:
        own, manager = list(manager.task_index), _stock_tasks()
        if task not in manager.task_index:
            names = own + list(manager.task_index)
            near = difflib.get_close_matches(task, names, n=_NEAREST)
            guess = f"Did you mean {', '.join(map(repr, near))}? " if near else ""
            raise LoraflowError(
                f"There is no task {task!r}. {guess}`lm-eval ls tasks` lists lm-eval's; your own are found in the "
                "folder `include_path`."
            )
    entry = manager.task_index[task]
    members = sorted(entry.tags) if entry.cfg is None else (entry.cfg.get("task") if "group" in entry.cfg else None)
    if isinstance(members, list):
        each = [member if isinstance(member, str) else member.get("task") or member.get("group") for member in members]
        raise LoraflowError(f"{task!r} is not one task but a group of them. Give them one by one: {', '.join(each)}.")
    return manager, entry


def load_task(manager: Any, task: str, config: Mapping[str, Any]) -> Any:
    """The task with its data.

    Raises:
        LoraflowError: if lm-eval cannot load it.
    """
    try:
        return manager.load([task])["tasks"][task]
    except LoraflowError:
        raise
    except Exception as error:  # whatever a task's own files, `datasets` or the Hub raise
        raise LoraflowError(cannot("load", task, config, error)) from error


def cannot(what: str, task: str, config: Mapping[str, Any], error: Exception) -> str:
    """What to say where lm-eval cannot do something with a task."""
    reason = " ".join(str(error).split()) or "no reason given"
    dataset = config.get("dataset_path")
    if isinstance(error, ImportError):
        remedy = "Install what it names."
    elif dataset is None or not isinstance(error, OSError):
        remedy = "Correct the task's files, or what they read."
    else:
        remedy = (
            f"It needs the dataset {dataset!r} and its metrics from the Hugging Face Hub. Where there is no network, "
            f"run it once where there is one, or `hf download --repo-type dataset {dataset}`, and set HF_HOME to that "
            "cache."
        )
    return f"lm-eval cannot {what} the task {task!r}: {type(error).__name__}: {reason.rstrip('.')}. {remedy}"

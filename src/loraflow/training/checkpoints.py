"""What a fit keeps on disk while it runs: what makes it this fit, whole checkpoints, and finished parts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from loraflow.core.fusion import Fusion
from loraflow.errors import LoraflowError
from loraflow.files import alone, is_first_process, write_atomically
from loraflow.training.config import FitResult, Run
from loraflow.training.data import FitData

RUN_FILE = "run.json"
SEARCH_FILE = "search.jsonl"
COMPLETE = "COMPLETE"
"""A checkpoint counts only once this file stands in it."""
LAST_GOOD = "last-good"
"""What a training that diverged had learned before."""
FINISHED = "FINISHED"
"""A run is interrupted until this file stands beside its checkpoints."""
_RESULT_FILE = "result.json"
_GATES_FILE = "gates.safetensors"
# Digests say nothing to a reader.
_LONGEST_DIFFERENCE = 80
_ABSENT = object()


def identity_of(fusion: Fusion, data: FitData, run: Run) -> dict[str, Any]:
    """What makes two fits the same one, as JSON values."""
    score = run.score
    identity = {
        "method": {"name": fusion.method.name, **fusion.method.parameters()},
        "base": fusion.base_record.model_dump(exclude={"path", "revision"}),
        "adapters": {adapter.name: adapter.digest for adapter in fusion.adapters},
        "data": data.digest,
        "dev metric": "loss" if score is None else getattr(score, "__name__", type(score).__name__),
        "config": run.config.identity(),
    }
    return json.loads(json.dumps(identity))


def check_decision(directory: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a run which is there goes on, or is started over, because somebody has said so.

    Raises:
        LoraflowError: if both are said, there is nothing to go on from, or an interrupted run and nothing is said.
    """
    if resume and overwrite:
        raise LoraflowError("`resume=True` goes on, and `overwrite=True` starts over. Say one of them.")
    if resume and not can_resume(directory):
        raise LoraflowError(
            f"There is nothing to resume in {directory}: no run, or one that was interrupted before its first "
            "checkpoint. Start without `resume=True`; if a run was interrupted there, say `overwrite=True`."
        )
    if _has_run(directory) and not (resume or overwrite or (directory / FINISHED).exists()):
        if not can_resume(directory):
            raise LoraflowError(
                f"{directory} holds a run that was interrupted before its first checkpoint. Say `overwrite=True` to "
                "start over."
            )
        raise LoraflowError(
            f"{directory} holds an interrupted run. Say `resume=True` to go on with it, or `overwrite=True` to start "
            "over."
        )


def can_resume(directory: Path) -> bool:
    """Whether there is something in a checkpoint directory that `resume` could go on from."""
    return any(_has_progress(place) for place in (directory, *directory.glob("*/")))


def _has_progress(place: Path) -> bool:
    search = place / SEARCH_FILE
    return (
        bool(complete_checkpoints(place))
        or (place / _RESULT_FILE).is_file()
        # Its first line is the search's identity.
        or (search.is_file() and len(search.read_text(encoding="utf-8").splitlines()) > 1)
    )


@contextlib.contextmanager
def run_directory(checkpoints: str | Path | None, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Where a run keeps its checkpoints, for it alone; a temporary place where none is named.

    Yields:
        The directory.

    Raises:
        LoraflowError: if it is to go on from no place.
    """
    if checkpoints is None:
        if resume:
            raise LoraflowError("`resume` (=True) needs the directory to go on from. Give `checkpoints`.")
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
        return
    place = Path(checkpoints).expanduser()
    if not is_first_process():
        yield place
        return
    with alone(place, "fit"):
        check_decision(place, resume=resume, overwrite=overwrite)
        yield place
        if _has_run(place):
            (place / FINISHED).touch()


def _has_run(directory: Path) -> bool:
    """Whether a run is or was there, finished or not."""
    named = (directory.glob(f"{where}{name}") for where in ("", "*/") for name in (RUN_FILE, SEARCH_FILE))
    return any(any(found) for found in named)


def check_same(recorded: Mapping[str, Any], identity: Mapping[str, Any], place: Path, what: str) -> None:
    """Check that what was recorded is of the fit that is to go on.

    Raises:
        LoraflowError: if it is another's.
    """
    for key, value in identity.items():
        if recorded.get(key) != value:
            raise LoraflowError(
                f"Cannot resume from {place}: its {what} had another {_difference(key, recorded.get(key), value)}. "
                "Give the same arguments and data as then, or start over, with `overwrite=True` in place of "
                "`resume=True`."
            )


def _difference(name: str, then: Any, now: Any) -> str:
    """The first setting that is another now, with both of its values where they are short enough to tell."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        # A key that one side lacks is another than one whose value is None.
        inner = next(key for key in {**then, **now} if then.get(key, _ABSENT) != now.get(key, _ABSENT))
        return _difference(inner, then.get(inner, _ABSENT), now.get(inner, _ABSENT))
    told = f" ({_told(then)} then, {_told(now)} now)"
    return f"`{name}`{told}" if len(told) <= _LONGEST_DIFFERENCE else f"`{name}`"


def _told(value: Any) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value)


def complete_checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a directory, oldest first."""
    found = [mark.parent for mark in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def resumable_checkpoint(identity: Mapping[str, Any], directory: Path) -> Path | None:
    """The newest whole checkpoint of this very run; None where there is none yet.

    Raises:
        LoraflowError: if the checkpoints are another run's.
    """
    found = complete_checkpoints(directory)
    if not found or not (directory / RUN_FILE).is_file():
        return None
    recorded = json.loads((directory / RUN_FILE).read_text())
    check_same(recorded, identity, found[-1], "run")
    return found[-1]


def remove_checkpoints(directory: Path) -> None:
    """Remove what a run left in its checkpoint directory, those of a search included, and nothing else.

    Raises:
        LoraflowError: if there are checkpoints that no run of this library made.
    """
    for cell in directory.glob(f"*/{RUN_FILE}"):
        remove_checkpoints(cell.parent)
    (directory / SEARCH_FILE).unlink(missing_ok=True)
    checkpoints = list(directory.glob("checkpoint-*"))
    if checkpoints and not (directory / RUN_FILE).is_file():
        raise LoraflowError(f"{checkpoints[0]} is no checkpoint of this library. Give another directory.")
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    if (directory / RUN_FILE).is_file():
        shutil.rmtree(directory / LAST_GOOD, ignore_errors=True)
    for name in (_RESULT_FILE, _GATES_FILE, FINISHED, RUN_FILE):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def keep_finished(fusion: Fusion, identity: Mapping[str, Any], result: FitResult, directory: Path) -> None:
    """Keep a finished setting of a search; its result is written last, and counts once it is there."""
    write_atomically(directory / _GATES_FILE, save({k: v.cpu().contiguous() for k, v in fusion.state_dict().items()}))
    text = json.dumps({"identity": identity, "result": dataclasses.asdict(result)})
    write_atomically(directory / _RESULT_FILE, text.encode())


def load_finished(fusion: Fusion, identity: Mapping[str, Any], directory: Path) -> FitResult | None:
    """A finished setting of this very search, its gates loaded; None where it is not finished."""
    if not (directory / _RESULT_FILE).is_file():
        return None
    saved = json.loads((directory / _RESULT_FILE).read_text())
    if saved["identity"] != identity:
        return None
    fusion.load_state_dict(load((directory / _GATES_FILE).read_bytes()))
    return FitResult(**saved["result"])

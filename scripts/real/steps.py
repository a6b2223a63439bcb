"""Steps of a walk: each is timed, and ends the walk where it finds something wrong."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LORAFLOW = Path(sys.executable).with_name("loraflow")


class StepError(Exception):
    """Something came out that should not have."""


def check(holds: object, what: str) -> None:
    """Raise unless something holds.

    Raises:
        StepError: with what was to hold.
    """
    if not holds:
        raise StepError(what)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print a step's name and how long it took, on the clock and on the processors.

    Raises:
        SystemExit: where it finds something wrong, after the step's name.
    """
    print(f"\n== {name}", flush=True)
    start, before = time.monotonic(), _processor_s()
    try:
        yield
    except StepError as error:
        print(f"FAILED at the step {name!r}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except Exception:
        print(f"FAILED at the step {name!r}:", file=sys.stderr, flush=True)
        raise
    print(f"   {time.monotonic() - start:.0f} s, of processors {_processor_s() - before:.0f} s", flush=True)


def loraflow(*arguments: str | Path, fails: bool = False) -> str:
    """Run `loraflow` as a user does; what it printed, errors included.

    Raises:
        StepError: if it does not end as it should.
    """
    words = [str(argument) for argument in arguments]
    print(f"   $ loraflow {shlex.join(words)}", flush=True)
    # Wide, so that no line is wrapped.
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [str(LORAFLOW), *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if (ended.returncode != 0) != fails:
        raise StepError(f"loraflow {words[0]} ended with {ended.returncode}:\n{ended.stdout}")
    return ended.stdout


def show(text: str) -> None:
    """Print what a command printed, as a part of its step."""
    print("\n".join(f"   | {line}" for line in text.strip().splitlines()), flush=True)


def made_once(directory: Path, make: Callable[[Path], object]) -> None:
    """A directory that is made if it is not there, whole or not at all."""
    if directory.exists():
        print(f"   kept {directory} (--fresh makes it anew)")
        return
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    make(unfinished)
    unfinished.rename(directory)


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _processor_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)

"""The files of a comparison: one record and one file of answers for each cell, and what was learned.

```
RUN/
  plan.yaml                             what was asked for
  cells/TASK/METHOD/seed-0.json         scores, times, sizes; written last: a cell is finished once it is there
  cells/TASK/METHOD/seed-0.jsonl        every prompt with its answer and scores
  learned/METHOD/TASK/seed-0/           what was fitted on that task: a fusion, or a LoRA, that opens by itself
  report.md, .csv, .json, .html
```
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraflow.errors import LoraflowError
from loraflow.files import make_folder, staged, write_atomically

PLAN_FILE = "plan.yaml"
# File systems take 255 bytes, some of which are temporary files' endings.
_LONGEST = 120


@dataclass(frozen=True)
class Cell:
    """One measurement: a row of the table on one task.

    Attributes:
        seed: None where nothing is drawn at random.
    """

    task: str
    method: str
    seed: int | None

    def __str__(self) -> str:
        return f"{self.method}, {self.task}" + ("" if self.seed is None else f", seed {self.seed}")


@dataclass(frozen=True)
class Item:
    """One answered problem.

    Attributes:
        id: which problem of its task.
        prompt: the text that the model read.
        answer: what it wrote; for tasks of lm-evaluation-harness its responses as JSON.
        tokens: how many were generated, where they were counted.
        reference: a right answer, where there is one.
        digest: lm-evaluation-harness's hash of the problem, for its tasks.
    """

    id: str
    prompt: str
    answer: Any
    scores: Mapping[str, float]
    tokens: int | None = None
    reference: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Record:
    """What a cell came to.

    Attributes:
        identity: what makes it this measurement and no other, as JSON values.
        metric: the score that decides.
        scores: that score of every problem, in order.
        tokens: generated tokens, where they were counted.
        memory_mib: the most memory in use while answering: of the GPU, or resident in the process on a CPU.
        fitted_on: the task that it learned on, where that is another one's choice.
        weights: mean fusion weight of each adapter over the answers' tokens and the layers, and the standard deviation
            of the answers' means; empty where there are none, None where they were not recorded.
        chosen: for each answer whose weights were recorded, the adapter with the largest mean weight; None where none
            has it alone.
        details: more of the fit, for readers.
        notice: what a reader of the scores has to know.
    """

    cell: Cell
    identity: Mapping[str, Any]
    metric: str
    scores: Sequence[float]
    learned_parameters: int
    examples: int | None
    fit_s: float
    answer_s: float
    tokens: int | None
    memory_mib: float
    fitted_on: str | None = None
    weights: Mapping[str, tuple[float, float]] | None = None
    chosen: Sequence[str | None] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    higher_is_better: bool = True
    notice: str | None = None


class Store:
    """Cells in a directory."""

    def __init__(self, root: str | Path) -> None:
        # `Path` leaves one slash of a URL's two.
        if re.match(r"[a-z][a-z0-9+.-]+:/", str(root)):
            raise LoraflowError(
                f"The run's place (={str(root)!r}) is a URL, and a comparison works in a folder. Give one, or mount it."
            )
        self.root = Path(root).expanduser()

    def record_path(self, cell: Cell) -> Path:
        """Where a cell's record is, once it is finished."""
        return self.root / "cells" / file_name(cell.task) / file_name(cell.method) / f"{_seed(cell.seed)}.json"

    def answers_path(self, cell: Cell) -> Path:
        """Where a cell's answers are."""
        return self.record_path(cell).with_suffix(".jsonl")

    def learned_path(self, method: str, task: str, seed: int | None) -> Path:
        """Where what a row learned on a task is kept."""
        return self.root / "learned" / file_name(method) / file_name(task) / _seed(seed)

    def write(self, record: Record, items: Sequence[Item]) -> None:
        """Keep a finished cell; a crash leaves it unfinished or whole."""
        path = self.record_path(record.cell)
        make_folder(path.parent)
        lines = "".join(json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n" for item in items)
        write_atomically(self.answers_path(record.cell), lines.encode())
        write_atomically(path, json.dumps(dataclasses.asdict(record), ensure_ascii=False, indent=1).encode())

    def read(self, cell: Cell) -> Record | None:
        """A finished cell's record; None where it is not finished.

        Raises:
            LoraflowError: if its file is damaged.
        """
        path = self.record_path(cell)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            weights = content["weights"]
            if weights is not None:
                weights = {name: (mean, spread) for name, (mean, spread) in weights.items()}
            chosen = tuple(content.get("chosen", ()))
            return Record(**{**content, "cell": Cell(**content["cell"]), "weights": weights, "chosen": chosen})
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise LoraflowError(f"{path} is no readable cell ({error}). Remove it, to measure it again.") from error

    def read_items(self, cell: Cell) -> list[Item]:
        """A finished cell's answers.

        Raises:
            LoraflowError: if their file is missing or damaged.
        """
        path = self.answers_path(cell)
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            return [Item(**json.loads(line)) for line in lines if line]
        except (OSError, ValueError, TypeError) as error:
            raise LoraflowError(
                f"{path} does not hold the answers of {cell} ({error}). Remove {self.record_path(cell).name} "
                "beside it, to measure the cell again."
            ) from error

    def pack(self, cells: Iterable[Cell], learned: Path) -> dict[str, bytes]:
        """The files of cells and of what was learned, by their paths in the run; those that there are.

        Args:
            cells: the cells.
            learned: their `learned_path`.
        """
        # A cell is finished once its record is there, so that comes last.
        wanted = [path for path in sorted(learned.rglob("*")) if path.is_file()]
        wanted += [path(cell) for cell in cells for path in (self.answers_path, self.record_path)]
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in wanted if path.is_file()}

    def unpack(self, files: Mapping[str, bytes], learned: Path) -> None:
        """Write what another store has packed; what was learned there takes the place of what was learned here."""
        folder = learned.relative_to(self.root).as_posix() + "/"
        with staged(learned, folder=True) as temporary:
            for name in [name for name in files if name.startswith(folder)]:
                write_atomically(temporary / name.removeprefix(folder), files[name])
            shutil.rmtree(learned, ignore_errors=True)
            if any(temporary.iterdir()):
                os.replace(temporary, learned)
        for name in [name for name in files if not name.startswith(folder)]:
            write_atomically(self.root / name, files[name])

    def remove(self, cell: Cell) -> None:
        """Forget a cell."""
        self.record_path(cell).unlink(missing_ok=True)
        self.answers_path(cell).unlink(missing_ok=True)


def file_name(name: str) -> str:
    """A name as a part of a path: readable, and never that of another name, whatever its case or characters."""
    plain = re.sub(r"[^\w.+-]+", "_", name, flags=re.ASCII).strip("_.")[:_LONGEST]
    # A name that looks like one with a checksum gets its own, lest it be that other name's.
    if plain and plain == name and name == name.lower() and not re.search(r"-[0-9a-f]{8}$", name):
        return plain
    return f"{plain}-{zlib.crc32(name.encode()):08x}"


def _seed(seed: int | None) -> str:
    return "once" if seed is None else f"seed-{seed}"

"""What a comparison shows while it runs: one bar for the whole of it, and a line for each finished cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loraflow.evaluation.compare.store import Cell


class Board:
    """Listens to the workers' events: `(kind, cell, value)`, with the kinds

    - `"start"`, `"answering"`: what a worker is at;
    - `"learning"`: a line of how that goes on;
    - `"answered"`: how many answers there are, and how many there will be;
    - `"lost"`: why a worker is no more, and what becomes of its cell;
    - `"done"`, `"failed"`: a line of text, or a traceback. `failed` counts the latter.
    """

    def __init__(self, sizes: Mapping[Cell, int], console: Console) -> None:
        self._console = console
        self._sizes = dict(sizes)
        self._answered = dict.fromkeys(sizes, 0)
        self._finished = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[cells]} cells"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        total = sum(sizes.values())
        self._task = self._progress.add_task("starting", total=total, cells=f"0/{len(sizes)}")
        self.failed = 0

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def watch(self, events: Any) -> None:
        """Show what workers say, until None."""
        while (event := events.get()) is not None:
            kind, cell, value = event
            if kind == "answered":
                self._answered[cell], self._sizes[cell] = value
                self._advance()
            elif kind == "learning":
                self._progress.update(self._task, description=f"{escape(str(cell))}: {escape(value)}")
                # A log has a line for every cell at its start; how it goes on is for those who watch.
                if not self._console.is_terminal and value.startswith("learning"):
                    self._print(f"{escape(str(cell))}: {escape(value)}")
            elif kind in ("start", "answering"):
                verb = "preparing" if kind == "start" else "answering"
                self._progress.update(self._task, description=f"{verb}: {escape(str(cell))}")
            elif kind == "lost":
                self._answered[cell] = 0
                self._advance()
                self._print(f"{escape(str(cell))}: {escape(value)}")
            else:
                self._finish(cell, kind, value)

    def _finish(self, cell: Cell, kind: str, text: str) -> None:
        self._finished += 1
        self._answered[cell] = self._sizes[cell]
        self._advance()
        count = f"{self._finished}/{len(self._sizes)}"
        self._progress.update(self._task, cells=count)
        if kind == "failed":
            self.failed += 1
            self._print(f"\\[{count}] {escape(str(cell))}: [bold red]FAILED[/]\n{escape(text)}")
        else:
            self._print(f"\\[{count}] {escape(str(cell))}: {escape(text)}")

    def _advance(self) -> None:
        total, completed = sum(self._sizes.values()), sum(self._answered.values())
        self._progress.update(self._task, total=total, completed=completed)

    def _print(self, line: str) -> None:
        # Logs are for other programs too: a line is a line.
        self._console.print(line, highlight=False, soft_wrap=True)

"""What a comparison says while it runs, as a log has it."""

from __future__ import annotations

import io
import queue
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from loraflow.evaluation.compare.progress import Board
from loraflow.evaluation.compare.store import Cell

FIRST, SECOND = Cell("zh", "gates [x]", 0), Cell("zh", "base", None)


def log(events: Sequence[Any]) -> tuple[list[str], int]:
    """The lines of a narrow log, and how many cells failed."""
    out, told = io.StringIO(), queue.SimpleQueue[Any]()
    for event in (*events, None):
        told.put(event)
    with Board({FIRST: 4, SECOND: 4}, Console(file=out, width=40, force_terminal=False)) as board:
        board.watch(told)
    return out.getvalue().splitlines(), board.failed


def test_a_log_has_a_line_for_each_start_and_end() -> None:
    long = f"metric [all] 3 %; {'9 ' * 60}s to answer"
    lines, failed = log(
        [
            ("start", FIRST, 0),
            ("learning", FIRST, "learning [1/2]"),
            ("learning", FIRST, "step 3"),
            ("answered", FIRST, (4, 4)),
            ("done", FIRST, long),
            ("done", SECOND, "metric 0 %"),
        ]
    )
    assert lines == [f"{FIRST}: learning [1/2]", f"[1/2] {FIRST}: {long}", f"[2/2] {SECOND}: metric 0 %"]
    assert failed == 0


def test_failures_are_counted_with_their_traceback() -> None:
    lines, failed = log([("failed", FIRST, "Traceback:\n  boom [/bold]"), ("failed", SECOND, "boom")])
    assert lines == [f"[1/2] {FIRST}: FAILED", "Traceback:", "  boom [/bold]", f"[2/2] {SECOND}: FAILED", "boom"]
    assert failed == 2


def test_the_bar_learns_how_many_answers_there_are() -> None:
    board = Board({FIRST: 100, SECOND: 4}, Console(file=io.StringIO()))
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def after(*events: Any) -> tuple[float, float | None]:
        for event in (*events, None):
            told.put(event)
        board.watch(told)
        (bar,) = board._progress.tasks
        return bar.completed, bar.total

    assert after() == (0, 104)
    assert after(("answered", FIRST, (8, 250))) == (8, 254)
    assert after(("answered", SECOND, (2, 4)), ("answered", FIRST, (16, 250))) == (18, 254)
    assert after(("failed", FIRST, "boom"), ("done", SECOND, "fine")) == (254, 254)

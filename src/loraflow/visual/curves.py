"""Learning curves: the score of each way to learn by the number of examples that it had, from a comparison's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraflow.errors import DataError, did_you_mean
from loraflow.visual.drawing import legend_below, legible, line_style, one_panel, plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AVERAGE = "average"


@dataclass(frozen=True)
class Point:
    """A score, in per cent, after so many examples.

    Attributes:
        curve: which line it is on; the row's own name where it learned from no example.
        examples: how many; None for a row that learned from none, which is the same everywhere.
        interval: of the score.
    """

    curve: str
    examples: int | None
    score: float
    interval: tuple[float, float]


def curve_points(report: Mapping[str, Any], task: str | None = None) -> list[Point]:
    """The points of all curves of a report on one task, by curve and examples; those without examples last.

    Args:
        report: what `loraflow compare` wrote, as JSON values.
        task: one of its tasks, or "average"; by default the average, or the only task.

    Raises:
        DataError: if it is no such report, it has not got the task, the task's scores are no shares, or no row of it is
            a point of a curve.
    """
    try:
        tasks = list(dict.fromkeys(row["task"] for row in report["rows"]))
        task = task or (AVERAGE if AVERAGE in tasks else tasks[0])
        if task not in tasks:
            raise DataError(f"The report has no scores on {task!r}. {did_you_mean(task, tasks)}")
        rows = [row for row in report["rows"] if row["task"] == task]
        if not all(row["share"] for row in rows):
            raise DataError(f"The scores on {task!r} are no shares of right answers. Draw a task whose scores are.")
        points = [_point(row) for row in rows if row["curve"] is not None or row["examples"] is None]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"This is no report of a comparison: {type(error).__name__} {error}. Give the report.json that `loraflow "
            "compare` wrote, with `rows` of contender, task, curve, examples, mean, interval."
        ) from error
    if all(point.examples is None for point in points):
        raise DataError(
            f"No row of the report is a point of a curve on {task!r}. Give a row of the plan several numbers of "
            "examples: `examples: [20, 50, 200]`."
        )
    order = list(dict.fromkeys(point.curve for point in points))
    return sorted(points, key=lambda point: (point.examples is None, order.index(point.curve), point.examples or 0))


def curves_figure(report: Mapping[str, Any], task: str | None = None, title: str | None = None) -> Figure:
    """Scores with their intervals by the number of examples; what learned from none is a thin line right through.

    Raises:
        DataError: if there are no curves on the task.
    """
    points = curve_points(report, task)
    curves = list(dict.fromkeys(point.curve for point in points if point.examples is not None))
    counts = sorted({point.examples for point in points if point.examples is not None})
    with one_panel(title, width=7.2) as (figure, axes):
        for index, curve in enumerate(curves):
            _draw(axes, [point for point in points if point.curve == curve and point.examples is not None], index,
                  len(curves))  # fmt: skip
        for point in points:
            if point.examples is None:
                axes.axhline(point.score, color="0.35", linewidth=0.8, linestyle=(0, (1, 2)))
                label = axes.annotate(legible(point.curve), (1, point.score), (2, 0), va="center", fontsize=7,
                                      xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
                plain_text([label])
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("examples")
        axes.set_ylabel("score (per cent)")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        from matplotlib.lines import Line2D

        legend_below(figure, [Line2D([], [], **line_style(index)) for index in range(len(curves))], curves)
    return figure


def _point(row: Mapping[str, Any]) -> Point:
    low, high = row["interval"]
    curve = row["contender"] if row["curve"] is None else row["curve"]
    return Point(curve, row["examples"], 100 * row["mean"], (100 * low, 100 * high))


def _draw(axes: Axes, points: Sequence[Point], index: int, of: int) -> None:
    """One line with its intervals, moved a little aside, or those of several curves would cover each other."""
    aside = 1.06 ** (index - (of - 1) / 2)
    at = [(point.examples or 0) * aside for point in points]
    style = line_style(index)
    for place, point in zip(at, points, strict=True):
        axes.plot([place, place], point.interval, color=style["color"], linewidth=1.0, solid_capstyle="butt")
    axes.plot(at, [point.score for point in points], **style)

"""Learning curves of a report: what is a point, what is drawn, and what is no such report."""

from __future__ import annotations

from typing import Any

import pytest

from loraflow.errors import DataError
from loraflow.visual.curves import curve_points, curves_figure

figure = pytest.importorskip("matplotlib.figure")


def curves_report(task: str = "average") -> dict[str, Any]:
    """A report with a curve of two points, one of one, a row that learned from nothing, and one that is no point."""

    def row(contender: str, curve: str | None, examples: int | None, mean: float) -> dict[str, Any]:
        return {"contender": contender, "task": task, "curve": curve, "examples": examples, "mean": mean,
                "interval": [mean, mean + 0.1], "share": True}  # fmt: skip

    return {
        "rows": [
            row("base", None, None, 0.0),
            row("core, 200", "core", 200, 0.5),
            row("core, 20", "core", 20, 0.25),
            row("gates, 20", "gates", 20, 0.125),
            row("alone", None, 200, 0.9),
        ]
    }


def test_points_are_by_curve_and_number_and_rows_that_learned_elsewhere_are_none() -> None:
    points = curve_points(curves_report())
    assert [(point.curve, point.examples) for point in points] == [
        ("core", 20), ("core", 200), ("gates", 20), ("base", None)
    ]  # fmt: skip
    assert points[0].interval == (25.0, 35.0)


def test_each_curve_is_a_line_with_its_intervals_and_what_learned_nothing_goes_right_through() -> None:
    drawn = curves_figure(curves_report("zh-math"), title="A $title$")
    (axes,) = drawn.axes
    curves = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    assert [list(line.get_ydata()) for line in curves] == [[25.0, 50.0], [12.5]]
    whiskers = [list(line.get_ydata()) for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert [25.0, 35.0] in whiskers
    assert [0.0, 0.0] in [list(line.get_ydata()) for line in axes.lines]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["20", "200"]
    # A report of one task needs no name of it.
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["core", "gates"]


@pytest.mark.parametrize(
    ("change", "task", "said"),
    [
        ({}, "zh-mth", r"no scores on 'zh-mth'"),
        ({"rows": []}, None, r"no report of a comparison: IndexError"),
        ({"rows": [{"task": "a"}]}, None, r"no report of a comparison: KeyError 'share'"),
        ({"rows": curves_report()["rows"][:1]}, None, r"No row of the report is a point of a curve on 'average'"),
        ({"rows": [{**curves_report()["rows"][0], "share": False}]}, None, r"on 'average' are no shares"),
    ],
)
def test_a_report_without_curves(change: dict[str, Any], task: str | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        curve_points({**curves_report(), **change}, task)

"""The paper's figures 3 to 6 for any fusion ([Wang et al. 2024](https://arxiv.org/abs/2402.11455)), with matplotlib."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Float
from torch import Tensor

from loraflow.errors import DataError, LoraflowError
from loraflow.visual.colours import adapter_colour
from loraflow.visual.drawing import (
    LINE_STYLES,
    bar_style,
    check_figure_path,
    figure_style,
    legend_below,
    legible,
    line_style,
    one_panel,
    plain_text,
    require_matplotlib,
    save_figure,
    set_title,
)
from loraflow.visual.traced_weights import TracedWeights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Gain",
    "answer_figure",
    "check_figure_path",
    "decoding_figure",
    "layers_figure",
    "require_matplotlib",
    "save_figure",
    "transfer_figure",
    "transfer_gains",
]

TOKENS_IN_A_PANEL = 32
# In points: longer labels stand upright, or they would run into each other.
_TOKEN_WIDTH = 16


class DrawnSummary(Protocol):
    """What is drawn of the weights of many tokens at several sites: their mean, 10th and 90th percentile."""

    @property
    def mean(self) -> Float[Tensor, "sites adapters"]: ...

    @property
    def low(self) -> Float[Tensor, "sites adapters"]: ...

    @property
    def high(self) -> Float[Tensor, "sites adapters"]: ...


class DrawnLayers(Protocol):
    """What is drawn of a fusion's weights by layer."""

    @property
    def adapters(self) -> Sequence[str]: ...

    @property
    def layers(self) -> Sequence[int]: ...

    @property
    def answers(self) -> DrawnSummary: ...

    @property
    def counted(self) -> str: ...


class DrawnStatistics(DrawnLayers, Protocol):
    """What is drawn of the statistics of a fusion's weights on a data set."""

    @property
    def tenths(self) -> DrawnSummary: ...


def layers_figure(statistics: DrawnLayers, title: str | None = None) -> Figure:
    """The paper's figure 3: each adapter's mean weight in every layer, with the middle 80 % of its weights."""
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    with one_panel(title, width=6.4) as (figure, axes):
        _lines(axes, statistics.layers, statistics.answers, statistics.adapters)
        axes.set_xlabel("decoder layer (0 reads the embeddings)")
        axes.set_ylabel("fusion weight")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, statistics.adapters, f"10–90 % of {statistics.counted}")
    return figure


def decoding_figure(statistics: DrawnStatistics, title: str | None = None) -> Figure:
    """The paper's figure 4: each adapter's mean weight in every tenth of the answers, averaged over the layers."""
    tenths = len(statistics.tenths.mean)
    with one_panel(title, width=6.4) as (figure, axes):
        _lines(axes, range(1, tenths + 1), statistics.tenths, statistics.adapters)
        axes.set_xlabel("part of the answer (tenths, from its first token to its last)")
        axes.set_ylabel("fusion weight (mean of layers)")
        axes.set_xticks(range(1, tenths + 1))
        _legend(figure, statistics.adapters, "10–90 % of tokens")
    return figure


def answer_figure(trace: TracedWeights, row: int = 0, title: str | None = None) -> Figure:
    """The paper's figure 5: the weight of each token of an answer, averaged over the layers.

    A generated token has the weights that produced it (`Trace.token_weights`). Long answers go on in further panels.
    Without a `prompt_length`, all tokens are shown. Characters that no installed font has are shown as code points.

    Raises:
        LoraflowError: if nothing follows the prompt.
    """
    require_matplotlib()
    shown = [p for p in range(trace.prompt_length, len(trace.tokens[row])) if trace.attention_mask[row, p]]
    if not shown:
        raise LoraflowError(
            f"Row {row} of the trace has no token after the {trace.prompt_length} positions of its prompt. Trace the "
            "prompt together with its answer."
        )
    weights = trace.token_weights(row).double()[shown].tolist()
    labels = [_token_label(trace.tokens[row][position]) for position in shown]
    panels = [slice(at, at + TOKENS_IN_A_PANEL) for at in range(0, len(shown), TOKENS_IN_A_PANEL)]
    with figure_style():
        from matplotlib.figure import Figure

        longest = max((_width(label) for label in labels if _width(label) > _TOKEN_WIDTH), default=8)
        figure = Figure(figsize=(8.0, 0.7 + (1.35 + min(longest, 90) / 72) * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), 1, sharey=True, squeeze=False)[:, 0]
        for axes, panel in zip(grid, panels, strict=True):
            _draw_tokens(axes, labels[panel], weights[panel], len(trace.adapters))
            # The same width for a token in every panel, the last one too.
            axes.set_xlim(-0.7, min(len(labels), TOKENS_IN_A_PANEL) - 0.3)
        figure.supylabel("fusion weight (mean of layers)", fontsize=9)
        _legend(figure, trace.adapters)
        set_title(figure, title)
    return figure


@dataclass(frozen=True)
class Gain:
    """What a gate that was fitted on one task gains on another, over the comparison's reference.

    Attributes:
        gain: difference of the mean scores, in points of 100.
        interval: of the gain, or None where the report has none.
    """

    contender: str
    fitted_on: str
    task: str
    gain: float
    interval: tuple[float, float] | None

    @property
    def own(self) -> bool:
        """Whether it is the gate's own task."""
        return self.fitted_on == self.task


def transfer_gains(report: Mapping[str, Any]) -> list[Gain]:
    """The gains of every fitted gate on every task, from the report of a comparison.

    Raises:
        DataError: if it is no such report, or no gate in it has both a task that it was fitted on and a difference.
    """
    try:
        reference, tasks = report["reference"], report["tasks"]
        # Rows of averages over the tasks are left out.
        rows = [row for row in report["rows"] if row["task"] in tasks and row["fitted_on"] is not None]
        gains = [_gain(row) for row in rows if row["difference"] is not None]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"This is no report of a comparison: {type(error).__name__} {error}. Give the report.json that `loraflow "
            "compare` wrote, with `reference` and `rows` of contender, task, fitted_on, difference."
        ) from error
    if not gains:
        raise DataError(
            f"No row of the report has both `fitted_on` and a `difference` to the reference {reference!r}: there is no "
            "gate whose transfer could be shown. Compare fusions that were fitted on tasks with a reference."
        )
    return gains


def transfer_figure(report: Mapping[str, Any], title: str | None = None) -> Figure:
    """The paper's figure 6: what each gate gains over the reference on its own task, which is marked, and the others.

    Raises:
        DataError: if it is no such report, or no gate in it was fitted on a task.
    """
    gains = transfer_gains(report)
    tasks = [task for task in report["tasks"] if any(gain.task == task for gain in gains)]
    gates = list(dict.fromkeys((gain.contender, gain.fitted_on) for gain in gains))
    with one_panel(title, width=max(6.4, 1.0 + 0.22 * len(gates) * (len(tasks) + 1))) as (figure, axes):
        width = 0.84 / len(tasks)
        for index, task in enumerate(tasks):
            mine = [gain for gain in gains if gain.task == task]
            places = [
                gates.index((gain.contender, gain.fitted_on)) + (index - (len(tasks) - 1) / 2) * width for gain in mine
            ]
            _draw_gains(axes, places, mine, width, index)
        axes.axhline(0, color="black", linewidth=0.8)
        labels = [name if fitted_on in name else f"{name}\n({fitted_on})" for name, fitted_on in gates]
        axes.set_xticks(range(len(gates)), [legible(label) for label in labels])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(legible(f"gain over {report['reference']} (points)"), parse_math=False)
        plain_text(axes.get_xticklabels())
        legend_below(figure, *_task_handles(tasks))
    return figure


def _gain(row: Mapping[str, Any]) -> Gain:
    interval = row.get("difference_interval")
    ends = None if interval is None else (100 * interval[0], 100 * interval[1])
    return Gain(row["contender"], row["fitted_on"], row["task"], 100 * row["difference"], ends)


def _draw_gains(axes: Axes, places: Sequence[float], gains: Sequence[Gain], width: float, index: int) -> None:
    heights = [gain.gain for gain in gains]
    axes.bar(places, heights, width, **bar_style(index))
    for place, gain in zip(places, gains, strict=True):
        low, high = gain.interval or (gain.gain, gain.gain)
        if gain.interval is not None:
            # White about the line, or hatches would hide it.
            axes.plot([place, place], [low, high], color="white", linewidth=2.6, solid_capstyle="butt")
            axes.plot([place, place], [low, high], color="black", linewidth=1.1, solid_capstyle="butt")
        if gain.own:
            top = max(high, gain.gain, 0)
            axes.annotate(
                "★", (place, top), (0, 2), textcoords="offset points", ha="center", va="bottom", gid="own task"
            )


def _task_handles(tasks: Sequence[str]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    star = Line2D([], [], linestyle="", marker="*", color="black")
    return [*(Patch(**bar_style(i)) for i in range(len(tasks))), star], [*tasks, "own task"]


def _lines(axes: Axes, at: Sequence[int], summary: DrawnSummary, adapters: Sequence[str]) -> None:
    """One line for each adapter with the band of its percentiles, which two thin lines of its style bound."""
    for index in range(len(adapters)):
        low, high = summary.low[:, index].tolist(), summary.high[:, index].tolist()
        style = LINE_STYLES[index % len(LINE_STYLES)]
        axes.fill_between(at, low, high, color=adapter_colour(index), alpha=0.15, linewidth=0)
        for edge in (low, high):
            axes.plot(at, edge, color=adapter_colour(index), linestyle=style, linewidth=0.5, alpha=0.8)
        axes.plot(at, summary.mean[:, index].tolist(), **line_style(index))
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.grid(axis="y", color="0.9", linewidth=0.6)


def _width(label: str) -> int:
    """Roughly the width of a label in points, at 8 points."""
    return sum(8 if unicodedata.east_asian_width(c) in "WF" else 5 for c in label)


def _draw_tokens(axes: Axes, labels: Sequence[str], weights: Sequence[Sequence[float]], adapters: int) -> None:
    at = range(len(labels))
    for index in range(adapters):
        axes.plot(at, [row[index] for row in weights], **{**line_style(index), "markersize": 3.5, "linewidth": 1.0})
    axes.set_xticks(at, labels, fontsize=8)
    plain_text(axes.get_xticklabels())
    for text in axes.get_xticklabels():
        text.set_rotation(90 if _width(text.get_text()) > _TOKEN_WIDTH else 0)
    axes.tick_params(axis="x", length=2)
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.grid(axis="both", color="0.92", linewidth=0.5)


def _legend(figure: Figure, adapters: Sequence[str], band: str | None = None) -> None:
    """The adapters' lines, and what the bands about them are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], **line_style(index)) for index in range(len(adapters))]
    names = list(adapters)
    if band is not None:
        handles.append(Patch(facecolor="0.88", edgecolor="0.4", linewidth=0.5))
        names.append(band)
    legend_below(figure, handles, names)


def _token_label(token: str) -> str:
    """A token as a label: line ends and lone spaces visible, spaces beside other text left out."""
    if not token:
        return ""
    seen = token.strip(" ") or "␣"
    return legible(seen.replace("\n", "↵").replace("\t", "⇥").replace("\r", "↵"))

"""The paper's figures 3 to 6 for any fusion ([Wang et al. 2024](https://arxiv.org/abs/2402.11455)), with matplotlib.

Each adapter has its colour (`colours`), and a line style, marker and hatch of its own, so that a figure reads in black
and white too. Figures are made without pyplot: no window, no global state, safe beside a user's own plots.
"""

from __future__ import annotations

import contextlib
import functools
import io
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraflow.errors import DataError, LoraflowError
from loraflow.files import write_atomically
from loraflow.visual.colours import adapter_colour
from loraflow.visual.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from loraflow.analysis.weights import WeightStatistics, WeightSummary

FORMATS = (".png", ".svg", ".pdf")
LINE_STYLES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (1, 1)),
    (0, (8, 2, 1, 2, 1, 2)),
    (0, (3, 1)),
    (0, (10, 3)),
    (0, (1, 2.5)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo", "----")
TOKENS_IN_A_PANEL = 32
# In points: longer labels stand upright, or they would run into each other.
_TOKEN_WIDTH = 16

_TEXT_FONT = "DejaVu Sans"
# matplotlib's own font has no Chinese, Japanese or Korean; of these the first that is installed is taken.
_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Noto Serif CJK SC",
    "Noto Serif CJK JP",
    "Arial Unicode MS",
    "Unifont",
)
# Its axes, legends and files; what a user has set for matplotlib stays out.
_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    # Paths, not text: a reader's machine may have other fonts, or none with these characters.
    "svg.fonttype": "path",
    # Files of the same figure are the same, byte for byte.
    "svg.hashsalt": "loraflow",
}


def require_matplotlib() -> Any:
    """matplotlib, or an error that says how to get it.

    Raises:
        LoraflowError: if it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise LoraflowError("Figures need matplotlib. Run: pip install 'loraflow[plots]'") from error
    return matplotlib


def check_figure_path(path: str | Path) -> list[Path]:
    """The files that `save_figure` would write.

    Raises:
        LoraflowError: if the ending is of another format.
    """
    path = Path(path).expanduser()
    if not path.suffix:
        return [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    if path.suffix.lower() not in FORMATS:
        raise LoraflowError(
            f"The figure's path {str(path)!r} ends in {path.suffix!r}. Let it end in {', '.join(FORMATS)}, or in "
            "nothing for .png and .svg both."
        )
    return [path]


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure, each file in one step.

    Args:
        figure: what a function of this module made.
        path: ends in .png, .svg or .pdf; without an ending, .png and .svg are both written.

    Returns:
        The files.

    Raises:
        LoraflowError: if the ending is of another format.
    """
    files = check_figure_path(path)
    for file in files:
        kind = file.suffix.lower().removeprefix(".")
        dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        content = io.BytesIO()
        with _style():
            figure.savefig(content, format=kind, dpi=200, metadata=dated)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.getvalue())
    return files


def layers_figure(statistics: WeightStatistics, title: str | None = None) -> Figure:
    """The paper's figure 3: each adapter's mean weight in every layer, with the middle 80 % of its weights.

    Args:
        statistics: of the fusion's weights.
        title: above the figure.

    Returns:
        One line for each adapter.
    """
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    with _one_panel(title, width=6.4) as (figure, axes):
        _lines(axes, statistics.layers, statistics.answers, statistics.adapters)
        axes.set_xlabel("decoder layer (0 reads the embeddings)")
        axes.set_ylabel("fusion weight")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, statistics.adapters, f"10–90 % of {statistics.counted}")
    return figure


def decoding_figure(statistics: WeightStatistics, title: str | None = None) -> Figure:
    """The paper's figure 4: each adapter's mean weight in every tenth of the answers, averaged over the layers.

    Args:
        statistics: of the fusion's weights.
        title: above the figure.

    Returns:
        One line for each adapter.
    """
    tenths = len(statistics.tenths.count)
    with _one_panel(title, width=6.4) as (figure, axes):
        _lines(axes, range(1, tenths + 1), statistics.tenths, statistics.adapters)
        axes.set_xlabel("part of the answer (tenths, from its first token to its last)")
        axes.set_ylabel("fusion weight (mean of layers)")
        axes.set_xticks(range(1, tenths + 1))
        _legend(figure, statistics.adapters, "10–90 % of tokens")
    return figure


def answer_figure(trace: Trace, row: int = 0, title: str | None = None) -> Figure:
    """The paper's figure 5: the weight of each token of an answer, averaged over the layers.

    A generated token has the weights that produced it (`Trace.token_weights`). Long answers go on in further panels.
    Characters that no installed font has are shown as their code points.

    Args:
        trace: of a prompt and its answer; without a `prompt_length`, all tokens are shown.
        row: which row of the trace.
        title: above the figure.

    Returns:
        One line for each adapter in every panel.

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
    with _style():
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
        _title(figure, title)
    return figure


@dataclass(frozen=True)
class Gain:
    """What a gate that was fitted on one task gains on another, over the comparison's reference.

    Attributes:
        contender: the gate's name.
        fitted_on: the task that it was fitted on.
        task: the task that it answered.
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
    """The paper's figure 6: what each gate gains over the reference on its own task and on the others.

    Args:
        report: of `loraflow compare`, its `report.json` as an object.
        title: above the figure.

    Returns:
        A group of bars for each gate, one for each task, with intervals where there are any; its own task is marked.

    Raises:
        DataError: if it is no such report, or no gate in it was fitted on a task.
    """
    gains = transfer_gains(report)
    tasks = [task for task in report["tasks"] if any(gain.task == task for gain in gains)]
    gates = list(dict.fromkeys((gain.contender, gain.fitted_on) for gain in gains))
    with _one_panel(title, width=max(6.4, 1.0 + 0.22 * len(gates) * (len(tasks) + 1))) as (figure, axes):
        width = 0.84 / len(tasks)
        for index, task in enumerate(tasks):
            mine = [gain for gain in gains if gain.task == task]
            places = [
                gates.index((gain.contender, gain.fitted_on)) + (index - (len(tasks) - 1) / 2) * width for gain in mine
            ]
            _draw_gains(axes, places, mine, width, index)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(gates)), [_legible(_gate_label(*gate)) for gate in gates])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(_legible(f"gain over {report['reference']} (points)"), parse_math=False)
        _plain_text(axes.get_xticklabels())
        _legend_below(figure, *_task_handles(tasks))
    return figure


def _gain(row: Mapping[str, Any]) -> Gain:
    interval = row.get("difference_interval")
    ends = None if interval is None else (100 * interval[0], 100 * interval[1])
    return Gain(row["contender"], row["fitted_on"], row["task"], 100 * row["difference"], ends)


def _draw_gains(axes: Axes, places: Sequence[float], gains: Sequence[Gain], width: float, index: int) -> None:
    heights = [gain.gain for gain in gains]
    axes.bar(places, heights, width, **_bar_style(index))
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


def _bar_style(index: int) -> dict[str, Any]:
    return {
        "facecolor": adapter_colour(index),
        "hatch": HATCHES[index % len(HATCHES)],
        "edgecolor": "black",
        "linewidth": 0.6,
    }


def _gate_label(contender: str, fitted_on: str) -> str:
    return contender if fitted_on in contender else f"{contender}\n({fitted_on})"


def _task_handles(tasks: Sequence[str]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    star = Line2D([], [], linestyle="", marker="*", color="black")
    return [*(Patch(**_bar_style(i)) for i in range(len(tasks))), star], [*tasks, "own task"]


def _lines(axes: Axes, at: Sequence[int], summary: WeightSummary, adapters: Sequence[str]) -> None:
    """One line for each adapter with the band of its percentiles, which two thin lines of its style bound."""
    for index in range(len(adapters)):
        low, high = summary.low[:, index].tolist(), summary.high[:, index].tolist()
        style = LINE_STYLES[index % len(LINE_STYLES)]
        axes.fill_between(at, low, high, color=adapter_colour(index), alpha=0.15, linewidth=0)
        for edge in (low, high):
            axes.plot(at, edge, color=adapter_colour(index), linestyle=style, linewidth=0.5, alpha=0.8)
        axes.plot(at, summary.mean[:, index].tolist(), **_line_style(index))
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.grid(axis="y", color="0.9", linewidth=0.6)


def _width(label: str) -> int:
    """Roughly the width of a label in points, at 8 points."""
    return sum(8 if unicodedata.east_asian_width(c) in "WF" else 5 for c in label)


def _draw_tokens(axes: Axes, labels: Sequence[str], weights: Sequence[Sequence[float]], adapters: int) -> None:
    at = range(len(labels))
    for index in range(adapters):
        axes.plot(at, [row[index] for row in weights], **{**_line_style(index), "markersize": 3.5, "linewidth": 1.0})
    axes.set_xticks(at, labels, fontsize=8)
    _plain_text(axes.get_xticklabels())
    for text in axes.get_xticklabels():
        text.set_rotation(90 if _width(text.get_text()) > _TOKEN_WIDTH else 0)
    axes.tick_params(axis="x", length=2)
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.grid(axis="both", color="0.92", linewidth=0.5)


def _line_style(index: int) -> dict[str, Any]:
    return {
        "color": adapter_colour(index),
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linewidth": 1.6,
        "markersize": 5.0,
        "markeredgecolor": "black",
        "markeredgewidth": 0.4,
    }


def _legend(figure: Figure, adapters: Sequence[str], band: str | None = None) -> None:
    """The adapters' lines, and what the bands about them are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], **_line_style(index)) for index in range(len(adapters))]
    names = list(adapters)
    if band is not None:
        handles.append(Patch(facecolor="0.88", edgecolor="0.4", linewidth=0.5))
        names.append(band)
    _legend_below(figure, handles, names)


def _legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    legend = figure.legend(
        handles,
        [_legible(name) for name in names],
        loc="outside lower center",
        ncols=min(len(names), 4),
        # Long dashes need long handles to be told from lines.
        handlelength=3.2,
    )
    _plain_text(legend.get_texts())


@contextlib.contextmanager
def _one_panel(title: str | None, width: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes, to be drawn within the block."""
    require_matplotlib()
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, 3.6), layout="constrained")
        yield figure, figure.add_subplot()
        _title(figure, title)


def _title(figure: Figure, title: str | None) -> None:
    if title is not None:
        figure.suptitle(_legible(title), fontsize=10).set_parse_math(False)


def _plain_text(texts: Iterable[Text]) -> None:
    # A dollar sign in a token or a name is no formula.
    for text in texts:
        text.set_parse_math(False)


def _style() -> contextlib.AbstractContextManager[None]:
    matplotlib = require_matplotlib()
    # Setting even the same backend would import pyplot.
    default = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    return matplotlib.rc_context({**default, **_STYLE, "font.family": list(_fonts())})


@functools.cache
def _fonts() -> tuple[str, ...]:
    """Families of fonts, each for the characters that those before it do not have."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    cjk = next((name for name in _CJK_FONTS if name in installed), None)
    return (_TEXT_FONT,) if cjk is None else (_TEXT_FONT, cjk)


@functools.cache
def _has_character(family: str, character: str) -> bool:
    from matplotlib.font_manager import findfont, get_font

    return bool(get_font(findfont(family)).get_char_index(ord(character)))


def _legible(text: str) -> str:
    """The text with the code points of characters that would be empty boxes (and a warning each)."""
    return "".join(
        c if c == "\n" or any(_has_character(family, c) for family in _fonts()) else f"[{ord(c):X}]" for c in text
    )


def _token_label(token: str) -> str:
    """A token as a label: line ends and lone spaces visible, spaces beside other text left out."""
    if not token:
        return ""
    seen = token.strip(" ") or "␣"
    return _legible(seen.replace("\n", "↵").replace("\t", "⇥").replace("\r", "↵"))

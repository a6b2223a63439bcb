"""How all figures look: formats, fonts, and the line, marker and hatch of each adapter.

Each adapter has its colour (`colours`), and a line style, marker and hatch of its own, so that a figure reads in black
and white too. Figures are made without pyplot: no window, no global state, safe beside a user's own plots.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraflow.errors import LoraflowError
from loraflow.files import write_atomically
from loraflow.visual.colours import adapter_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

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
    """Write a figure, each file in one step; .png and .svg both where the path has no ending.

    Raises:
        LoraflowError: if the ending is of another format.
    """
    files = check_figure_path(path)
    for file in files:
        kind = file.suffix.lower().removeprefix(".")
        dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        content = io.BytesIO()
        with figure_style():
            figure.savefig(content, format=kind, dpi=200, metadata=dated)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.getvalue())
    return files


def bar_style(index: int) -> dict[str, Any]:
    """Of the bars of the thing at this place in the order."""
    return {
        "facecolor": adapter_colour(index),
        "hatch": HATCHES[index % len(HATCHES)],
        "edgecolor": "black",
        "linewidth": 0.6,
    }


def line_style(index: int) -> dict[str, Any]:
    """Of the line of the adapter at this place in the order."""
    return {
        "color": adapter_colour(index),
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linewidth": 1.6,
        "markersize": 5.0,
        "markeredgecolor": "black",
        "markeredgewidth": 0.4,
    }


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Put a legend below the axes."""
    legend = figure.legend(
        handles,
        [legible(name) for name in names],
        loc="outside lower center",
        ncols=min(len(names), 4),
        # Long dashes need long handles to be told from lines.
        handlelength=3.2,
    )
    plain_text(legend.get_texts())


@contextlib.contextmanager
def one_panel(title: str | None, width: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes, to be drawn within the block."""
    require_matplotlib()
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, 3.6), layout="constrained")
        yield figure, figure.add_subplot()
        set_title(figure, title)


def set_title(figure: Figure, title: str | None) -> None:
    """Put a title above all, where there is one."""
    if title is not None:
        figure.suptitle(legible(title), fontsize=10).set_parse_math(False)


def plain_text(texts: Iterable[Text]) -> None:
    """Have texts drawn as they are: a dollar sign in a token or a name is no formula."""
    for text in texts:
        text.set_parse_math(False)


def figure_style() -> contextlib.AbstractContextManager[None]:
    """What figures are drawn and saved in."""
    matplotlib = require_matplotlib()
    # Setting even the same backend would import pyplot.
    default = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    return matplotlib.rc_context({**default, **_STYLE, "font.family": list(fonts())})


@functools.cache
def fonts() -> tuple[str, ...]:
    """Families of fonts, each for the characters that those before it do not have."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    cjk = next((name for name in _CJK_FONTS if name in installed), None)
    return (_TEXT_FONT,) if cjk is None else (_TEXT_FONT, cjk)


@functools.cache
def _has_character(family: str, character: str) -> bool:
    from matplotlib.font_manager import findfont, get_font

    return bool(get_font(findfont(family)).get_char_index(ord(character)))


def legible(text: str) -> str:
    """The text with the code points of characters that would be empty boxes (and a warning each)."""
    return "".join(
        c if c == "\n" or any(_has_character(family, c) for family in fonts()) else f"[{ord(c):X}]" for c in text
    )

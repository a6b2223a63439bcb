"""A trace in the terminal: each token in the colour of the adapter that dominates it.

Without colours, the adapter's name stands before its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from loraflow.visual.colours import adapter_colour
from loraflow.visual.dominance import dominating
from loraflow.visual.tokens import printable
from loraflow.visual.traced_weights import TracedWeights

# Stands where an adapter's name would, in text and tables.
_EVEN = "even"


def render_trace(trace: TracedWeights, row: int = 0, *, numbers: bool = False) -> RenderableType:
    """One row of a trace: a legend, the coloured text, a summary, and on request every token's weights as a table."""
    parts: list[RenderableType] = [_Legend(trace), _Text(trace, row)]
    parts += [Text(note, style="dim") for note in trace.notes()]
    parts.append(_summary(trace, row))
    if trace.level == "query":
        weights = enumerate(trace.layer_weights(row).tolist())
        parts.append(_weight_table(trace, ["layer"], (([str(layer)], of_layer) for layer, of_layer in weights)))
    mean = trace.mean_readings()
    if mean is not None:
        parts.append(_readings(trace, mean))
    if numbers:
        parts.append(_table(trace, row))
    return Group(*parts)


@dataclass(frozen=True)
class _Legend:
    trace: TracedWeights

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        legend = Text("largest weight: ")
        if _has_colours(console):
            for index, name in enumerate(self.trace.adapters):
                legend.append(f" {printable(name)} ", style=f"reverse {adapter_colour(index)}").append(" ")
        else:
            legend.append("[name] stands before the tokens that the adapter dominates ")
        if self.trace.prompt_length:
            legend.append(
                "(a generated token shows the weights that produced it, those of the position before)", style="dim"
            )
        yield legend


@dataclass(frozen=True)
class _Text:
    trace: TracedWeights
    row: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield (coloured_text if _has_colours(console) else marked_text)(self.trace, self.row)


def coloured_text(trace: TracedWeights, row: int = 0) -> Text:
    """The tokens, each in its adapter's colour; generated ones are bold."""
    text = Text()
    for position, token, top in _shown(trace, row):
        style = "" if top is None else adapter_colour(top)
        if trace.prompt_length and position == trace.prompt_length:
            text.append(" ▸ ", style="dim")
        generated = bool(trace.prompt_length) and position >= trace.prompt_length
        text.append(printable(token), style=f"bold {style}" if generated else f"{style} dim")
    return text


def marked_text(trace: TracedWeights, row: int = 0) -> Text:
    """The tokens, with the adapter's name wherever another one takes over."""
    text = Text()
    before: int | None = -1
    for position, token, top in _shown(trace, row):
        starts = bool(trace.prompt_length) and position == trace.prompt_length
        if starts:
            text.append(" ▸")
        if starts or top != before:
            name = _EVEN if top is None else trace.adapters[top]
            text.append(f"{' ' if text.plain else ''}[{printable(name)}] ")
        text.append(printable(token))
        before = top
    return text


def _summary(trace: TracedWeights, row: int) -> Table:
    """For prompt and generated part: the share of the tokens that each adapter dominates, and its mean weight."""
    prompt, generated = trace.shown_positions(row)
    parts = {"prompt" if trace.prompt_length else "text": prompt, "generated": generated}
    parts = {name: positions for name, positions in parts.items() if positions}
    weights = trace.token_weights(row)
    heads = [Column(head, justify="right") for name in parts for head in (f"of {name}", "mean weight")]
    table = Table(Column("adapter"), *heads, box=None)
    tops = {name: [dominating(weights[p].tolist()) for p in positions] for name, positions in parts.items()}
    for index, adapter in enumerate(trace.adapters):
        cells = [
            cell
            for name, positions in parts.items()
            for cell in (_share(tops[name], index), f"{weights[positions, index].mean():+.3f}")
        ]
        table.add_row(Text(printable(adapter)), *cells)
    if any(None in found for found in tops.values()):
        table.add_row(_EVEN, *(cell for found in tops.values() for cell in (_share(found, None), "")))
    return table


def _readings(trace: TracedWeights, mean: Float[Tensor, "writers readers"]) -> Table:
    """Who reads whom, in the mean over the linears."""
    table = Table("written by", *(Column(f"read by {printable(name)}") for name in trace.adapters), box=None)
    for name, row in zip(trace.adapters, mean.tolist(), strict=True):
        table.add_row(Text(printable(name)), *(f"{size:.3f}" for size in row))
    return table


def _share(tops: list[int | None], wanted: int | None) -> str:
    return f"{tops.count(wanted) / len(tops):.0%}"


def _table(trace: TracedWeights, row: int) -> Table:
    weights = trace.token_weights(row).tolist()
    rows = (([str(position), repr(token)], weights[position]) for position, token, _ in _shown(trace, row))
    return _weight_table(trace, ["position", "token"], rows)


def _weight_table(trace: TracedWeights, heads: list[str], rows: Iterable[tuple[list[str], list[float]]]) -> Table:
    table = Table(*heads, *(Column(Text(printable(name))) for name in trace.adapters), box=None)
    for cells, weights in rows:
        table.add_row(*map(Text, cells), *(f"{weight:+.3f}" for weight in weights))
    return table


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _shown(trace: TracedWeights, row: int) -> list[tuple[int, str, int | None]]:
    """Position, text and dominating adapter of each token."""
    weights, (prompt, generated) = trace.token_weights(row).tolist(), trace.shown_positions(row)
    return [(p, trace.tokens[row][p], dominating(weights[p])) for p in prompt + generated]

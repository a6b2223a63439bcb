"""A trace in the terminal: each token in the colour of the adapter that dominates it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from loraflow.visual.colours import adapter_colour
from loraflow.visual.trace import Trace


def render_trace(trace: Trace, row: int = 0, *, numbers: bool = False) -> RenderableType:
    """One row of a trace: a legend, the coloured text, and on request every token's weights as a table."""
    parts: list[RenderableType] = [_legend(trace), _text(trace, row)]
    if numbers:
        parts.append(_table(trace, row))
    return Group(*parts)


def _legend(trace: Trace) -> Text:
    legend = Text("largest weight: ")
    for index, name in enumerate(trace.adapters):
        legend.append(f" {name} ", style=f"reverse {adapter_colour(index)}").append(" ")
    if trace.prompt_length:
        legend.append(
            "(a generated token shows the weights that produced it, those of the position before)", style="dim"
        )
    return legend


def _text(trace: Trace, row: int) -> Text:
    text = Text()
    weights = trace.token_weights(row)
    for position, token in _shown(trace, row):
        style = adapter_colour(int(weights[position].argmax()))
        generated = bool(trace.prompt_length) and position >= trace.prompt_length
        text.append(_printable(token), style=f"bold {style}" if generated else f"{style} dim")
        if position == trace.prompt_length - 1:
            text.append(" ▸ ", style="dim")
    return text


def _table(trace: Trace, row: int) -> Table:
    table = Table("position", "token", *(Column(Text(name)) for name in trace.adapters), box=None)
    weights = trace.token_weights(row)
    for position, token in _shown(trace, row):
        table.add_row(str(position), Text(repr(token)), *(f"{weight:+.3f}" for weight in weights[position].tolist()))
    return table


def _printable(token: str) -> str:
    # Control characters of a model's output must not reach the terminal, where they could do anything.
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in token)


def _shown(trace: Trace, row: int) -> list[tuple[int, str]]:
    return [(p, token) for p, token in enumerate(trace.tokens[row]) if trace.attention_mask[row, p]]

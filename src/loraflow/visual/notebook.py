"""A trace as a piece of HTML for notebooks: no script, no outside asset."""

from __future__ import annotations

from html import escape

from loraflow.visual.colours import NEUTRAL, adapter_colour
from loraflow.visual.dominance import dominance, dominating
from loraflow.visual.traced_weights import TracedWeights


def trace_html(trace: TracedWeights) -> str:
    """Every row's text, each token on the colour of the adapter with the largest weight; numbers on hover."""
    legend = " ".join(_swatch(name, adapter_colour(i)) for i, name in enumerate(trace.adapters))
    note = (
        "A generated token has the colour of the weights that produced it, those of the position before it."
        if trace.prompt_length
        else "Each token has the colour of the weights computed at its position."
    )
    note = " ".join([note, *trace.notes()])
    rows = "".join(_row(trace, row) for row in range(len(trace.tokens)))
    return (
        f'<div style="font-family:monospace;line-height:1.9"><div>{legend}</div>'
        f'<div style="font-size:85%;opacity:.7">{note}</div>{rows}</div>'
    )


def _row(trace: TracedWeights, row: int) -> str:
    weights = trace.token_weights(row)
    spans = []
    for position, token in enumerate(trace.tokens[row]):
        if not trace.attention_mask[row, position]:
            continue
        if trace.prompt_length and position == trace.prompt_length:
            spans.append('<span style="opacity:.6"> ▸ </span>')
        spans.append(_token(token, weights[position].tolist(), trace.adapters))
    return f'<div style="white-space:pre-wrap;margin-top:.5em">{"".join(spans)}</div>'


def _token(token: str, weights: list[float], adapters: tuple[str, ...]) -> str:
    top = dominating(weights)
    colour = NEUTRAL if top is None else adapter_colour(top)
    numbers = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(adapters, weights, strict=True))
    opacity = round(255 * (0.15 + 0.45 * dominance(weights)))
    style = f"background:{colour}{opacity:02x};border-radius:3px"
    return f'<span title="{escape(numbers, quote=True)}" style="{style}">{escape(token)}</span>'


def _swatch(name: str, colour: str) -> str:
    return f'<span style="background:{colour}99;border-radius:3px;padding:0 .4em">{escape(name)}</span>'

"""A page that lets a reader explore traces of one text: all methods, layers and adapters, in one file without network.

The page is `web/explorer.html` with its style, its script and the traces in it (`pages`). The weights are 16-bit
integers: each is exact to 1/65534 of its trace's largest absolute weight, that is to 0.00002 where weights go up to 1.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.errors import LoraflowError
from loraflow.files import write_atomically
from loraflow.visual.colours import adapter_styles
from loraflow.visual.dominance import EVEN
from loraflow.visual.pages import policy_source, read_page
from loraflow.visual.tokens import printable
from loraflow.visual.traced_weights import TracedWeights

TITLE = "Fusion weights"

_LARGEST = 2**15 - 1
# Ends of the colour scale, times a power of ten.
_STEPS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
# A few extreme weights must not make all others pale.
_WITHIN_SCALE = 0.995


def explorer_html(traces: Mapping[str, TracedWeights], *, title: str = TITLE, row: int = 0) -> str:
    """The page that shows one row of some traces side by side.

    Raises:
        LoraflowError: if there is no trace or token, they are not of the same text and adapters, or a weight is not
            finite.
    """
    if not traces:
        raise LoraflowError("There are no traces to show. Give at least one, by name.")
    first = next(iter(traces.values()))
    if not 0 <= row < len(first.tokens):
        raise LoraflowError(
            f"`row` (={row}) must be between 0 and the last row of the trace (={len(first.tokens) - 1})."
        )
    for name, trace in traces.items():
        _check_same(next(iter(traces)), first, name, trace)
        _check_row(name, trace, row)
    page = read_page("loraflow.visual", "explorer", adapter_styles("data-adapter", len(first.adapters)))
    return page.html(
        title=escape(title), script_source=policy_source(page.script), data=_script_json(_content(traces, row))
    )


def save_explorer(traces: Mapping[str, TracedWeights], path: str | Path, *, title: str = TITLE, row: int = 0) -> None:
    """Write `explorer_html` to a file.

    Raises:
        LoraflowError: if the file cannot be written, or `explorer_html` refuses the traces.
    """
    path = Path(path).expanduser()
    page = explorer_html(traces, title=title, row=row)
    if path.is_dir():
        raise LoraflowError(f"{path} is a directory. Give a file, such as {path / 'trace.html'}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode())
    except OSError as error:
        raise LoraflowError(f"{path} cannot be written: {error}. Give another file.") from error


def encode_weights(weights: Float[Tensor, "tokens layers adapters"]) -> dict[str, Any]:
    """Weights as the page reads them.

    Args:
        weights: finite numbers.

    Returns:
        `data`, little-endian 16-bit integers in base64; `scale`, what they are multiplied by; and `tokens`, how many
        are stored: one, where all tokens have the same weights.
    """
    if torch.equal(weights, weights[:1].expand_as(weights)):
        weights = weights[:1]
    largest = weights.abs().max().item() if weights.numel() else 0.0
    scale = largest / _LARGEST or 1.0
    integers = (weights.double() / scale).round().to(torch.int16).numpy().astype("<i2")
    return {"data": base64.b64encode(integers.tobytes()).decode(), "scale": scale, "tokens": len(weights)}


def colour_range(weights: list[Float[Tensor, "tokens layers adapters"]]) -> dict[str, float | int]:
    """The range of the heat maps' colours, one for all, so that they can be compared.

    It reaches from 0, or from minus the upper end where a weight is negative, to a round number that at least 99.5 % of
    the absolute weights do not exceed; `clipped` counts those beyond it, `smallest` and `largest` are the weights' own.
    """
    values = torch.cat([w.flatten() for w in weights]).double()
    absolute = values.abs().sort().values
    reach = absolute[min(len(absolute) - 1, int(_WITHIN_SCALE * len(absolute)))].item()
    high = _round_up(reach)
    return {
        "low": -high if values.min().item() < -EVEN / 2 else 0.0,
        "high": high,
        "clipped": int((absolute > high * (1 + 1e-6)).sum()),
        "smallest": values.min().item(),
        "largest": values.max().item(),
    }


def _content(traces: Mapping[str, TracedWeights], row: int) -> dict[str, Any]:
    first = next(iter(traces.values()))
    prompt, generated = first.shown_positions(row)
    positions = prompt + generated
    shown = {name: trace.shown_weights(row)[positions].float() for name, trace in traces.items()}
    return {
        "tokens": [printable(first.tokens[row][p]) for p in positions],
        "positions": positions,
        "promptTokens": len(prompt),
        "knowsPrompt": bool(first.prompt_length),
        "layers": first.weights.shape[2],
        "adapters": [{"name": printable(name)} for name in first.adapters],
        "range": colour_range(list(shown.values())),
        "methods": [
            {"name": printable(name), "notes": trace.notes(), **encode_weights(shown[name])}
            for name, trace in traces.items()
        ],
    }


def _script_json(content: dict[str, Any]) -> str:
    """JSON in ASCII that ends no script element, whatever the tokens say."""
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(content, separators=(",", ":")))


def _round_up(value: float) -> float:
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in _STEPS if value <= step * power * (1 + 1e-6))


def _check_same(name: str, first: TracedWeights, other_name: str, other: TracedWeights) -> None:
    """Check that two traces can stand side by side.

    Raises:
        LoraflowError: if their text, adapters, layers or prompt lengths differ.
    """
    found = {
        "tokens": (first.input_ids.tolist(), other.input_ids.tolist()),
        "padding": (first.attention_mask.tolist(), other.attention_mask.tolist()),
        "prompt length": (first.prompt_length, other.prompt_length),
        "adapters": (first.adapters, other.adapters),
        "number of layers": (first.weights.shape[2], other.weights.shape[2]),
    }
    for what, (mine, theirs) in found.items():
        if mine != theirs:
            values = "" if what in ("tokens", "padding") else f" ({mine!r} and {theirs!r})"
            raise LoraflowError(
                f"The traces {name!r} and {other_name!r} differ in their {what}{values}. "
                "Trace the same `input_ids` by each method of one fusion."
            )


def _check_row(name: str, trace: TracedWeights, row: int) -> None:
    """Check that a picture can be made of the weights.

    Raises:
        LoraflowError: if there are no tokens, or a weight is not finite.
    """
    if not trace.attention_mask[row].any():
        raise LoraflowError(f"Row {row} of the trace {name!r} has no tokens, only padding. Show another row.")
    wrong = (~trace.weights[row].isfinite() & trace.attention_mask[row].bool()[:, None, None]).nonzero()
    if len(wrong):
        position, layer, adapter = wrong[0].tolist()
        raise LoraflowError(
            f"The trace {name!r} has {len(wrong)} weights that are not finite, the first at position {position}, layer "
            f"{layer}, adapter {trace.adapters[adapter]!r}. Look for the overflow: try float32."
        )

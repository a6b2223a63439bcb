"""Fusion weights that a request brings with it, as they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraflow.errors import MethodError
from loraflow.methods.checks import check_weights

KEY = "adapter_weights"
AVERAGE = "average"
"""Instead of weights: every adapter has the same, and together they have 1."""

SCHEDULER = "loraflow.serving.vllm.scheduler.SaltedScheduler"
"""What `--scheduler-cls` (or `LLM(scheduler_cls=...)`) is given: requests of other weights then share no prefixes."""

_PROCESSORS = "loraflow.serving.vllm.requests:For_"


def processor_name(fusion: str) -> str:
    """What `--logits-processors` (or `LLM(logits_processors=[...])`) is given, so that requests may bring weights.

    vLLM knows classes by name only, and calls this one before it has read any model: the name says which fusion.
    """
    return f"{_PROCESSORS}{fusion.encode().hex()}"


def fusion_of(name: str) -> str | None:
    """The fusion in such a name, or None where the name is another's."""
    return bytes.fromhex(name.removeprefix(_PROCESSORS)).decode() if name.startswith(_PROCESSORS) else None


def parse_weights(value: Any, adapters: Sequence[str], layers: int) -> list[list[float]]:
    """The weights of a request, a row for each layer.

    Args:
        value: weights by adapter name, for all layers, or a list of such, one for each layer; or that as JSON text,
            which is what HTTP requests can carry. Adapters that are not named get 0. Or `AVERAGE`.
        adapters: names of the adapters, in order.
        layers: number of decoder layers.

    Raises:
        MethodError: if it is something else, names an unknown adapter, or is for another number of layers.
    """
    if value == AVERAGE:
        return [[1 / len(adapters)] * len(adapters)] * layers
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise MethodError(f"`{KEY}` (={value!r}) is not valid JSON ({error}).") from error
    rows = list(value) if isinstance(value, list | tuple) else [value] * layers
    if len(rows) != layers:
        raise MethodError(f"`{KEY}` is for {len(rows)} layers, but the base has {layers}.")
    for row in rows if isinstance(value, list | tuple) else rows[:1]:
        check_weights(row, adapters, KEY)
    return [[float(row.get(name, 0.0)) for name in adapters] for row in rows]


def check_request(extra: Mapping[str, Any] | None, adapters: Sequence[str], layers: int, *, required: bool) -> None:
    """Check the weights that a request brings.

    Raises:
        MethodError: if they are missing or wrong.
    """
    value = (extra or {}).get(KEY)
    if value is not None:
        parse_weights(value, adapters, layers)
    elif required:
        raise MethodError(
            f"The request brings no `{KEY}`, and the fusion's method weighs whole prompts, which vLLM does not show to "
            "a plug-in. Give them: `model.weigh(prompt_ids)` computes them."
        )

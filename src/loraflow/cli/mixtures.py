"""Examples of several sources after one option, in proportions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from loraflow.examples import Example, Fields


def read_mixture(sources: Sequence[str], fields: Fields | None, seed: int) -> list[Example]:
    """The examples of `a.jsonl b.csv`, all of them, or of `a.jsonl=0.7 b.csv=0.3`, in these proportions.

    Raises:
        LoraflowError: if some of the sources have weights, and others none.
    """
    from loraflow.examples import mix, read_examples

    pairs = [_weighed(source) for source in sources]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        bare = next(source for source, weight in pairs if weight is None)
        raise LoraflowError(f"`--data` gives some sources a weight, and {bare!r} none. Give all of them one, or none.")
    return mix([read_examples(source, fields) for source, _ in pairs], weights or None, seed=seed)


def _weighed(source: str) -> tuple[str, float | None]:
    """Source and weight; a name that has an equals sign in it need not have one."""
    place, _, weight = source.rpartition("=")
    try:
        return (source, None) if not place or os.path.exists(source) else (place, float(weight))
    except ValueError:
        return source, None

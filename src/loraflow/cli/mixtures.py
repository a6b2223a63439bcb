"""Examples of several sources after one option, in proportions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraflow.errors import LoraflowError
from loraflow.files import is_first_process

if TYPE_CHECKING:
    from loraflow.examples import Example, Fields


def read_mixture(sources: Sequence[str], fields: Fields | None, seed: int) -> list[Example]:
    """The examples of `a.jsonl b.csv`, all of them, or of `a.jsonl=0.7 b.csv=0.3`, in these proportions.

    Raises:
        LoraflowError: if some of the sources have weights, and others none.
    """
    from rich.console import Console

    from loraflow.examples import mix, read_examples

    pairs = [_weighed(source) for source in sources]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        bare = next(source for source, weight in pairs if weight is None)
        raise LoraflowError(f"`--data` gives some sources a weight, and {bare!r} none. Give all of them one, or none.")
    parts = [read_examples(source, fields) for source, _ in pairs]
    mixed = mix(parts, weights or None, seed=seed)
    if weights and is_first_process():
        # The shortest for its weight decides how many of all the others are taken.
        taken = {id(example) for example in mixed}
        said = ", ".join(
            f"{sum(id(example) in taken for example in part)} of {len(part)} of {place}"
            for part, (place, _) in zip(parts, pairs, strict=True)
        )
        Console(stderr=True).print(f"the mixture: {said}", soft_wrap=True, markup=False, highlight=False)
    return mixed


def _weighed(source: str) -> tuple[str, float | None]:
    """Source and weight; a name that has an equals sign in it need not have one."""
    place, _, weight = source.rpartition("=")
    try:
        return (source, None) if not place or os.path.exists(source) else (place, float(weight))
    except ValueError:
        return source, None

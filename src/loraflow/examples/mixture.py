"""Several lots of examples become one, in proportions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from loraflow.errors import DataError
from loraflow.examples.base import Example


def mix(parts: Sequence[Sequence[Example]], weights: Sequence[float] | None = None, *, seed: int = 0) -> list[Example]:
    r"""Examples of several parts, one part after the other; none is taken twice.

    Without weights, all of them. With weights $w_i$, as many as keep their proportions: of a part of $n_i$ examples

    $$c_i = \lfloor w_i \min_j (n_j / w_j) \rfloor$$

    but at least one, drawn by the seed and in the order in which they stand. The part that is shortest for its weight
    gives all that it has.

    Args:
        parts: lots of examples; one that is given twice has its examples in twice.
        weights: of each part, in any unit: 7 and 3 are 0.7 and 0.3.
        seed: of the draw.

    Raises:
        DataError: if there is not one weight for each part, or one is not above 0 and finite.
    """
    if weights is None:
        return [example for part in parts for example in part]
    if len(weights) != len(parts):
        raise DataError(f"`weights` (={list(weights)}) must have one number for each of the {len(parts)} parts.")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise DataError(f"`weights` (={list(weights)}) must be greater than 0, and finite. Leave such a part out.")
    room = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    # A hair above, so that 0.7 * (70 / 0.7) is 70.
    counts = [max(1, math.floor(weight * room * (1 + 1e-12))) for weight in weights]
    draw = random.Random(seed)
    mixed: list[Example] = []
    for part, count in zip(parts, counts, strict=True):
        mixed += [part[place] for place in sorted(draw.sample(range(len(part)), min(count, len(part))))]
    return mixed

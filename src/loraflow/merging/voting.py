"""TIES and DARE on task vectors, by PEFT's own functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune
from torch import Tensor


def trimmed(vectors: Sequence[Tensor], density: float) -> list[Tensor]:
    """The largest entries of each vector, this share of them; the others are zero."""
    if density >= 1:
        # PEFT warns that there is nothing to prune.
        return list(vectors)
    return [prune(vector, density, method="magnitude") for vector in vectors]


def dropped(vectors: Sequence[Tensor], density: float) -> list[Tensor]:
    """Each vector with entries kept at random, this share of them, and those divided by it (DARE)."""
    return [prune(vector, density, method="random", rescale=True) for vector in vectors] if density < 1 else [*vectors]


def voted(vectors: Sequence[Float[Tensor, " values"]]) -> Float[Tensor, " values"]:
    """The mean of those entries, other than zero, whose sign is that of the sum (TIES, after trimming)."""
    together = torch.stack(list(vectors))
    return disjoint_merge(together, calculate_majority_sign_mask(together, method="total"))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn inside the block follows from the seed; what is drawn after it, does not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

r"""Orthonormal directions that stand for the rows of matrices, alike for all of them and the same on every machine.

Of unit rows $\hat A$ the basis is $Q = \hat A^T (\hat A \hat A^T)^{-1/2}$ (Löwdin's): each direction is as near to its
own row as orthonormal ones can be, so that it still is "that adapter's", whatever the order, and there is only one
such basis (the columns of an SVD may have either sign). Rows that lie in the span of rows before them, but for
`TOLERANCE`, are left out first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = 1e-5
"""A row of norm 1 that is nearer than this to the span of others has no direction of its own."""


def own_directions(
    rows: Float[Tensor, "rows features"],
) -> tuple[Float[Tensor, "directions features"], list[int]]:
    """Orthonormal directions, and the row that each of them stands for; in float64, at most `features`."""
    rows = rows.double()
    norms = torch.linalg.norm(rows, dim=1)
    # A row of zeros has no direction.
    kept = torch.nonzero(norms > 0).flatten()
    unit = rows[kept] / norms[kept, None]
    kept = kept[_independent(unit @ unit.T)]
    unit = rows[kept] / norms[kept, None]
    # Twice, as rounding leaves nearly dependent rows a little askew the first time.
    return _nearest(_nearest(unit)), kept.tolist()


def _nearest(unit: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
    values, vectors = torch.linalg.eigh(unit @ unit.T)
    return (vectors * values.rsqrt()) @ vectors.T @ unit


def _independent(gram: Float[Tensor, "rows rows"]) -> list[int]:
    """Rows that are outside of the span of those before them."""
    if not len(gram) or torch.linalg.eigvalsh(gram)[0] > TOLERANCE**2 * len(gram):
        return list(range(len(gram)))
    left, kept = gram.clone(), []
    for row in range(len(gram)):
        if left[row, row] > TOLERANCE**2:
            kept.append(row)
            left -= torch.outer(left[:, row], left[row]) / left[row, row].clone()
    return kept

r"""The input directions that an update answers, and the same from what its A has read.

With $B A = U S V^T$, the length $\lVert V^T x \rVert$ of the part of x that the update reads at all, and each
$v_j \cdot x$ in it, can be had from $u = A x$ alone: $V^T = M A$, so $V^T x = M u$ with a small matrix M of one row for
each direction. Nothing as wide as the input is multiplied a second time.

A need not have full rank, nor B: of singular values below `TOLERANCE` times the largest, of A and then of $B A$, there
is no direction. M makes rounding errors of u larger, by $\lVert M \rVert \lVert A \rVert$ at most, which is near to 1
where A is well conditioned (the demo's adapters have 6.5 at most); what u loses in half precision grows with it. Above
`MOST_AMPLIFIED`, scores are those of the input itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.adapters import LoraModule

TOLERANCE = 1e-6
"""Singular values below this, relative to the largest, count as zero."""

MOST_AMPLIFIED = 32.0
"""Scores from u may amplify its rounding errors so many times."""


class Projection(NamedTuple):
    r"""Rows $D = M A$, whose product with an input tells how much of it an adapter answers.

    Attributes:
        small: M, in float64.
        rows: D, in float64.
    """

    small: Float[Tensor, "rows rank"]
    rows: Float[Tensor, "rows in_features"]

    def first(self, count: int) -> Projection:
        """The first rows alone."""
        return Projection(self.small[:count], self.rows[:count])

    def amplifies(self, lora_A: Float[Tensor, "rank in_features"]) -> float:
        r"""How many times larger errors of u may become, $\lVert M \rVert \lVert A \rVert / \lVert D \rVert \ge 1$."""
        if not self.rows.numel() or not self.rows.any():
            return 1.0
        norms = [torch.linalg.matrix_norm(matrix, ord=2).item() for matrix in (self.small, lora_A.double(), self.rows)]
        return norms[0] * norms[1] / norms[2]


def right_singular(update: LoraModule) -> Projection:
    r"""$D = V^T$: the right singular vectors of B A, from the largest singular value on; no rows where that is zero."""
    # A = R^T Q^T; its singular vectors are those of a matrix that is only as wide as the rank.
    Q, R = torch.linalg.qr(update.lora_A.double().T)
    svd = torch.linalg.svd(R.T, full_matrices=False)
    kept = TOLERANCE * svd.S[0] < svd.S
    U, S, Wh = svd.U[:, kept], svd.S[kept], svd.Vh[kept]
    B = update.lora_B.double() @ (U * S)
    squares, vectors = torch.linalg.eigh(B.T @ B)
    large = (squares > 0) & (squares > TOLERANCE**2 * squares.max()) if len(squares) else squares > 0
    E = vectors[:, large].flip(1)
    return Projection((U / S @ E).T, (E.T @ Wh) @ Q.T)


def output_length(update: LoraModule, factor: float) -> Projection:
    r"""$\lVert D x \rVert = f \lVert B A x \rVert$: M is f times the triangle of $B = Q_B R_B$, of any rank."""
    small = factor * torch.linalg.qr(update.lora_B.double(), mode="r").R
    return Projection(small, small @ update.lora_A.double())

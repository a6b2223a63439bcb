r"""Who reads whom: what a linear's adapters write, of what which of them read.

All that is added to a linear, weighted adapters and a gate's own update, is $B K A$, with the adapters' $A$ and $s B$
stacked along the rank. The block $K_{ij}$ takes what adapter j reads to where adapter i writes; with constant weights
alone it is $w_i I$ on the diagonal, and zero elsewhere. It is found by pseudo-inverses, $K = B^+ (\ldots) A^+$, so it
depends neither on the basis of the update nor on the order of the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.adapters import LoraModule
from loraflow.methods.base import LowRank

_SMALLEST = 1e-5
"""Singular values below this share of the largest are zero to the pseudo-inverses."""


def readings(
    updates: Sequence[LoraModule | None], weights: Float[Tensor, " adapters"], own: LowRank
) -> Float[Tensor, "writers readers"]:
    r"""The size of each block, $\lVert K_{ij} \rVert_F / \sqrt{\min(r_i, r_j)}$, in units of fusion weights.

    Args:
        updates: the adapters' updates of one linear; one that does not target it neither reads nor writes.
        weights: their constant weights.
        own: what the linear's gate adds of its own.
    """
    present = [index for index, update in enumerate(updates) if update is not None]
    A = [update.lora_A.double() for update in updates if update is not None]
    B = [update.scaling * update.lora_B.double() for update in updates if update is not None]
    ranks = [len(rows) for rows in A]
    read, write = torch.cat(A), torch.cat(B, dim=1)
    from_read, from_write = (torch.linalg.pinv(matrix, rtol=_SMALLEST) for matrix in (read, write))
    down, core, up = (factor.detach().cpu().double() for factor in own)
    slots = torch.repeat_interleave(weights.detach().cpu().double()[present], torch.tensor(ranks))
    K = (from_write @ write * slots) @ (read @ from_read) + from_write @ up @ core @ (down @ from_read)
    found = torch.zeros(len(updates), len(updates))
    for i, rows in zip(present, K.split(ranks), strict=True):
        for j, block in zip(present, rows.split(ranks, dim=1), strict=True):
            found[i, j] = torch.linalg.norm(block) / min(block.shape) ** 0.5
    return found

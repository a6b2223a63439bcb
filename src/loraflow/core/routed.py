"""Rows sent to some of many matrices, and multiplied with those only."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Up to so many rows, a copy of the adapters' matrices for each is cheaper than a product for each expert.
_FEW_ROWS = 32


@dataclass(frozen=True)
class Routed:
    """Tokens at their experts, sorted by expert.

    Attributes:
        tokens: of each row, its token.
        experts: its expert.
        order: its place among all choices of all tokens.
        ends: where each expert's rows end.
        implementation: how transformers multiplies them.
    """

    tokens: Int[Tensor, " rows"]
    experts: Int[Tensor, " rows"]
    order: Int[Tensor, " rows"]
    ends: Int[Tensor, " experts"]
    implementation: str

    @classmethod
    def sort(cls, chosen: Int[Tensor, "tokens choices"], experts: int, implementation: str) -> Routed:
        """Sort what a router has chosen; what is no expert counts as the last one."""
        flat = chosen.reshape(-1).clamp(max=experts - 1)
        sorted_experts, order = torch.sort(flat, stable=True)
        every = torch.arange(experts, device=flat.device)
        ends = torch.searchsorted(sorted_experts, every, right=True).to(torch.int32)
        return cls(order // chosen.shape[1], sorted_experts, order, ends, implementation)

    @functools.cached_property
    def parts(self) -> list[tuple[int, slice]]:
        """The experts that have rows, and which."""
        ends = self.ends.tolist()
        spans = zip([0, *ends[:-1]], ends, strict=True)
        return [(expert, slice(start, end)) for expert, (start, end) in enumerate(spans) if start < end]

    def multiply(
        self,
        x: Float[Tensor, "rows in_features"],
        matrices: Float[Tensor, "experts in_features out_features"],
        *,
        small: bool = False,
    ) -> Float[Tensor, "rows out_features"]:
        """Each row times its expert's matrix; small matrices are copied for each of a few rows."""
        x = x.to(matrices.dtype)
        if self.implementation == "batched_mm" or (small and len(x) <= _FEW_ROWS):
            return torch.bmm(x[:, None], matrices[self.experts])[:, 0]
        if self.implementation == "grouped_mm" and _has_grouped(matrices):
            return F.grouped_mm(x, matrices, offs=self.ends)
        return torch.cat([x[rows] @ matrices[expert] for expert, rows in self.parts])


def _has_grouped(matrices: Tensor) -> bool:
    if matrices.dtype == torch.float64 or not hasattr(F, "grouped_mm"):
        return False
    return not matrices.is_cuda or torch.cuda.get_device_capability(matrices.device) >= (8, 0)

r"""A fusion with constant weights as one ordinary PEFT adapter.

With the adapters concatenated along the rank, and each weight and scaling folded into its B,

$$W x + \sum_i w_i s_i B_i A_i x = W x + B' A' x, \qquad A' = [A_1; \ldots; A_k], \quad
  B' = [w_1 s_1 B_1, \ldots, w_k s_k B_k]$$

is exact; an adapter of weight 0 has no slots in it. Where parameters are mixed (LoRA-Hub), $A' = \sum_j w_j A_j$ and
$B' = \sum_i w_i s_i B_i$, the smaller ranks padded with zeros. A `lora_bias` becomes $\sum_i w_i s_i b_i$.

DoRA: with $c_i = m_i / \lVert W + s_i B_i A_i \rVert$ by rows (1 for plain adapters), the fused output is
$C \odot W x + \sum_i w_i c_i \odot s_i B_i A_i x$ with $C = 1 + \sum_i w_i (c_i - 1)$. That is one DoRA adapter, whose
update is the sum divided by $C$, and whose magnitude is $C \odot \lVert W + B' A' \rVert$. With biases PEFT knows none.

What a gate adds of its own is one more update, of weight 1. It reads what the adapters read, and the sum is written
with no more rank than it has.

A lower rank is the best approximation of the low-rank sum in the Frobenius norm; the biases, and DoRA's $C$, which the
magnitude is computed to keep, stay exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.adapters import LoraModule
from loraflow.errors import LoraflowError
from loraflow.merging import Loss, loss_from
from loraflow.merging.base import Factors, truncated
from loraflow.methods.base import AddsUpdate, Mixing

# DoRA's update is divided by C: below this, float16 and the squares in its norm would soon overflow.
_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class Compression(Loss):
    """What a lower rank cost of the low-rank updates.

    Attributes:
        rank: the largest rank that was allowed.
    """

    rank: int


@dataclass(frozen=True)
class UpdateSum:
    r"""All adapters' weighted updates of one linear, in float64: $y = C \odot W x + B A x + b$."""

    lora_A: Float[Tensor, "rank in_features"]
    lora_B: Float[Tensor, "out_features rank"]
    bias: Float[Tensor, " out_features"]
    output_scale: Float[Tensor, " out_features"]


def add_up(active: Sequence[tuple[LoraModule, float]], weight: Tensor | None, mixing: Mixing) -> UpdateSum:
    """The weighted sum of adapters' updates of one linear; `weight` is the base's, which DoRA needs."""
    out_features = active[0][0].lora_B.shape[0]
    bias, scale = torch.zeros(out_features).double(), torch.ones(out_features).double()
    downs, ups = [], []
    for update, w in active:
        A, B = update.lora_A.double(), update.scaling * update.lora_B.double()
        ratio = torch.ones_like(scale)
        if update.magnitude is not None:
            assert weight is not None
            ratio = update.magnitude.double().flatten() / torch.linalg.norm(weight + B @ A, dim=1)
        scale += w * (ratio - 1)
        if update.bias is not None:
            bias += w * update.scaling * update.bias.double()
        downs.append(A)
        ups.append(w * ratio[:, None] * B)
    if mixing == "parameters":
        rank = max(A.shape[0] for A in downs)
        padded = [w * F.pad(A, (0, 0, 0, rank - A.shape[0])) for A, (_, w) in zip(downs, active, strict=True)]
        ups = [F.pad(B, (0, rank - B.shape[1])) for B in ups]
        return UpdateSum(torch.stack(padded).sum(dim=0), torch.stack(ups).sum(dim=0), bias, scale)
    return UpdateSum(torch.cat(downs), torch.cat(ups, dim=1), bias, scale)


def compressed(update: UpdateSum, rank: int) -> tuple[UpdateSum, float, float]:
    """The nearest update of a lower rank, the squared Frobenius norm of the difference, and that of the update."""
    (A, B), cut, norm = truncated(Factors(update.lora_A, update.lora_B), rank)
    return UpdateSum(A, B, update.bias, update.output_scale), cut, norm


def own_update(gate: nn.Module) -> LoraModule | None:
    """What a gate adds to its linear itself, as an adapter's update; None where that is nothing."""
    down, core, up = (factor.detach().cpu().double() for factor in cast(AddsUpdate, gate).factors())
    return LoraModule(down, up @ core, 1.0) if core.any() else None


def compression_of(rank: int, errors: Mapping[str, Sequence[float]]) -> Compression:
    """What a lower rank cost, from each module's squared norms of what was cut off and of all."""
    loss = loss_from(
        {name: cut for name, (cut, _) in errors.items()}, {name: norm for name, (_, norm) in errors.items()}
    )
    return Compression(loss.error, loss.worst_module, loss.worst_error, rank)


def as_module(
    name: str, update: UpdateSum, weight: Tensor | None, dtype: torch.dtype, *, lora_bias: bool
) -> LoraModule:
    """One linear's update as PEFT computes it, with scaling 1.

    Raises:
        LoraflowError: if a value cannot be represented.
    """
    lora_A, lora_B, magnitude = update.lora_A.to(dtype), update.lora_B, None
    if weight is not None:
        scale = update.output_scale
        smallest = int(scale.abs().argmin())
        if scale[smallest].abs() < _SMALLEST_SCALE:
            raise LoraflowError(
                f"'{name}' cannot be written as one DoRA adapter: its fusion weights take the base's own output "
                f"{smallest} away (factor {scale[smallest].item():.3g}), and DoRA's update is a multiple of that. "
                "Use other weights."
            )
        lora_B = lora_B / scale[:, None]
        # From the values that are saved, so that PEFT's quotient of the two gives the scale back.
        saved = lora_B.to(dtype).double() @ lora_A.double()
        magnitude = (scale * torch.linalg.norm(weight + saved, dim=1)).to(dtype)
    module = LoraModule(lora_A, lora_B.to(dtype), 1.0, update.bias.to(dtype) if lora_bias else None, magnitude)
    for tensor in (module.lora_A, module.lora_B, module.bias, module.magnitude):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise LoraflowError(
                f"'{name}' has values that {str(dtype).removeprefix('torch.')} cannot represent. Export it in a wider "
                "precision, or check the fusion weights."
            )
    return module

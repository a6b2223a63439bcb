r"""The updates of a few adapters at each position: only those are computed, where that is cheaper than all of them.

Most fusion weights of a position may be exactly zero: a router keeps its top k, and each row of a batch has adapters of
its own. There are three ways to the same sum, and the cheapest is taken:

- "all": one product with all stacked adapters, as for any weights;
- "gathered": each row has a copy of its adapters' matrices, and a product with those (`torch.bmm`); for few rows;
- "grouped": rows are sorted by adapter, as tokens by the experts of a mixture (`Routed`); for many rows.

What a way costs is told in bytes: those of the matrices that it reads and of the activations that it reads and writes,
and what could have been moved in the time of its arithmetic, and in that which it takes to start its operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraflow.core.routed import Routed

Way = Literal["all", "gathered", "grouped"]

# Multiplications and additions in the time of a byte, and bytes in that of starting an operation: for one core of a
# server (10 GB/s, 80 GFLOP/s, 5 us), and for a large GPU (2 TB/s, 200 TFLOP/s, 5 us).
_FLOPS = {"cpu": 8}
_FLOPS_ELSEWHERE = 100
_START = {"cpu": 50_000}
_START_ELSEWHERE = 10_000_000

# The grouped kernels want rows of whole 16 bytes.
_ALIGNED_BYTES = 16


@dataclass(frozen=True)
class Sizes:
    """What a product of linears that read one input is made of.

    Attributes:
        rows: of the input; all positions of one use the same adapters.
        span: positions of each row.
        adapters: how many are stacked.
        most: how many of them a row uses, at most.
        in_features: of the input.
        slots: of an adapter in each linear.
        out_features: of each linear.
        itemsize: bytes of a number.
        device: the type of device, as in `torch.device`.
    """

    rows: int
    span: int
    adapters: int
    most: int
    in_features: int
    slots: tuple[int, ...]
    out_features: tuple[int, ...]
    itemsize: int
    device: str = "cpu"

    @property
    def adapter(self) -> int:
        """Numbers in the matrices of one adapter."""
        pairs = zip(self.slots, self.out_features, strict=True)
        return sum(slots * (self.in_features + features) for slots, features in pairs)

    @property
    def aligned(self) -> bool:
        """Whether the grouped kernels take inputs and outputs of these widths."""
        return all(width * self.itemsize % _ALIGNED_BYTES == 0 for width in (self.in_features, *self.out_features))


def moved_bytes(way: Way, sizes: Sizes) -> int:
    """Bytes of matrices that a way reads, and of activations that it reads and writes.

    A copy of a gathered matrix is read where it was just written; that is no way to the memory.
    """
    positions, slots, written = sizes.rows * sizes.span, sum(sizes.slots), sum(sizes.out_features)
    pairs = positions * sizes.most
    if way == "grouped":
        matrices = min(sizes.adapters, pairs) * sizes.adapter
        activations = pairs * (3 * sizes.in_features + 4 * slots + 4 * written) + 3 * positions * written
    else:
        stacked = sizes.adapters if way == "all" else sizes.most
        matrices = (1 if way == "all" else sizes.rows) * stacked * sizes.adapter
        activations = positions * (sizes.in_features + 4 * stacked * slots + 2 * written)
    return (matrices + activations) * sizes.itemsize


def cost(way: Way, sizes: Sizes) -> float:
    """What a way costs, in bytes."""
    linears = len(sizes.slots)
    operations = {"all": 2 + linears, "gathered": 3 + 5 * linears, "grouped": 8 + 7 * linears}[way]
    used = sizes.adapters if way == "all" else sizes.most
    flops = 2 * sizes.rows * sizes.span * used * sizes.adapter
    return (
        moved_bytes(way, sizes)
        + flops / _FLOPS.get(sizes.device, _FLOPS_ELSEWHERE)
        + operations * _START.get(sizes.device, _START_ELSEWHERE)
    )


def cheapest(sizes: Sizes) -> Way:
    """The way that costs least, of those that there are for such sizes."""
    ways: tuple[Way, ...] = ("all", "gathered", "grouped") if sizes.aligned else ("all", "gathered")
    return min(ways, key=lambda way: cost(way, sizes))


def by_adapter(
    stacked: Float[Tensor, "slots features"], slots: Sequence[int]
) -> Float[Tensor, "adapters width features"]:
    """A stack of adapters' rows with an axis of adapters; those that have fewer than the largest get zeros."""
    width, row = max(slots), stacked.element_size()
    if min(slots) == width and width * row % _ALIGNED_BYTES == 0:
        return stacked.view(len(slots), width, stacked.shape[1])
    width += -width % (_ALIGNED_BYTES // min(row, _ALIGNED_BYTES))
    filled = [owner * width + place for owner, count in enumerate(slots) for place in range(count)]
    padded = stacked.new_zeros(len(slots) * width, stacked.shape[1])
    padded[torch.tensor(filled, device=stacked.device)] = stacked
    return padded.view(len(slots), width, -1)


@dataclass(frozen=True)
class Picks:
    """The adapters that rows use.

    Attributes:
        chosen: their positions in the stack.
        weights: their fusion weights at each position of a row.
        routed: the positions sorted by adapter; None where each row's matrices are gathered.
    """

    chosen: Int[Tensor, "rows most"]
    weights: Float[Tensor, "rows span most"]
    routed: Routed | None

    @classmethod
    def of(cls, weights: Float[Tensor, "positions adapters"], most: int, span: int, way: Way) -> Picks:
        """What fusion weights pick, none of whose rows have more than so many that are not zero."""
        by_row = weights.reshape(-1, span, weights.shape[-1])
        chosen = by_row.abs().amax(dim=1).topk(most, dim=-1).indices
        picked = by_row.gather(-1, chosen[:, None].expand(-1, span, -1))
        if way != "grouped":
            return cls(chosen, picked, None)
        of_positions = chosen.repeat_interleave(span, dim=0)
        return cls(chosen, picked, Routed.sort(of_positions, weights.shape[-1], "grouped_mm"))

    def read(
        self,
        x: Float[Tensor, "positions in_features"],
        lora_A: Float[Tensor, "adapters width in_features"],
        input_bias: Float[Tensor, "adapters width"] | None,
    ) -> Tensor:
        """The weighted slots of the picked adapters, by row or by pair of position and adapter, for `write`."""
        width, features = lora_A.shape[1:]
        if self.routed is not None:
            slots = self.routed.multiply(x[self.routed.tokens], lora_A.mT)
            slots = slots if input_bias is None else slots + input_bias[self.routed.experts]
            return slots * self.weights.reshape(-1)[self.routed.order][:, None].to(slots.dtype)
        rows, span, most = self.weights.shape
        flat = self.chosen.reshape(-1)
        gathered = lora_A.index_select(0, flat).view(rows, most * width, features)
        slots = torch.bmm(x.reshape(rows, span, features), gathered.mT).view(rows, span, most, width)
        slots = slots if input_bias is None else slots + input_bias[flat].view(rows, 1, most, width)
        return (slots * self.weights[..., None].to(slots.dtype)).view(rows, span, most * width)

    def write(
        self,
        slots: Tensor,
        lora_B: Float[Tensor, "adapters width out_features"],
        output: Float[Tensor, "positions out_features"],
    ) -> None:
        """Add the picked updates to an output, in place."""
        if self.routed is not None:
            updates = self.routed.multiply(slots, lora_B)
            # Added up in a fixed order, which `index_add` does not have on every device.
            unsorted = torch.empty_like(updates).index_copy_(0, self.routed.order, updates)
            output += unsorted.view(len(output), -1, updates.shape[-1]).sum(dim=1)
            return
        rows, span = self.weights.shape[:2]
        gathered = lora_B.index_select(0, self.chosen.reshape(-1)).view(rows, -1, lora_B.shape[-1])
        output.view(rows, span, -1).baddbmm_(slots, gathered)

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
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraflow.core.routed import Routed

Way = Literal["all", "gathered", "grouped"]
Stage = Literal["read", "write"]

# Multiplications and additions in the time of a byte, and bytes in that of starting an operation: for one core of a
# server (10 GB/s, 80 GFLOP/s, 5 us), and for a large GPU (2 TB/s, 200 TFLOP/s, 5 us).
_FLOPS = {"cpu": 8}
_FLOPS_ELSEWHERE = 100
_START = {"cpu": 50_000}
_START_ELSEWHERE = 10_000_000

# Gates score in float32, where the base's precision is not more.
_GATE_BYTES = 4
_SLOT_OPERATIONS = 6

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

    def matrices(self, stage: Stage) -> int:
        """Numbers in the A, or in the B, of one adapter."""
        if stage == "read":
            return sum(self.slots) * self.in_features
        return sum(slots * features for slots, features in zip(self.slots, self.out_features, strict=True))

    def time_of(self, flops: float, operations: int) -> float:
        """Bytes that could be moved in the time of arithmetic, and of starting operations."""
        start = _START.get(self.device, _START_ELSEWHERE)
        return flops / _FLOPS.get(self.device, _FLOPS_ELSEWHERE) + operations * start

    @property
    def aligned(self) -> bool:
        """Whether the grouped kernels take inputs and outputs of these widths."""
        return all(width * self.itemsize % _ALIGNED_BYTES == 0 for width in (self.in_features, *self.out_features))


def moved_bytes(way: Way, sizes: Sizes) -> int:
    """Bytes of matrices that a way reads, and of activations that it reads and writes.

    A copy of a gathered matrix is read where it was just written; that is no way to the memory.
    """
    return _numbers("read", way, sizes, sizes.most) + _numbers("write", way, sizes, sizes.most)


def _numbers(stage: Stage, way: Way, sizes: Sizes, used: int) -> int:
    """Bytes of one stage: the products with A, or with B, of `used` adapters for each row."""
    positions, slots, written = sizes.rows * sizes.span, sum(sizes.slots), sum(sizes.out_features)
    pairs, reads = positions * used, stage == "read"
    if way == "grouped":
        matrices = min(sizes.adapters, pairs) * sizes.matrices(stage)
        activations = pairs * (3 * sizes.in_features if reads else 4 * written) + 2 * pairs * slots
        activations += 0 if reads else 3 * positions * written
    else:
        stacked = sizes.adapters if way == "all" else used
        matrices = (1 if way == "all" else sizes.rows) * stacked * sizes.matrices(stage)
        activations = positions * ((sizes.in_features if reads else 2 * written) + 2 * stacked * slots)
    return (matrices + activations) * sizes.itemsize


def _cost(stage: Stage, way: Way, sizes: Sizes, used: int) -> float:
    """What one stage costs, in bytes."""
    linears, reads = len(sizes.slots), stage == "read"
    operations = {
        "all": 2 if reads else linears,
        "gathered": 1 + 3 * linears if reads else 2 + 2 * linears,
        "grouped": 4 + 4 * linears if reads else 4 + 3 * linears,
    }[way]
    multiplied = sizes.adapters if way == "all" else used
    flops = 2 * sizes.rows * sizes.span * multiplied * sizes.matrices(stage)
    return _numbers(stage, way, sizes, used) + sizes.time_of(flops, operations)


def cost(way: Way, sizes: Sizes) -> float:
    """What a way costs, in bytes."""
    return _cost("read", way, sizes, sizes.most) + _cost("write", way, sizes, sizes.most)


def ways_for(sizes: Sizes) -> tuple[Way, ...]:
    """The ways that there are for such sizes."""
    return ("all", "gathered", "grouped") if sizes.aligned else ("all", "gathered")


def cheapest(sizes: Sizes) -> Way:
    """The way that costs least, of those that there are for such sizes."""
    return min(ways_for(sizes), key=lambda way: cost(way, sizes))


class Scoring(NamedTuple):
    """What gates of the linears need that can weigh adapters by what those have read.

    Attributes:
        input_rows: rows as wide as the input that they multiply if they weigh by the input instead, of all linears; 0
            where they are not to, for these rows take memory.
        list_rows: those that find candidates; 0 where there are none.
        candidates: at each position.
    """

    input_rows: int
    list_rows: int = 0
    candidates: int = 0


class Plan(NamedTuple):
    """From what gates weigh, and how the updates of the adapters with a weight are computed then.

    Attributes:
        source: "slots", what all adapters have read; "list", what candidates have; "input", the input itself.
        read: the way to that.
        write: the way to the updates.
    """

    source: Literal["slots", "list", "input"]
    read: Way
    write: Way


EVERYTHING_READ = Plan("slots", "all", "all")
BY_INPUT = Plan("input", "all", "all")


def cheapest_plan(sizes: Sizes, scoring: Scoring) -> Plan:
    """The plan that costs least."""
    linears, picking = len(sizes.slots), [way for way in ways_for(sizes) if way != "all"]
    whole, choosing = _cost("read", "all", sizes, sizes.most), sizes.time_of(0, 4 * linears)
    # Small matrices are multiplied by adapter, which takes more operations than one product with the input.
    weighing = sizes.time_of(0, _SLOT_OPERATIONS * linears)
    costs = {EVERYTHING_READ: whole + weighing + _cost("write", "all", sizes, sizes.most)}
    if scoring.input_rows:
        best = cheapest(sizes)
        costs[Plan("input", best, best)] = _scored(sizes, scoring.input_rows) + cost(best, sizes)
    for write in picking:
        written = _cost("write", write, sizes, sizes.most) + choosing + weighing
        costs[Plan("slots", "all", write)] = whole + written
        for read in picking if scoring.list_rows else ():
            # The candidates' small matrices are copied for each position.
            small = sizes.rows * scoring.candidates * sum(slots**2 for slots in sizes.slots) * _GATE_BYTES
            found = _scored(sizes, scoring.list_rows) + _cost("read", read, sizes, scoring.candidates)
            costs[Plan("list", read, write)] = found + 2 * small + written
    return min(costs, key=lambda plan: costs[plan])


def _scored(sizes: Sizes, rows: int) -> float:
    """What a product of the input with so many rows costs."""
    numbers = rows * sizes.in_features + sizes.rows * sizes.span * (sizes.in_features + rows)
    flops = 2 * sizes.rows * sizes.span * rows * sizes.in_features
    return numbers * _GATE_BYTES + sizes.time_of(flops, 2 * len(sizes.slots))


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

    @classmethod
    def listing(cls, listed: Int[Tensor, "positions candidates"], like: Tensor, adapters: int, way: Way) -> Picks:
        """Candidates that are to be read, before one of so many adapters has a weight."""
        routed = Routed.sort(listed, adapters, "grouped_mm") if way == "grouped" else None
        return cls(listed, like.new_ones(listed.shape)[:, None], routed)

    def of_positions(self, slots: Tensor) -> Float[Tensor, "positions most width"]:
        """What `read` gave, by position."""
        rows, _, most = self.weights.shape
        if self.routed is None:
            return slots.view(rows, most, -1)
        return torch.empty_like(slots).index_copy_(0, self.routed.order, slots).view(rows, most, -1)

    @classmethod
    def among(
        cls,
        slots: Float[Tensor, "positions candidates width"],
        weights: Float[Tensor, "positions candidates"],
        listed: Int[Tensor, "positions candidates"] | None,
        sizes: tuple[int, int],
        way: Way,
    ) -> tuple[Picks, Tensor]:
        """Picks of what was read already, and their weighted slots, for `write`.

        Args:
            slots: what candidates have read.
            weights: their fusion weights, of which few are not zero.
            listed: who they are; None for all adapters.
            sizes: how many of them have a weight, at most, and how many adapters there are.
            way: how they are written.
        """
        most, adapters = sizes
        places = weights.abs().topk(min(most, weights.shape[-1]), dim=-1).indices
        chosen = places if listed is None else listed.gather(-1, places)
        picked = weights.gather(-1, places)
        own = slots.gather(1, places[..., None].expand(-1, -1, slots.shape[-1]))
        weighted = own * picked[..., None].to(own.dtype)
        if way != "grouped":
            return cls(chosen, picked[:, None], None), weighted.flatten(1)[:, None]
        routed = Routed.sort(chosen, adapters, "grouped_mm")
        return cls(chosen, picked[:, None], routed), weighted.flatten(0, 1)[routed.order]

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

"""The stacked matrices that a forward multiplies with: A, B and DoRA's scales of some adapters, or of all."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loraflow.core.active import lasting
from loraflow.core.picks import by_adapter
from loraflow.core.stack import StackedLora

Counts = tuple[int, ...]

# Padded to the largest rank, matrices may have so many times their own slots.
_MOST_PADDED = 2


@dataclass(eq=False)
class Reading:
    """The stacked A of some adapters, or of all, for modules that read one input.

    Attributes:
        lora_A: the modules' stacked A, one below the other, `[slots, in_features]`.
        input_bias: theirs, `[slots]`, or None.
        places: the place of each slot within the rank of its adapter, counted on from module to module, `[slots]`.
        slots: of each module, how many slots each adapter has.
        adapters: how many adapters there are.
        sizes: how many slots each module has.
        starts: where those of each adapter begin in it.
    """

    lora_A: Tensor
    input_bias: Tensor | None
    places: Tensor
    slots: tuple[Counts, ...]
    adapters: int = field(init=False)
    sizes: list[int] = field(init=False)
    starts: list[Counts] = field(init=False)

    def __post_init__(self) -> None:
        self.adapters = len(self.slots[0])
        self.sizes = [sum(counts) for counts in self.slots]
        self.starts = [tuple(itertools.accumulate(counts[:-1], initial=0)) for counts in self.slots]
        self._expansions: dict[bool, Tensor] = {}

    @property
    def pads_little(self) -> bool:
        """Whether the matrices with an axis of adapters are not much larger: as many slots for each as the largest."""
        return all(len(counts) * max(counts) <= _MOST_PADDED * sum(counts) for counts in self.slots)

    def expansion(self, each: bool) -> Float[Tensor, "gates slots"]:
        """The 0/1 matrix E for weights that all modules share; or for those of each, which stand side by side."""
        if each not in self._expansions:
            with lasting():
                parts = [_expansion(counts) for counts in self.slots]
                whole = torch.block_diag(*parts) if each else torch.cat(parts, dim=1)
                self._expansions[each] = whole.to(self.lora_A.device)
        return self._expansions[each]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices, and of their copies with an axis of adapters."""
        copies = [part for part, _ in self.parts] if "parts" in vars(self) else []
        return self.lora_A.nbytes + sum(part.nbytes for part in copies if not _shares(part, self.lora_A))

    def of(self, member: int) -> tuple[Float[Tensor, "slots in_features"], Float[Tensor, " slots"] | None]:
        """A and its bias of one module."""
        own = slice(sum(self.sizes[:member]), sum(self.sizes[: member + 1]))
        return self.lora_A[own], None if self.input_bias is None else self.input_bias[own]

    @functools.cached_property
    def parts(self) -> list[tuple[Float[Tensor, "adapters width in_features"], Float[Tensor, "adapters width"] | None]]:
        """Of each module, A and its bias with an axis of adapters."""
        biases = [None] * len(self.sizes) if self.input_bias is None else self.input_bias.split(self.sizes)
        return [
            (by_adapter(rows, counts), None if bias is None else by_adapter(bias[:, None], counts)[..., 0])
            for rows, bias, counts in zip(self.lora_A.split(self.sizes), biases, self.slots, strict=True)
        ]


def _shares(part: Tensor, stack: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()


def _expansion(counts: Counts) -> Float[Tensor, "adapters slots"]:
    owner = [adapter for adapter, count in enumerate(counts) for _ in range(count)]
    return F.one_hot(torch.tensor(owner, dtype=torch.long), len(counts)).T.float().contiguous()


@dataclass(eq=False)
class Writing:
    """The stacked B of some adapters, or of all, of one linear.

    Attributes:
        lora_B: `[slots, out_features]`.
        output_scale: DoRA's `c - 1`, `[adapters, out_features]`, or None.
        slots: how many slots each adapter has.
    """

    lora_B: Tensor
    output_scale: Tensor | None
    slots: Counts

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices, and of a copy of them with an axis of adapters."""
        copied = self.part.nbytes if "part" in vars(self) and not _shares(self.part, self.lora_B) else 0
        return self.lora_B.nbytes + copied + (0 if self.output_scale is None else self.output_scale.nbytes)

    @functools.cached_property
    def part(self) -> Float[Tensor, "adapters width out_features"]:
        """B with an axis of adapters."""
        return by_adapter(self.lora_B, self.slots)


@dataclass(eq=False)
class GroupPart:
    """The matrices of some adapters for linears that read one input.

    Attributes:
        reading: their stacked A.
        writings: the stacked B of each linear.
    """

    reading: Reading
    writings: tuple[Writing, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.reading.nbytes + sum(writing.nbytes for writing in self.writings)

    @classmethod
    def of_one(cls, stacks: Sequence[StackedLora], starts: Sequence[int], device: torch.device) -> GroupPart:
        """That of one adapter, given its update of each linear, and where the places of each begin."""
        places = [torch.arange(sum(stack.slots)) + start for stack, start in zip(stacks, starts, strict=True)]
        bias = stack_input_bias(stacks, device)
        reading = Reading(
            torch.cat([stack.lora_A for stack in stacks]).to(device),
            bias,
            torch.cat(places).to(device),
            tuple(stack.slots for stack in stacks),
        )
        return cls(
            reading,
            tuple(
                Writing(
                    stack.lora_B.to(device),
                    None if stack.output_scale is None else stack.output_scale.to(device),
                    stack.slots,
                )
                for stack in stacks
            ),
        )

    @classmethod
    def of_several(cls, parts: Sequence[GroupPart]) -> GroupPart:
        """That of several adapters, in this order, given each one's."""
        readings = [part.reading for part in parts]
        slots = tuple(sum(counts, ()) for counts in zip(*(reading.slots for reading in readings), strict=True))
        bias = None
        if any(reading.input_bias is not None for reading in readings):
            bias = _by_linear(readings, [_filled_bias(reading) for reading in readings])
        return cls(
            Reading(
                _by_linear(readings, [reading.lora_A for reading in readings]),
                bias,
                _by_linear(readings, [reading.places for reading in readings]),
                slots,
            ),
            tuple(
                Writing(
                    torch.cat([writing.lora_B for writing in writings]),
                    _joined_scale([writing.output_scale for writing in writings]),
                    counts,
                )
                for writings, counts in zip(zip(*(part.writings for part in parts), strict=True), slots, strict=True)
            ),
        )


def _by_linear(readings: Sequence[Reading], tensors: Sequence[Tensor]) -> Tensor:
    """Rows of all slots of each adapter, as those of all adapters of each linear."""
    split = [tensor.split(reading.sizes) for tensor, reading in zip(tensors, readings, strict=True)]
    return torch.cat([rows for of_linear in zip(*split, strict=True) for rows in of_linear])


def _filled_bias(reading: Reading) -> Float[Tensor, " slots"]:
    return reading.lora_A.new_zeros(len(reading.lora_A)) if reading.input_bias is None else reading.input_bias


def _joined_scale(scales: Sequence[Tensor | None]) -> Float[Tensor, "adapters out_features"] | None:
    present = [scale for scale in scales if scale is not None]
    return torch.cat([torch.zeros_like(present[0]) if one is None else one for one in scales]) if present else None


def places_of(slots: Sequence[Counts]) -> Int[Tensor, " slots"]:
    """The place of each slot within the rank of its adapter, counted on from module to module."""
    places, start = [], 0
    for counts in slots:
        places += [start + place for count in counts for place in range(count)]
        start += max(counts)
    return torch.tensor(places, dtype=torch.long)


def stack_input_bias(stacks: Sequence[StackedLora], device: torch.device) -> Float[Tensor, " slots"] | None:
    """The biases of A of several modules, one below the other; None where no module has any."""
    if all(stack.input_bias is None for stack in stacks):
        return None
    biases = [
        stack.lora_A.new_zeros(stack.lora_A.shape[0]) if stack.input_bias is None else stack.input_bias
        for stack in stacks
    ]
    return torch.cat(biases).to(device)

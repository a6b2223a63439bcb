"""What makes the parts of adapters that a stock loads: for linears of one input, and for the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loraflow.adapters import Adapter, LoraModule
from loraflow.core.experts import ExpertPart, ExpertStack, expert_part, join_experts
from loraflow.core.group import InputGroup
from loraflow.core.matrices import GroupPart
from loraflow.core.stack import StackedLora, stack_adapters
from loraflow.core.stock import Shelf


@dataclass(eq=False)
class GroupFiller:
    """Makes the stacked A and B of linears that read one input.

    Attributes:
        group: the linears; what is made is of its precision, on its device.
        names: theirs in the base.
        base_layers: themselves, whose weights a DoRA reads.
        updates: what is known of each adapter's update of each linear, without its values.
    """

    group: InputGroup
    names: Sequence[str]
    base_layers: Sequence[nn.Module]
    updates: Sequence[Sequence[LoraModule | None]]
    shelf: Shelf[GroupPart] = field(init=False)

    def __post_init__(self) -> None:
        assert self.group.shelf is not None
        self.shelf = self.group.shelf
        # Slots of the same place within the rank of their adapters have the same number, linear after linear.
        widest = [max(counts) for counts in self.group.slots]
        self._starts = [sum(widest[:member]) for member in range(len(widest))]

    def size_bytes(self, adapter: int) -> int:
        """Bytes of the matrices of an adapter alone."""
        values = 0
        for updates, counts, out_features in zip(self.updates, self.group.slots, self.group.out_features, strict=True):
            update = updates[adapter]
            values += counts[adapter] * (self.group.lora_A.shape[1] + out_features)
            values += out_features if update is not None and update.magnitude is not None else 0
        return values * self.group.lora_A.element_size()

    def make(self, position: int, adapter: Adapter) -> GroupPart:
        """The matrices of an adapter alone, given its weights."""
        lora_A = self.group.lora_A
        stacks = [
            _empty_stack(lora_A.shape[1], out_features, lora_A.dtype, (0,))
            if name not in adapter.modules
            else stack_adapters([adapter.modules[name]], base_layer, lora_A.dtype)
            for name, base_layer, out_features in zip(
                self.names, self.base_layers, self.group.out_features, strict=True
            )
        ]
        return GroupPart.of_one(stacks, self._starts, lora_A.device)

    def join(self, parts: Sequence[GroupPart]) -> GroupPart:
        """The matrices of several adapters, given those of each."""
        return GroupPart.of_several(parts)


@dataclass(eq=False)
class ExpertFiller:
    """Makes the updates of one parameter of a mixture's experts.

    Attributes:
        stack: the parameter; what is made is of its precision, on its device.
        name: its own in the base.
        updates: what is known of each adapter's update, without its values.
    """

    stack: ExpertStack
    name: str
    updates: Sequence[LoraModule | None]
    shelf: Shelf[ExpertPart] = field(init=False)

    def __post_init__(self) -> None:
        assert self.stack.shelf is not None
        self.shelf = self.stack.shelf

    def size_bytes(self, adapter: int) -> int:
        """Bytes of the update of an adapter alone."""
        update = self.updates[adapter]
        if update is None:
            return 0
        slots = (update.rank + -update.rank % 8) * update.experts
        return slots * (update.lora_A.shape[1] + update.lora_B.shape[0]) * self.stack.lora_A.element_size()

    def make(self, position: int, adapter: Adapter) -> ExpertPart:
        """The update of an adapter alone, given its weights."""
        stack = self.stack
        if self.name not in adapter.modules:
            return ExpertPart(stack.lora_A, stack.lora_B, stack.owners, stack.places)
        update = adapter.modules[self.name]
        return expert_part(self.name, update, position, stack.lora_A.dtype, stack.lora_A.device)

    def join(self, parts: Sequence[ExpertPart]) -> ExpertPart:
        """The updates of several adapters, given those of each."""
        return join_experts(parts)


def outline_stack(updates: Sequence[LoraModule | None], base_layer: nn.Module, dtype: torch.dtype) -> StackedLora:
    """What is known of a linear's adapters without their values: how many slots each has."""
    first = next(update for update in updates if update is not None)
    slots = tuple(0 if update is None else update.rank + (update.bias is not None) for update in updates)
    return _empty_stack(first.lora_A.shape[1], first.lora_B.shape[0], dtype, slots)


def _empty_stack(in_features: int, out_features: int, dtype: torch.dtype, slots: tuple[int, ...]) -> StackedLora:
    def empty(features: int) -> Tensor:
        return torch.empty(0, features, dtype=dtype)

    return StackedLora(empty(in_features), empty(out_features), None, None, slots)

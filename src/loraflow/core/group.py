"""The linears that read one input: their stacked A, and the weighted product that they share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loraflow.core.active import Active
from loraflow.core.context import LayerContext
from loraflow.core.cuts import Cuts
from loraflow.core.matrices import Counts, GroupPart, Reading, Writing, places_of, stack_input_bias
from loraflow.core.picks import (
    BY_INPUT,
    EVERYTHING_READ,
    Picks,
    Plan,
    Scoring,
    Sizes,
    Way,
    by_adapter,
    cheapest,
    cheapest_plan,
)
from loraflow.core.products import WeightedProduct, mix_slots, slot_weights
from loraflow.core.rows import Rows
from loraflow.core.slots import Slots, exactly, read_listed, shortlists, slot_gates
from loraflow.core.stack import StackedLora
from loraflow.core.stock import Shelf
from loraflow.methods.slots import Shortlists, WeighsSlots

# Prompts are of many lengths; each is reckoned once as long as there are not more.
_KEPT_WAYS = 256


class InputGroup(nn.Module):
    """The stacked adapters of linear modules that read one input, and their weighted low-rank product.

    The product with the stacked A is computed when the first of them is called, and handed to the others as long as
    they are called with the very same tensor. Modules that turn out to read different inputs are still right, at the
    price of a product each.

    Where each module has a gate of its own, the weights of all of them stand side by side, `[..., modules * adapters]`.

    Attributes:
        names: of the modules, within their decoder layer.
        rows: what the rows of their input are.
        lora_A: as in `Reading`, of all adapters.
        input_bias: as there.
        places: as there.
        slots: as there.
        out_features: of each module.
        dropout: probability with which inputs of A are dropped in training.
        shelf: where the matrices are, made as they are used (`core/stock.py`); None where those of all adapters are
            here. `lora_A` has no slots then.
    """

    names: tuple[str, ...]
    rows: Rows
    lora_A: Tensor
    input_bias: Tensor | None
    places: Tensor
    slots: tuple[Counts, ...]
    out_features: tuple[int, ...]
    dropout: float
    shelf: Shelf[GroupPart] | None

    def __init__(
        self,
        names: Sequence[str],
        stacks: Sequence[StackedLora],
        device: torch.device,
        rows: Rows = "tokens",
        shelf: Shelf[GroupPart] | None = None,
    ) -> None:
        super().__init__()
        self.shelf = shelf
        self.names = tuple(names)
        self.rows = rows
        self.slots = tuple(stack.slots for stack in stacks)
        self.out_features = tuple(stack.lora_B.shape[1] for stack in stacks)
        self.place_count = sum(max(slots) for slots in self.slots)
        self.dropout = 0.0
        self._starts = [tuple(itertools.accumulate(counts, initial=0)) for counts in self.slots]
        self._member_starts = tuple(itertools.accumulate(map(sum, self.slots), initial=0))
        self._cuts: Cuts[Reading] = Cuts()
        self._ways: dict[tuple[int, ...], Way] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}
        self.register_buffer("lora_A", torch.cat([stack.lora_A for stack in stacks]).to(device), persistent=False)
        self.register_buffer("input_bias", stack_input_bias(stacks, device), persistent=False)
        places = places_of(self.slots) if shelf is None else torch.empty(0, dtype=torch.long)
        self.register_buffer("places", places.to(device), persistent=False)

    def reading(self, active: Active | None) -> Reading:
        """The stacked A of these adapters, or of all, cut out once as long as it is used."""
        if self.shelf is not None:
            return self.shelf.of(active).reading
        return self._cuts.of(active, self.lora_A, self._cut)

    def _cut(self, active: Active | None) -> Reading:
        if active is None:
            return Reading(self.lora_A, self.input_bias, self.places, self.slots)
        members = range(len(self.names))
        kept = [self.slots_of(member, adapter)[1] for member in members for adapter in active]
        index = _indices(kept, self.lora_A.device)
        return Reading(
            self.lora_A.index_select(0, index),
            None if self.input_bias is None else self.input_bias.index_select(0, index),
            self.places.index_select(0, index),
            tuple(tuple(counts[adapter] for adapter in active) for counts in self.slots),
        )

    def look(self, context: LayerContext, x: Float[Tensor, "*batch in_features"]) -> None:
        """Note what adapters have read of an input, if gates are to weigh by that and not by the input itself."""
        gates, reading = slot_gates(context.running, context.index, self.names), self.reading(context.active)
        context.slots = None
        if not any(gates):
            return
        x = x.reshape(-1, x.shape[-1])
        named = shortlists(context.running.only, gates)
        plan = self._plan(context, reading, len(x), gates, named)
        if plan.source == "input":
            return
        read = x if x.dtype == reading.lora_A.dtype else x.to(reading.lora_A.dtype)
        if plan.source == "list":
            parts = zip(named, reading.parts, strict=True)
            found = [read_listed(gate, x, read, part, plan.read) for gate, part in parts]
            context.slots = Slots(None, [], found, reading.starts, context.active, plan.write)
            return
        with exactly(x.device.type):
            whole = F.linear(read, reading.lora_A, reading.input_bias)
        own = whole.split_with_sizes(reading.sizes, -1)
        context.slots = Slots(whole, own, [None] * len(self.names), reading.starts, context.active, plan.write)

    def project(
        self, context: LayerContext, x: Float[Tensor, "*batch in_features"], weights: Float[Tensor, "*tokens gates"]
    ) -> None:
        """Compute the weighted slots of all modules for one input, and note them in the context."""
        reading, slots = self.reading(context.active), context.slots
        context.group, context.seen = self, x
        if weights.shape[-1] == reading.adapters:
            context.member_weights, each = (weights,) * len(self.names), False
        else:
            context.member_weights, each = weights.split(reading.adapters, dim=-1), True
        if slots is not None and slots.write != "all":
            context.products = self._pick_read(context, reading, slots)
            return
        dropping = bool(self.dropout) and self.training
        if dropping:
            x = F.dropout(x, self.dropout)
        lora_A = reading.lora_A
        if x.dtype != lora_A.dtype:
            x = x.to(lora_A.dtype)
        x = x.reshape(-1, x.shape[-1])
        if slots is None and context.most is not None and weights.dim() > 1:
            way, span = self._way(context, reading, len(x))
            if way != "all":
                context.products = self._pick(context, reading, x, span, way)
                return
        expand = reading.expansion(each)
        if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
            weighted = WeightedProduct.apply(x, lora_A, reading.input_bias, weights, expand)
        else:
            seen = None if slots is None or dropping or torch.is_autocast_enabled(x.device.type) else slots.whole
            weighted = F.linear(x, lora_A, reading.input_bias) if seen is None else seen
            weighted = weighted * slot_weights(weights, expand, weighted.dtype)
        if context.mixes is not False:
            mixed = self._mix(reading, weighted, slot_weights(weights, expand, weighted.dtype))
            mixes = context.mixes_for(len(weighted))
            weighted = mixed if isinstance(mixes, bool) else torch.where(mixes, mixed, weighted)
        context.products = weighted.split_with_sizes(reading.sizes, -1) if len(self.names) > 1 else (weighted,)

    def _may_pick(self, context: LayerContext, reading: Reading) -> bool:
        """Whether what few adapters at each position add may be computed alone."""
        if torch.is_grad_enabled() or context.mixes is not False or torch.compiler.is_compiling():
            # A graph has one way for all sizes; and backwards are those of the one product.
            return False
        return not torch.is_autocast_enabled(reading.lora_A.device.type) and reading.pads_little

    def _sizes(self, context: LayerContext, reading: Reading, positions: int, span: int) -> Sizes:
        used = [(max(counts), features) for counts, features in zip(reading.slots, self.out_features, strict=True)]
        assert context.most is not None
        return Sizes(
            rows=positions // span,
            span=span,
            adapters=reading.adapters,
            most=context.most,
            in_features=reading.lora_A.shape[1],
            slots=tuple(slots for slots, _ in used),
            out_features=tuple(features for _, features in used),
            itemsize=reading.lora_A.element_size(),
            device=reading.lora_A.device.type,
        )

    def _way(self, context: LayerContext, reading: Reading, positions: int) -> tuple[Way, int]:
        """How to compute what few adapters at each position add, and how many positions in a row use the same ones."""
        if not self._may_pick(context, reading):
            return "all", 1
        of_rows = context.by_row and self.rows == "tokens" and positions == math.prod(context.shape)
        span = context.shape[1] if of_rows else 1
        assert context.most is not None
        key = (positions, span, reading.adapters, context.most)
        if key not in self._ways:
            if len(self._ways) >= _KEPT_WAYS:
                self._ways.clear()
            self._ways[key] = cheapest(self._sizes(context, reading, positions, span))
        return self._ways[key], span

    def _plan(
        self,
        context: LayerContext,
        reading: Reading,
        positions: int,
        gates: Sequence[Sequence[WeighsSlots]],
        named: Sequence[Shortlists],
    ) -> Plan:
        """From what gates weigh this input, and how the updates are computed then."""
        rows = sum(gate.score_rows for own in gates for gate in own)
        if rows > reading.adapters * len(gates):
            # More than one for each adapter are as much as another A.
            rows = 0
        if torch.is_grad_enabled() and rows:
            # The product with A is that of the backward, and would be another one.
            return BY_INPUT
        if context.most is None or not self._may_pick(context, reading):
            return EVERYTHING_READ
        scoring = Scoring(
            rows,
            sum(gate.list_rows for gate in named),
            max((gate.candidates for gate in named), default=0),
        )
        key = (positions, reading.adapters, context.most, *scoring)
        if key not in self._plans:
            if len(self._plans) >= _KEPT_WAYS:
                self._plans.clear()
            self._plans[key] = cheapest_plan(self._sizes(context, reading, positions, 1), scoring)
        return self._plans[key]

    def _pick_read(self, context: LayerContext, reading: Reading, slots: Slots) -> list[Picked | None]:
        """What the picked adapters of each module have read already; None as in `_pick`."""
        picked: list[Picked | None] = []
        sizes = (context.most or 1, reading.adapters)
        for member, counts in enumerate(reading.slots):
            listed = slots.listed[member]
            if not any(counts):
                picked.append(None)
            elif listed is not None:
                found = Picks.among(listed.slots, listed.weights, listed.adapters, sizes, slots.write)
                picked.append(Picked(*found))
            else:
                by_position = by_adapter(slots.own[member].T, counts).permute(2, 0, 1)
                weights = context.member_weights[member].expand(len(by_position), -1)
                picked.append(Picked(*Picks.among(by_position, weights, None, sizes, slots.write)))
        return picked

    def _pick(
        self, context: LayerContext, reading: Reading, x: Float[Tensor, "tokens in_features"], span: int, way: Way
    ) -> list[Picked | None]:
        """What the picked adapters of each module read; None for modules that none of the adapters targets."""
        picked: list[Picked | None] = []
        known: dict[int, Picks] = {}
        for weights, counts, (lora_A, bias) in zip(context.member_weights, reading.slots, reading.parts, strict=True):
            if not any(counts):
                picked.append(None)
                continue
            if id(weights) not in known:
                known[id(weights)] = Picks.of(weights, context.most or 1, span, way)
            picks = known[id(weights)]
            picked.append(Picked(picks, picks.read(x, lora_A, bias)))
        return picked

    def _mix(
        self,
        reading: Reading,
        weighted: Float[Tensor, "tokens slots"],
        slot_weights: Float[Tensor, "*tokens slots"],
    ) -> Float[Tensor, "tokens slots"]:
        """The cross terms, of modules some of which may have a `lora_bias`."""
        bias = reading.input_bias
        plain = weighted if bias is None else weighted * (1 - bias)
        mixed = mix_slots(plain, slot_weights, reading.places, self.place_count)
        # A `lora_bias` belongs to B alone: it is weighted once.
        return mixed if bias is None else torch.where(bias.bool(), weighted, mixed)

    def slots_of(self, member: int, adapter: int) -> tuple[slice, slice]:
        """Where an adapter's slots are in a module's own stack, and in that of all modules."""
        own, start = self._starts[member], self._member_starts[member]
        count = self.slots[member][adapter]
        return slice(own[adapter], own[adapter] + count), slice(start + own[adapter], start + own[adapter] + count)

    def forget(self) -> None:
        """Drop what was cut out, and which ways were the cheapest."""
        self._cuts.clear()
        self._ways.clear()
        self._plans.clear()
        if self.shelf is not None:
            self.shelf.stock.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget()
        return super()._apply(fn, recurse)


class Picked(NamedTuple):
    """What a module's picked adapters have read."""

    picks: Picks
    slots: Tensor


def _indices(slices: Sequence[slice], device: torch.device) -> Int[Tensor, " kept"]:
    kept = [position for part in slices for position in range(part.start, part.stop)]
    return torch.tensor(kept, dtype=torch.long, device=device)


def cut_writing(
    lora_B: Float[Tensor, "slots out_features"],
    output_scale: Float[Tensor, "adapters out_features"] | None,
    group: InputGroup,
    member: int,
    active: Active | None,
) -> Writing:
    """The stacked B of these adapters, or of all."""
    counts = group.slots[member]
    if active is None:
        return Writing(lora_B, output_scale, counts)
    index = _indices([group.slots_of(member, adapter)[0] for adapter in active], lora_B.device)
    scale = None
    if output_scale is not None:
        scale = output_scale.index_select(0, torch.tensor(active, dtype=torch.long, device=output_scale.device))
    return Writing(lora_B.index_select(0, index), scale, tuple(counts[adapter] for adapter in active))

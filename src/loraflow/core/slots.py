"""What adapters have read of one input, for gates that weigh by that instead of by the input (`WeighsSlots`)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loraflow.core.lanes import Lane, Lanes
from loraflow.core.picks import Picks, Way
from loraflow.methods.base import Site
from loraflow.methods.slots import Shortlists, Starts, WeighsSlots


class Listed(NamedTuple):
    """Candidates that were read alone, of one linear.

    Attributes:
        adapters: who they are.
        slots: what they have read, zero-padded to one width.
        weights: their fusion weights.
    """

    adapters: Int[Tensor, "tokens candidates"]
    slots: Float[Tensor, "tokens candidates width"]
    weights: Float[Tensor, "tokens candidates"]


class Slots(NamedTuple):
    """What adapters have read of one input, for each of the linears that read it.

    Attributes:
        whole: that of all adapters, unweighted, of all linears side by side; None where only candidates were read.
        own: the same for each linear.
        listed: the candidates of each linear, where only they were read.
        starts: where the slots of each adapter begin, for each linear.
        active: the adapters that took part, by position; None for all.
        write: how the updates of those that get a weight are to be computed.
    """

    whole: Float[Tensor, "tokens slots"] | None
    own: Sequence[Float[Tensor, "tokens _own"]]
    listed: Sequence[Listed | None]
    starts: Sequence[Starts]
    active: tuple[int, ...] | None
    write: Way


def weigh(
    slots: Slots | None,
    lane: Lane,
    gate: nn.Module,
    member: int,
    x: Float[Tensor, "*batch features"],
    rows: Tensor | None,
) -> Float[Tensor, "*weights own_adapters"]:
    """The weights of one linear's gate, for its input or some of the rows of that.

    By what the adapters have read, where that is at hand and the gate can; else by the input.
    """
    if slots is None or not getattr(gate, "by_slots", False):
        return gate(x if rows is None else x[rows])
    listed, starts, shape = slots.listed[member], slots.starts[member], x.shape[:-1]
    if listed is not None:
        weights = listed.weights.new_zeros(len(listed.weights), len(starts))
        return weights.scatter(-1, listed.adapters, listed.weights).view(*shape, len(starts))
    if lane.among is not None and lane.among != slots.active:
        places = lane.among if slots.active is None else [slots.active.index(adapter) for adapter in lane.among]
        starts = tuple(starts[place] for place in places)
    u = slots.own[member].view(*shape, -1)
    return cast(WeighsSlots, gate).weigh_slots(u if rows is None else u[rows], starts)


def slot_gates(lanes: Lanes, layer: int, names: Sequence[str]) -> list[list[WeighsSlots]]:
    """The gates of these linears, in all lanes, that weigh by what adapters have read."""
    own = [lane for lane in lanes.lanes if lane.reads_slots]
    found = [[lane.gate(layer, name) for lane in own] for name in names]
    return [[cast(WeighsSlots, gate) for gate in gates if getattr(gate, "by_slots", False)] for gates in found]


def try_gate(gate: nn.Module, site: Site, device: torch.device, dtype: torch.dtype) -> None:
    """Let a gate weigh one token of zeros, by what it will be asked with."""
    if not getattr(gate, "by_slots", False):
        gate(torch.zeros(1, 1, site.features, device=device, dtype=dtype))
        return
    ranks = [0 if update is None else update.rank for update in site.updates[site.module or ""]]
    starts = tuple(itertools.accumulate(ranks[:-1], initial=0))
    cast(WeighsSlots, gate).weigh_slots(torch.zeros(1, 1, sum(ranks), device=device, dtype=dtype), starts)


def shortlists(only: Lane | None, gates: Sequence[Sequence[WeighsSlots]]) -> list[Shortlists]:
    """The gates of linears that read one input, where there is one lane and all of them can name candidates; or none.

    Candidates are named by their place among the gate's own adapters, which must be that in the stack.
    """
    if only is None or (only.among is not None and list(only.among) != sorted(only.among)):
        return []
    if not all(len(own) == 1 and getattr(own[0], "lists", False) for own in gates):
        return []
    return [cast(Shortlists, gate) for (gate,) in gates]


def read_listed(
    gate: Shortlists,
    x: Float[Tensor, "tokens in_features"],
    read: Float[Tensor, "tokens in_features"],
    part: tuple[Tensor, Tensor | None],
    way: Way,
) -> Listed:
    """Let a gate name its candidates, and weigh them by what only they have read."""
    lora_A, bias = part
    chosen = gate.shortlist(x)
    picks = Picks.listing(chosen, read, len(lora_A), way)
    slots = picks.of_positions(picks.read(read, lora_A, bias))
    return Listed(chosen, slots, gate.weigh_listed(slots, chosen))


def exactly(device: str) -> contextlib.AbstractContextManager[None]:
    """In the precision of what is multiplied, under autocast too."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()

"""Which adapters may weigh anything in a batch: what is known of it before a forward, so that compute follows use."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loraflow.core.lanes import Informed, Lane, Lanes
from loraflow.methods.base import FewWeights, KnownWeights

Active = tuple[int, ...]
"""Positions of adapters among all, ascending."""


def lasting() -> contextlib.AbstractContextManager[None]:
    """Where tensors are made that outlive a forward: what is made in inference mode, no backward may use."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


@dataclass(frozen=True)
class Use:
    """The adapters that a batch uses.

    Attributes:
        active: those that may have a weight somewhere; None for all of them.
        most: how many may have one at the same position; None for as many as there are.
        by_row: whether all positions of a row use the same ones.
        lasts: whether that cannot change as long as the lanes are these.
    """

    active: Active | None = None
    most: int | None = None
    by_row: bool = False
    lasts: bool = True
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def index(self, device: torch.device) -> Int[Tensor, " active"]:
        """The positions of the active adapters as a tensor."""
        assert self.active is not None
        if device not in self._indices:
            with lasting():
                self._indices[device] = torch.tensor(self.active, dtype=torch.long, device=device)
        return self._indices[device]


EVERYTHING = Use()
"""Nothing is known: every adapter may weigh anywhere."""


def use_of(lanes: Lanes, adapters: int, *, first: bool) -> Use:
    """What lanes use of so many adapters; each forward's first layer looks again where that may have changed.

    Where a gradient is wanted of known weights, those that are zero have one too, and all count as used.
    """
    learning = torch.is_grad_enabled()
    found = lanes.uses.get(learning)
    if torch.compiler.is_compiling():
        # A graph is made once, and values that may change are no part of it.
        return found if found is not None and found.lasts else EVERYTHING
    if found is None or (first and not found.lasts):
        found = _find(lanes, adapters, learning)
        lanes.uses[learning] = found
        if not any(weights.requires_grad for lane in lanes.lanes for weights in _known(lane)):
            lanes.uses[not learning] = found
    return found


def _find(lanes: Lanes, adapters: int, learning: bool) -> Use:
    active: set[int] = set()
    most, by_row, lasts = 0, not lanes.flat, True
    for lane in lanes.lanes:
        if not lane.gates:
            continue
        among = range(adapters) if lane.among is None else lane.among
        gates, known = list(lane.gates.values()), _known(lane)
        by_row = by_row and len(known) == len(gates)
        lasts = lasts and not (known and any(_has_parameters(gate) for gate in gates))
        unread = any(weights.is_meta or (learning and weights.requires_grad) for weights in known)
        if unread or len(known) < len(gates):
            active.update(_candidates(gates, among))
            most = max(most, _most(gates, len(among)))
            continue
        rows = [weights.detach().to(known[0].device) for weights in known]
        used = (torch.stack(rows).reshape(len(rows), -1, len(among)) != 0).cpu()
        active.update(among[position] for position in used.flatten(0, 1).any(dim=0).nonzero().flatten().tolist())
        most = max(most, int(used.sum(dim=-1).max()) if len(used[0]) else 0)
    if len(active) == adapters:
        return Use(None, None if most >= adapters else most, by_row, lasts)
    return Use(tuple(sorted(active)), None if most >= len(active) else most, by_row, lasts)


def _known(lane: Lane) -> list[Float[Tensor, "*requests adapters"]]:
    return [gate.known_weights() for gate in lane.gates.values() if isinstance(gate, KnownWeights)]


def _candidates(gates: Sequence[nn.Module], among: Sequence[int]) -> Sequence[int]:
    """Those of a lane's adapters that may have a weight, where its prompts have been read: they exclude the others."""
    if not all(isinstance(gate, Informed) for gate in gates):
        return among
    return [among[position] for gate in gates[:1] for position in cast(Informed, gate).heard.candidates]


def _most(gates: Sequence[nn.Module], adapters: int) -> int:
    return max(min(gate.most, adapters) if isinstance(gate, FewWeights) else adapters for gate in gates)


def _has_parameters(gate: nn.Module) -> bool:
    return next(gate.parameters(), None) is not None

"""Who weighs: the fusion's own method, and in its place what a `with` block has chosen for the thread or task inside.

A block holds no lock, for it may well wait for what another thread answers: each call of the model puts what its own
caller has chosen in place, once it has the model's turn.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loraflow.adapters import Adapter
from loraflow.core.attach import Attachment
from loraflow.core.batch import RowMethod
from loraflow.core.lanes import Gates
from loraflow.errors import MethodError
from loraflow.methods import Method, get_method

_KEPT = 16
"""How many methods' gates are kept at once beside those in use."""


@dataclass(frozen=True, eq=False)
class Use:
    """A method with its gates, made for these adapters."""

    method: Method
    gates: Gates
    adapters: tuple[Adapter, ...]

    def fits(self, adapters: tuple[Adapter, ...]) -> bool:
        """Whether it was made for these, or for the same ones put into the model at another time."""
        if self.adapters is adapters:
            return True
        mine, others = ([(one.name, one.identity) for one in group] for group in (self.adapters, adapters))
        return mine == others


class _Block:
    """One run of a `with` block; it may be ended from a context that never entered it, as a generator's can be."""

    ended = False


@dataclass(frozen=True)
class _Chosen:
    block: _Block
    use: Use


_BLOCKS: ContextVar[Mapping[Choice, tuple[_Chosen, ...]]] = ContextVar("loraflow_blocks")


@dataclass(eq=False)
class Choice:
    """A fusion's own method, and those that blocks have chosen, each for the context that runs it.

    Attributes:
        own: what weighs wherever no block says otherwise, and what is saved.
    """

    own: Use
    # Of methods that learn nothing, by name and parameters: Arrow's directions, say, take a while to find.
    _made: dict[str, Gates] = field(default_factory=dict)
    _in_blocks: weakref.WeakSet[Use] = field(default_factory=weakref.WeakSet)

    @property
    def now(self) -> Use:
        """What weighs for the caller."""
        open_blocks = self._open_blocks()
        return open_blocks[-1].use if open_blocks else self.own

    @property
    def in_block(self) -> bool:
        """Whether the caller is inside a block."""
        return bool(self._open_blocks())

    @contextlib.contextmanager
    def block(self, use: Use) -> Iterator[None]:
        """Let this weigh for the caller inside the block."""
        block = _Block()
        self._in_blocks.add(use)
        self._set((*self._open_blocks(), _Chosen(block, use)))
        try:
            yield
        finally:
            inside = self._open_blocks()
            # Not always the innermost: blocks of generators end in any order, and where the last reference is dropped.
            rest = tuple(one for one in inside if one.block is not block)
            block.ended = len(rest) == len(inside)
            self._set(rest)

    def change(self, use: Use) -> None:
        """Let this weigh from now on: in the caller's innermost block, or as the fusion's own where there is none."""
        open_blocks = self._open_blocks()
        if not open_blocks:
            self.own = use
            return
        self._in_blocks.add(use)
        self._set((*open_blocks[:-1], _Chosen(open_blocks[-1].block, use)))

    def gates_of(self, method: RowMethod, attachment: Attachment) -> tuple[Method, Gates]:
        """A method and its gates; None is the one in use.

        Raises:
            MethodError: if it would learn, and is not one that is here.
        """
        if method is None:
            return self.now.method, self.now.gates
        for use in (self.now, self.own):
            if use.method.learns and method in (use.method, use.method.name):
                return use.method, use.gates
        chosen = get_method(method, [adapter.name for adapter in attachment.adapters])
        if chosen.learns:
            own = self.own.method
            raise MethodError(
                f"The method {chosen.name!r} must be fitted first, and what is fitted here is {own.name!r} with "
                f"{own.parameters()}. Beside it, use methods that learn nothing."
            )
        if chosen.level == "task":
            # Cheap to make, and requests may each have other weights.
            return chosen, attachment.make_gates(chosen)
        key = json.dumps([chosen.name, chosen.parameters()], sort_keys=True)
        if key not in self._made:
            while len(self._made) >= _KEPT:
                del self._made[next(iter(self._made))]
            self._made[key] = attachment.make_gates(chosen)
        return chosen, self._made[key]

    def fresh(self, method: str | Method | Mapping[str, float], attachment: Attachment) -> Use:
        """A method as before any training."""
        chosen = get_method(method, [adapter.name for adapter in attachment.adapters])
        gates = attachment.make_gates(chosen) if chosen.learns else self.gates_of(chosen, attachment)[1]
        for gate in gates.values():
            gate.requires_grad_(chosen.learns is not None)
        return Use(chosen, gates, attachment.adapters)

    def forget_made(self) -> None:
        """Forget gates that were kept for other calls, as when the model is moved, or has other adapters."""
        self._made.clear()

    def gates_outside(self) -> Iterator[nn.Module]:
        """The gates of all blocks, which are no modules of the model."""
        own = {id(gate) for gate in self.own.gates.values()}
        found = {id(gate): gate for use in list(self._in_blocks) for gate in use.gates.values()}
        return (gate for key, gate in found.items() if key not in own)

    def __reduce__(self) -> tuple[Any, ...]:
        # Blocks are of those who run them; a copy is of the fusion's own.
        return Choice, (self.own,)

    def _open_blocks(self) -> tuple[_Chosen, ...]:
        chosen = _BLOCKS.get({}).get(self, ())
        return tuple(one for one in chosen if not one.block.ended) if chosen else chosen

    def _set(self, chosen: tuple[_Chosen, ...]) -> None:
        others = {choice: of_it for choice, of_it in _BLOCKS.get({}).items() if choice is not self}
        _BLOCKS.set({**others, self: chosen} if chosen else others)

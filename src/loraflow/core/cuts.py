"""Parts of a stack of adapters' matrices, cut out for the sets of adapters that batches use, and kept while they do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from loraflow.core.active import Active, lasting


class Sized(Protocol):
    """Something with matrices."""

    @property
    def nbytes(self) -> int:
        """Their bytes."""


Part = TypeVar("Part", bound=Sized)


class Cuts(Generic[Part]):
    """What was cut out of one stack, by the set of adapters; the least recently used leave.

    Who asks says how to cut: here that is always a selection from a stack that holds all adapters, but nothing beside
    it may need one, so that the matrices of a set can as well be loaded from somewhere else. Of all kept parts together
    there are at most as many bytes as of the stack, but for one part, which is always kept.
    """

    def __init__(self) -> None:
        self._kept: dict[Active | None, Part] = {}
        self._stack: weakref.ref[Tensor] | None = None
        self._last: tuple[Active | None, Part] | None = None

    def of(self, active: Active | None, stack: Tensor, cut: Callable[[Active | None], Part]) -> Part:
        """The part for these adapters, all of them for None.

        Args:
            active: the adapters.
            stack: what is cut; where it is another tensor than before (the model was moved), nothing before counts.
            cut: cuts it.
        """
        if torch.compiler.is_compiling():
            # A graph takes what is there; what it would make is made at each of its runs.
            found = self._kept.get(active)
            return cut(active) if found is None else found
        if self._stack is None or self._stack() is not stack:
            self.clear()
            self._stack = weakref.ref(stack)
        if self._last is not None and self._last[0] is active:
            return self._last[1]
        part = self._kept.pop(active, None)
        if part is None:
            with lasting():
                part = cut(active)
        self._kept[active] = part
        self._last = (active, part)
        self._make_room(stack.nbytes)
        return part

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept beside the stack."""
        return sum(part.nbytes for active, part in self._kept.items() if active is not None)

    def clear(self) -> None:
        """Keep nothing more."""
        self._kept, self._last, self._stack = {}, None, None

    def _make_room(self, limit: int) -> None:
        parts = [active for active in self._kept if active is not None]
        while len(parts) > 1 and self.nbytes > limit:
            del self._kept[parts.pop(0)]

    def __reduce__(self) -> tuple[type[Cuts[Part]], tuple[()]]:
        # A copy cuts for itself.
        return Cuts, ()

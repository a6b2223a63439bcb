"""Adapters of a bank in a model: the matrices of those that a forward uses, made from their files when one uses them.

A *stock* has nothing of adapters that no forward has used but their shapes. What a forward uses is told before it runs
(`core/active.py`): `bring` loads the adapters of that set, makes their part of every linear, one adapter at a time, and
joins the parts. The parts of single adapters and of sets stand on *shelves*, one for each input that linears read, and
those that were used longest ago leave, all linears' together, where there are more bytes than the bank allows a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from loraflow.adapters import Adapter
from loraflow.core.active import Active, lasting
from loraflow.core.cuts import Sized
from loraflow.errors import MethodError

Part = TypeVar("Part", bound=Sized)


class Shelf(Generic[Part]):
    """The parts that a stock has made for the linears of one input, by the set of adapters."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock
        self._parts: dict[Active, Part] = {}
        self._last: tuple[Active | None, Part] | None = None

    def of(self, active: Active | None) -> Part:
        """The part for these adapters, or for all; it is made, and that of every other shelf, where it is not there."""
        if self._last is not None and self._last[0] is active:
            return self._last[1]
        key = self.stock.everything if active is None else active
        if key not in self._parts:
            self.stock.bring(key)
        self._last = (active, self._parts[key])
        return self._last[1]

    def put(self, active: Active, part: Part) -> None:
        """Have a part from now on."""
        self._parts[active] = part

    def take(self, active: Active) -> None:
        """Have it no longer."""
        self._parts.pop(active, None)
        self._last = None

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self._parts.values())

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own.
        return {**self.__dict__, "_parts": {}, "_last": None}


class Filler(Protocol[Part]):
    """Makes the parts of one shelf."""

    shelf: Shelf[Part]

    def size_bytes(self, adapter: int) -> int:
        """Bytes of the part of an adapter alone."""

    def make(self, position: int, adapter: Adapter) -> Part:
        """The part of an adapter alone, given its weights."""

    def join(self, parts: Sequence[Part]) -> Part:
        """The part of several adapters, given those of each."""


class Stock:
    """The adapters of a model, in order, that are loaded when they are used.

    Attributes:
        adapters: all of them.
        limit_bytes: how many bytes of parts are kept; those in use always are.
        everything: the set of all.
    """

    adapters: tuple[Adapter, ...]
    limit_bytes: int
    everything: Active

    def __init__(self, adapters: Sequence[Adapter], limit_bytes: int) -> None:
        self.adapters = tuple(adapters)
        self.limit_bytes = limit_bytes
        self.everything = tuple(range(len(self.adapters)))
        self._fillers: list[Filler[Any]] = []
        self._kept: dict[Active, None] = {}
        self._last: Active | None = None

    def fill(self, filler: Filler[Any]) -> None:
        """Let this make the parts of its shelf."""
        self._fillers.append(filler)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts that are kept."""
        return sum(filler.shelf.nbytes for filler in self._fillers)

    def size_bytes(self, active: Active) -> int:
        """Bytes of the matrices of these adapters."""
        return sum(filler.size_bytes(adapter) for filler in self._fillers for adapter in active)

    def check(self, active: Active) -> None:
        """Check that these adapters may be used at once.

        Raises:
            MethodError: if their matrices are larger than all that may be kept.
        """
        needed = self.size_bytes(active)
        if needed > self.limit_bytes:
            raise MethodError(
                f"{len(active)} of the bank's {len(self.adapters)} adapters would be used at once, whose matrices take "
                f"{needed} bytes, and `device_bytes` (={self.limit_bytes}) is less. Take a method that gives few of "
                "them a weight, known before the pass (weights by name, one adapter, a query-level method), name fewer "
                "adapters when the fusion is made, or open the bank with more `device_bytes`."
            )

    def bring(self, active: Active | None) -> Active:
        """Have the parts of these adapters, or of all, on every shelf, and give the set.

        Raises:
            MethodError: if they may not be used at once, or a graph is made that would have to load them.
        """
        key = self.everything if active is None else active
        if key is self._last or not key:
            return key
        if torch.compiler.is_compiling():
            if key not in self._kept:
                raise MethodError(
                    f"A graph is compiled that uses {len(key)} adapters of a bank that are not loaded. Choose them "
                    'before, with `using({"name": weight, ...})` or `set_method`, or call the model once uncompiled.'
                )
            return key
        if key not in self._kept:
            self.check(key)
            with lasting(), torch.no_grad():
                self._make(key)
        # The last is the one that was used last.
        self._kept[key] = self._kept.pop(key, None)
        self._last = key
        self._make_room(self.limit_bytes, (key,))
        return key

    def clear(self) -> None:
        """Keep nothing more."""
        for active in list(self._kept):
            self._drop(active)

    def _make(self, active: Active) -> None:
        singles = [(adapter,) for adapter in active]
        needed = self.size_bytes(active)
        self._make_room(self.limit_bytes - needed, singles)
        for adapter, single in zip(active, singles, strict=True):
            if single not in self._kept:
                self._make_one(adapter)
        if len(singles) > 1:
            # Where there is no room for both, each adapter's own part goes as soon as it stands in that of all.
            scarce = self.nbytes + needed > self.limit_bytes
            try:
                with self._whole(active):
                    for filler in self._fillers:
                        filler.shelf.put(active, filler.join([filler.shelf.of(single) for single in singles]))
                        for single in singles if scarce else ():
                            filler.shelf.take(single)
            finally:
                for single in singles if scarce else ():
                    self._drop(single)

    def _make_one(self, position: int) -> None:
        adapter = self.adapters[position]
        # Held until all is made of it, whatever the bank keeps.
        weights = getattr(adapter, "whole", lambda: adapter)()
        with self._whole((position,)):
            for filler in self._fillers:
                filler.shelf.put((position,), filler.make(position, weights))

    @contextlib.contextmanager
    def _whole(self, active: Active) -> Iterator[None]:
        """The parts of a set on all shelves, or on none."""
        self._kept[active] = None
        try:
            yield
        except BaseException:
            self._drop(active)
            raise

    def _make_room(self, limit: int, needed: Sequence[Active]) -> None:
        total = self.nbytes
        for active in list(self._kept) if total > limit else ():
            if active not in needed:
                total -= sum(filler.shelf.of(active).nbytes for filler in self._fillers)
                self._drop(active)
            if total <= limit:
                break

    def _drop(self, active: Active) -> None:
        self._kept.pop(active, None)
        self._last = None
        for filler in self._fillers:
            filler.shelf.take(active)

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own.
        return {**self.__dict__, "_kept": {}, "_last": None}

"""An adapter of a bank: its headers say its shapes, and its weights come from the bank when they are asked for."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from loraflow.adapters.base import Adapter, AdapterSource, LoraModule
from loraflow.adapters.index import Signature
from loraflow.adapters.match import match_adapter


@dataclass(frozen=True)
class BankEntry:
    """What a bank knows of an adapter that is not in memory.

    Attributes:
        version: a number that no other entry of the bank has or had; another adapter under the same name has another.
        source: where it is; on the Hub with the resolved commit as revision.
        size_bytes: of its tensors.
        ranks: the distinct ranks of its modules, ascending.
        kind: the same for all adapters whose headers say the same, and which so differ in their values alone.
        digest: of its weights, once they have been read.
        signature: what tells its files from changed ones; None where they cannot change.
    """

    name: str
    version: int
    source: AdapterSource
    size_bytes: int
    ranks: tuple[int, ...]
    kind: str
    digest: str | None = None
    signature: Signature | None = field(default=None, repr=False)


class ReadsAdapters(Protocol):
    """What reads adapters when they are asked for: a bank.

    Attributes:
        device_bytes: how many bytes of matrices a model keeps.
    """

    device_bytes: int

    def load(self, name: str, entry: BankEntry | None = None) -> Adapter:
        """An adapter with its weights."""

    def digest(self, entry: BankEntry) -> str:
        """The digest of an adapter's weights."""


class StoredAdapter(Adapter):
    """An adapter whose weights a bank reads when they are asked for, and keeps; of itself it holds none.

    Attributes:
        outline: the same with its tensors on the meta device; by the names of a base, once it is put into one.
    """

    outline: Adapter
    _bank: ReadsAdapters
    _entry: BankEntry
    # As the file has it, and whether a base has the same names.
    _bare: Adapter
    _same_names: bool
    _base: nn.Module | None
    _kept: tuple[weakref.ref[Adapter], Adapter] | None
    _digest: str | None

    def __init__(self, bank: ReadsAdapters, entry: BankEntry, outline: Adapter) -> None:
        # Those of the frozen dataclass that have values at once.
        vars(self).update(
            name=entry.name, source=entry.source, config=outline.config, copies={}, placed=False, outline=outline
        )
        vars(self).update(_bank=bank, _entry=entry, _bare=outline, _base=None, _same_names=True)
        vars(self).update(_kept=None, _digest=entry.digest)

    @property
    def modules(self) -> Mapping[str, LoraModule]:
        """Its updates, each read when it is asked for; what their names are is known."""
        return _StoredModules(self)

    @property
    def digest(self) -> str:
        """SHA-256 of its weights; where nobody has read them yet, they are read for it."""
        digest = self._digest or self._bank.digest(self._entry)
        vars(self)["_digest"] = digest
        return digest

    @property
    def identity(self) -> Hashable:
        """What no other adapter has, another version of the same name neither."""
        return id(self._bank), self._entry.version

    @property
    def bank(self) -> ReadsAdapters:
        """Where its weights come from."""
        return self._bank

    @property
    def parameters(self) -> int:
        """Number of values in the adapter's tensors."""
        return self.outline.parameters

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its modules, ascending."""
        return self.outline.ranks

    @property
    def uses_dora(self) -> bool:
        """Whether any of its modules carries a DoRA magnitude."""
        return self.outline.uses_dora

    def called(self, name: str) -> StoredAdapter:
        """The same by another name."""
        renamed = copy.copy(self)
        vars(renamed)["name"] = name
        return renamed

    def whole(self) -> Adapter:
        """The adapter with its weights, by the names of the base that it was put into, if it was.

        Raises:
            AdapterError: if they cannot be read, or have changed since the bank read them first.
        """
        read = self._bank.load(self.name, self._entry)
        if self._base is None or self._same_names:
            return read
        if self._kept is not None and self._kept[0]() is read:
            return self._kept[1]
        # By other names, and no longer than the bank keeps it.
        placed = match_adapter(read, self._base)
        vars(self)["_kept"] = weakref.ref(read, self._forget), placed
        return placed

    def put_into(self, base: nn.Module, known: dict[str, Adapter]) -> StoredAdapter:
        """The same for a base; `known` has the outlines that were found to fit it, by kind.

        Raises:
            AdapterError: if it does not fit.
        """
        if self._base is base:
            return self
        if self._bare.copies:
            # What it brings of the base is told by its values alone.
            match_adapter(self._bank.load(self.name, self._entry), base)
        kind = self._entry.kind
        if kind not in known:
            bare = dataclasses.replace(self._bare, name=self.name, source=self.source, copies={})
            known[kind] = match_adapter(bare, base)
        placed, outline = StoredAdapter(self._bank, self._entry, self._bare), known[kind]
        same = all(self._bare.modules.get(name) is module for name, module in outline.modules.items())
        vars(placed)["name"] = self.name
        vars(placed).update(outline=outline, config=outline.config, placed=True, _base=base, _same_names=same)
        return placed

    def _forget(self, _: object) -> None:
        vars(self)["_kept"] = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"StoredAdapter({self.name!r}, {self.source.path!r})"


class _StoredModules(Mapping[str, LoraModule]):
    def __init__(self, adapter: StoredAdapter) -> None:
        self._adapter = adapter

    def __getitem__(self, name: str) -> LoraModule:
        if name not in self._adapter.outline.modules:
            raise KeyError(name)
        return self._adapter.whole().modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self._adapter.outline.modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.outline.modules)

    def __len__(self) -> int:
        return len(self._adapter.outline.modules)


class StoredUpdates(Sequence[LoraModule | None]):
    """What adapters of a bank do to one place: each read when it is asked for."""

    def __init__(self, adapters: Sequence[Adapter], name: str) -> None:
        self._adapters, self._name = tuple(adapters), name

    def __getitem__(self, position: Any) -> Any:
        """The update of one adapter, None where it has none; or those of several, still unread."""
        if isinstance(position, slice):
            return StoredUpdates(self._adapters[position], self._name)
        return self._adapters[position].modules.get(self._name)

    def __len__(self) -> int:
        return len(self._adapters)

    def among(self, positions: Sequence[int]) -> StoredUpdates:
        """Those of some of the adapters."""
        return StoredUpdates([self._adapters[position] for position in positions], self._name)

    def any(self) -> bool:
        """Whether one of the adapters has an update there."""
        return any(self._name in adapter.modules for adapter in self._adapters)


def outlined(adapter: Adapter) -> Adapter:
    """What is known of an adapter without its weights; those in memory are known."""
    return adapter.outline if isinstance(adapter, StoredAdapter) else adapter


def outlines(adapters: Sequence[StoredAdapter], base: nn.Module) -> Iterator[Callable[[], Adapter]]:
    """Checks each adapter against a base, and gives what is known of it without its weights."""
    known: dict[str, Adapter] = {}
    return (functools.partial(_outline, adapter, base, known) for adapter in adapters)


def _outline(adapter: StoredAdapter, base: nn.Module, known: dict[str, Adapter]) -> Adapter:
    outline = adapter.put_into(base, known).outline
    return dataclasses.replace(outline, name=adapter.name, source=adapter.source)


def match_adapters(adapters: Sequence[Adapter], base: nn.Module) -> tuple[Adapter, ...]:
    """Each adapter checked against a base, as `match_adapter` does; those of a bank by kind, and unread.

    Raises:
        AdapterError: if one does not fit.
    """
    known: dict[str, Adapter] = {}
    return tuple(
        adapter.put_into(base, known) if isinstance(adapter, StoredAdapter) else match_adapter(adapter, base)
        for adapter in adapters
    )

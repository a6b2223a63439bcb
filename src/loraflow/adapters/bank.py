"""Many adapters, of which few are in memory: an index of all, and the weights of those in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraflow.adapters.base import Adapter, AdapterSource, LoraModule
from loraflow.adapters.files import models_of_collection
from loraflow.adapters.folders import find_adapters, names_of
from loraflow.adapters.index import INDEX_FILE, IndexEntry, read_index, signature_of, write_index
from loraflow.adapters.loading import kind_of, load_adapter, outline_adapter
from loraflow.adapters.stored import BankEntry, StoredAdapter
from loraflow.errors import AdapterError, did_you_mean

DEFAULT_HOST_BYTES = 4 * 2**30
DEFAULT_DEVICE_BYTES = 4 * 2**30
_SHOWN = 3


class AdapterBank(Mapping[str, BankEntry]):
    """Adapters by name, in order, as many as there are: their headers are read, and their weights when they are used.

    Weights are read whole from their files' memory maps, and copied: a trainer that overwrites a file in place would
    otherwise change what is in use, or end the process. Those used longest ago leave when there are more than
    `host_bytes` of them; whoever still holds one keeps it, also when it is removed or another takes its name. Threads
    may share a bank.

    Args:
        adapters: a folder with adapters in it (at most three levels deep), named by their folders; a list of sources,
            named by their last parts; or sources by name.
        host_bytes: how many bytes of weights are kept, beside those that somebody holds; a whole number.
        device_bytes: how many bytes of matrices each model that the bank is fused into keeps on its devices; a whole
            number.
        skip_broken: leave adapters out that cannot be read, and say so in `left_out`.

    Attributes:
        host_bytes: how many bytes of weights are kept.
        device_bytes: how many bytes of matrices a model keeps.
        folder: the folder that it was opened from, where its index is and what belongs beside it; None for others.
        left_out: why adapters were left out, by name, where the user asked for that.

    Raises:
        AdapterError: if there are none, some cannot be read (the message names them), or the bytes are no number.
    """

    host_bytes: int
    device_bytes: int
    folder: Path | None
    left_out: Mapping[str, str]

    def __init__(
        self,
        adapters: str | Path | Sequence[str | Path | AdapterSource] | Mapping[str, str | Path | AdapterSource],
        *,
        host_bytes: int = DEFAULT_HOST_BYTES,
        device_bytes: int = DEFAULT_DEVICE_BYTES,
        skip_broken: bool = False,
    ) -> None:
        for name, value in (("host_bytes", host_bytes), ("device_bytes", device_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise AdapterError(f"`{name}` (={value!r}) must be a whole number of bytes, at least 1.")
        self.host_bytes, self.device_bytes = host_bytes, device_bytes
        self._lock = threading.RLock()
        self._changes = 0
        self._outlines: dict[str, Adapter] = {}
        self._versions = count(1)
        self._entries: dict[str, BankEntry] = {}
        self._reading: dict[int, threading.Lock] = {}
        self._held: OrderedDict[int, Adapter] = OrderedDict()
        self._held_bytes = 0
        self.folder = None
        if isinstance(adapters, str | Path):
            self.folder = Path(adapters).expanduser().resolve()
            adapters = find_adapters(self.folder)
        elif not isinstance(adapters, Mapping):
            adapters = names_of(adapters)
        self.left_out = self._open(adapters, skip_broken=skip_broken)

    @classmethod
    def from_collection(
        cls,
        slug: str,
        *,
        host_bytes: int = DEFAULT_HOST_BYTES,
        device_bytes: int = DEFAULT_DEVICE_BYTES,
        skip_broken: bool = False,
    ) -> AdapterBank:
        """Open the adapters of a collection on the Hugging Face Hub (`user/title-0123456789abcdef`).

        Args:
            slug: its name there.
            host_bytes: how many bytes of weights are kept.
            device_bytes: how many bytes of matrices a model keeps.
            skip_broken: leave models out that cannot be read as adapters, and say so in `left_out`.

        Raises:
            AdapterError: if the collection cannot be read or has no models, or as for a bank of those.
        """
        models = models_of_collection(slug)
        return cls(models, host_bytes=host_bytes, device_bytes=device_bytes, skip_broken=skip_broken)

    def __getitem__(self, name: str) -> BankEntry:
        """What is known of an adapter.

        Raises:
            KeyError: if there is none of that name.
        """
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"AdapterBank({len(self)} adapters, {self.held_bytes} of {self.host_bytes} bytes held)"

    @property
    def held_bytes(self) -> int:
        """Bytes of weights that are kept now."""
        with self._lock:
            return self._held_bytes

    @property
    def changes(self) -> int:
        """How many times an adapter was added, removed or replaced."""
        return self._changes

    def stored(self) -> tuple[StoredAdapter, ...]:
        """All of its adapters of this moment, in order, of which nothing is read before it is asked for.

        Raises:
            AdapterError: if the files of one have changed since they were read first.
        """
        with self._lock:
            entries = list(self._entries.values())
        return tuple(StoredAdapter(self, entry, self._outline_of(entry)) for entry in entries)

    def digest(self, entry: BankEntry) -> str:
        """The digest of an adapter's weights; they are read for it once.

        Raises:
            AdapterError: if they cannot be read, or have changed since they were read first.
        """
        with self._lock:
            known = self._known(entry).digest
        return known or self.load(entry.name, entry).digest

    def load(self, name: str, entry: BankEntry | None = None) -> Adapter:
        """An adapter with its weights, from memory or else from its files.

        Args:
            name: its name.
            entry: which of those that have had this name; by default the present one.

        Raises:
            AdapterError: if there is none of that name, it cannot be read, or its files have changed since they were
                read first.
        """
        with self._lock:
            entry = entry or self._entry(name)
            reading = self._reading.setdefault(entry.version, threading.Lock())
        try:
            # Others are served meanwhile; who wants the same waits for it.
            with reading:
                with self._lock:
                    held = self._held.get(entry.version)
                    if held is not None:
                        self._held.move_to_end(entry.version)
                        return held
                    entry = self._known(entry)
                adapter = _read(entry)
                with self._lock:
                    self._remember(entry, adapter)
            return adapter
        finally:
            # One that was replaced or removed is remembered nowhere, and neither is who waits for it.
            with self._lock:
                if not self._is_present(entry):
                    self._reading.pop(entry.version, None)

    def add(self, name: str, source: str | Path | AdapterSource) -> BankEntry:
        """Take in another adapter, as the last.

        Raises:
            AdapterError: if there is one of that name, or it cannot be read.
        """
        if name in self._entries:
            raise AdapterError(f"The bank has an adapter {name!r}. Replace it, or give another name.")
        entry = self._outlined(name, source)
        with self._lock:
            if name in self._entries:
                raise AdapterError(f"The bank has an adapter {name!r}. Replace it, or give another name.")
            self._entries[name] = entry
            self._changes += 1
        return entry

    def remove(self, name: str) -> None:
        """Leave an adapter out from now on; who uses it keeps it.

        Raises:
            AdapterError: if there is none of that name.
        """
        with self._lock:
            self._forget(self._entry(name))
            del self._entries[name]
            self._changes += 1

    def replace(self, name: str, source: str | Path | AdapterSource | None = None) -> BankEntry:
        """Put another adapter in a name's place, or read its files again; who uses the old one keeps it.

        Raises:
            AdapterError: if there is none of that name, or the new one cannot be read; the old one stays then.
        """
        with self._lock:
            old = self._entry(name)
        entry = self._outlined(name, old.source if source is None else source)
        with self._lock:
            self._forget(self._entry(name))
            self._entries[name] = entry
            self._changes += 1
        return entry

    def save_index(self, path: str | Path | None = None) -> Path:
        """Write what is known of all adapters, their digests too, so that they are opened sooner.

        Args:
            path: where to; by default into the bank's folder, where it is found again.

        Raises:
            AdapterError: if no path is given, and the bank is of no folder.
        """
        if path is None:
            if self.folder is None:
                raise AdapterError("A bank that was opened from no folder has no place for its index. Give a path.")
            path = self.folder / INDEX_FILE
        with self._lock:
            known = {
                name: IndexEntry(
                    source=entry.source.path,
                    signature=entry.signature,
                    size_bytes=entry.size_bytes,
                    ranks=entry.ranks,
                    kind=entry.kind,
                    digest=entry.digest,
                )
                for name, entry in self._entries.items()
                if entry.signature is not None
            }
        write_index(Path(path), known)
        return Path(path)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterBank:
        # What it knows of files is the same for whoever asks; a copy of a model reads from the same bank.
        return self

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            gone = {"_lock", "_reading", "_held", "_held_bytes", "_versions", "_outlines"}
            kept = {key: value for key, value in self.__dict__.items() if key not in gone}
            return {**kept, "_entries": dict(self._entries), "_next": next(self._versions)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._versions = count(state.pop("_next"))
        self.__dict__.update(state)
        self._lock, self._reading, self._outlines = threading.RLock(), {}, {}
        self._held, self._held_bytes = OrderedDict(), 0

    def _open(self, sources: Mapping[str, str | Path | AdapterSource], *, skip_broken: bool) -> dict[str, str]:
        known = {} if self.folder is None else read_index(self.folder / INDEX_FILE)
        broken: dict[str, str] = {}
        for name, source in sources.items():
            try:
                self._entries[name] = self._indexed(name, source, known.get(name)) or self._outlined(name, source)
            except AdapterError as error:
                broken[name] = str(error)
        if broken and not skip_broken:
            first = list(broken)[:_SHOWN]
            more = f" {len(broken) - len(first)} more cannot: {list(broken)[_SHOWN:]}." if broken.keys() - first else ""
            raise AdapterError(
                f"{len(broken)} of {len(sources)} adapters cannot be used: {' '.join(broken[name] for name in first)}"
                f"{more} Mend them, or leave them out with `skip_broken=True`."
            )
        if not self._entries:
            if not broken:
                raise AdapterError("No adapters were given. Give at least one.")
            raise AdapterError(
                f"None of the {len(sources)} adapters can be used. {' '.join(broken.values())} Mend at least one."
            )
        return broken

    def _indexed(self, name: str, source: str | Path | AdapterSource, known: IndexEntry | None) -> BankEntry | None:
        """An adapter as the index has it, if it is there and its files are the same."""
        resolved = AdapterSource.parse(source)
        if known is None or not resolved.is_local:
            return None
        path = str(Path(resolved.path).expanduser().resolve())
        if known.source != path or known.signature != signature_of(Path(path)):
            return None
        return BankEntry(
            name,
            next(self._versions),
            AdapterSource(path),
            known.size_bytes,
            known.ranks,
            known.kind,
            known.digest,
            known.signature,
        )

    def _outlined(self, name: str, source: str | Path | AdapterSource) -> BankEntry:
        """An adapter as the headers of its files have it.

        Raises:
            AdapterError: if it cannot be read, or its files change meanwhile.
        """
        resolved = AdapterSource.parse(source)
        before = signature_of(Path(resolved.path).expanduser()) if resolved.is_local else None
        outline = outline_adapter(name, resolved)
        signature = signature_of(Path(outline.source.path)) if outline.source.is_local else None
        if signature != before:
            raise AdapterError(
                f"Adapter {name!r}: the files in {outline.source.path} were written while the bank read them. Take "
                "them in once they are whole."
            )
        kind = kind_of(outline)
        self._outlines.setdefault(kind, outline)
        return BankEntry(
            name, next(self._versions), outline.source, _size_bytes(outline), outline.ranks, kind, None, signature
        )

    def _outline_of(self, entry: BankEntry) -> Adapter:
        """What the headers of all adapters of an entry's kind say."""
        if entry.kind not in self._outlines:
            _check_unchanged(entry)
            self._outlines[entry.kind] = outline_adapter(entry.name, entry.source)
        return self._outlines[entry.kind]

    def _entry(self, name: str) -> BankEntry:
        if name not in self._entries:
            raise AdapterError(f"The bank has no adapter {name!r}. {did_you_mean(name, self._entries)}".strip())
        return self._entries[name]

    def _known(self, entry: BankEntry) -> BankEntry:
        """An entry as it is now, its digest with it."""
        return self._entries[entry.name] if self._is_present(entry) else entry

    def _is_present(self, entry: BankEntry) -> bool:
        present = self._entries.get(entry.name)
        return present is not None and present.version == entry.version

    def _remember(self, entry: BankEntry, adapter: Adapter) -> None:
        if not self._is_present(entry):
            return
        self._entries[entry.name] = replace(self._entries[entry.name], digest=adapter.digest)
        self._drop(entry.version)
        self._held[entry.version] = adapter
        self._held_bytes += _size_bytes(adapter)
        while len(self._held) > 1 and self._held_bytes > self.host_bytes:
            self._drop(next(iter(self._held)))

    def _drop(self, version: int) -> None:
        gone = self._held.pop(version, None)
        if gone is not None:
            self._held_bytes -= _size_bytes(gone)

    def _forget(self, entry: BankEntry) -> None:
        self._drop(entry.version)
        self._reading.pop(entry.version, None)


def all_adapters(adapters: Mapping[str, Any]) -> dict[str, Adapter]:
    """Adapters by name: those of a bank unread, others with their weights.

    Raises:
        AdapterError: if one cannot be read.
    """
    if isinstance(adapters, AdapterBank):
        return {adapter.name: adapter for adapter in adapters.stored()}
    return {name: load_adapter(name, source) for name, source in adapters.items()}


def _read(entry: BankEntry) -> Adapter:
    """The weights of an entry's adapter.

    Raises:
        AdapterError: if its files are others by now.
    """
    _check_unchanged(entry)
    # Tensors that are made in inference mode stay out of autograd for good, and the bank keeps these for whoever comes.
    with torch.inference_mode(False):
        adapter = _copied(load_adapter(entry.name, entry.source, digest=entry.digest))
    _check_unchanged(entry)
    return adapter


def _check_unchanged(entry: BankEntry) -> None:
    if entry.signature is not None and entry.signature != signature_of(Path(entry.source.path)):
        raise AdapterError(
            f"Adapter {entry.name!r}: the files in {entry.source.path} have changed since the bank read them. Take "
            f"them in with `replace({entry.name!r})`."
        )


def _copied(adapter: Adapter) -> Adapter:
    modules = {}
    for name, module in adapter.modules.items():
        copies: dict[str, Any] = {part: tensor.clone() for part, tensor in _tensors(module).items()}
        modules[name] = replace(module, **copies)
    return replace(adapter, modules=modules, copies={name: copy.clone() for name, copy in adapter.copies.items()})


def _tensors(module: LoraModule) -> dict[str, Tensor]:
    parts = {"lora_A": module.lora_A, "lora_B": module.lora_B, "bias": module.bias, "magnitude": module.magnitude}
    return {part: tensor for part, tensor in parts.items() if tensor is not None}


def _size_bytes(adapter: Adapter) -> int:
    tensors = [tensor for module in adapter.modules.values() for tensor in _tensors(module).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *adapter.copies.values()))

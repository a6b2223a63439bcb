"""A fusion on disk: the one way from its path to its method, its base and its adapters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from loraflow import __version__
from loraflow.adapters import Adapter, AdapterSource, BankEntry, load_adapter
from loraflow.bases import BaseOptions, BaseRecord
from loraflow.bases.precision import settled_dtype
from loraflow.errors import AdapterError, FusionError, LoraflowError, MethodError
from loraflow.methods import Method, make_method
from loraflow.saved.records import AdapterRecord, FusionConfig, resolve_source
from loraflow.saved.storage import Stamp, read_fusion

Source = str | Path | AdapterSource | Adapter | BankEntry
"""Where an adapter is, or the adapter itself."""

Permit = Callable[[str], str]
"""Gives the directory that is meant, and raises where it may not be read."""


@dataclass(frozen=True)
class SavedFusion:
    """A fusion as it was saved at one time; nothing in it is changed by a later save.

    Attributes:
        name: what messages call it.
        path: its directory or Hub id, as it was asked for.
        directory: where it is.
        config: its configuration.
        tensors: what its method has learned.
        stamp: which save it is.
    """

    name: str
    path: str
    directory: Path
    config: FusionConfig
    tensors: Mapping[str, Tensor] = field(repr=False)
    stamp: Stamp = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, revision: str | None = None, *, name: str | None = None) -> SavedFusion:
        """Read a fusion from a directory or the Hub, but not its adapters; messages call it by its path, or `name`."""
        directory = fetch_fusion(path, revision)
        return cls(name or str(path), str(path), directory, *read_fusion(directory))

    @property
    def adapter_names(self) -> list[str]:
        """Names of its adapters, in the order of the fusion weights."""
        return [record.name for record in self.config.adapters]

    @property
    def base(self) -> str:
        """Where its base is: a directory or a Hub id.

        Raises:
            FusionError: if that was not known when it was saved.
        """
        if not self.config.base.path:
            raise FusionError(
                f"The fusion {self.name!r} does not know where its base model is. Give it as `base`: `base=...`."
            )
        return resolve_source(self.config.base.path, self.directory)

    @property
    def method(self) -> Method:
        """Its method, with nothing learned.

        Raises:
            FusionError: if this version of the library cannot make it.
        """
        try:
            method = make_method(self.config.method.name, self.config.method.parameters)
            method.check(self.adapter_names)
        except MethodError as error:
            raise FusionError(
                f"The fusion {self.name} was saved by loraflow {self.config.loraflow_version} with a method that this "
                f"loraflow {__version__} cannot make: {error} Update loraflow, or install the method's package."
            ) from error
        return method

    @property
    def digest(self) -> str:
        """What tells its computations from any other fusion's (`fusion_digest`)."""
        adapters = [(record.name, record.digest) for record in self.config.adapters]
        return fusion_digest(self.config.base, adapters, self.method, self.config.weights_digest)

    @property
    def recorded_sources(self) -> dict[str, AdapterSource]:
        """Where its adapters were when it was saved, by name and in order."""
        return {
            record.name: AdapterSource(resolve_source(record.path, self.directory), record.revision)
            for record in self.config.adapters
        }

    def base_options(self, base: str | Path, options: BaseOptions | None = None) -> BaseOptions:
        """How a base is loaded: what the options leave open is as it was when the fusion was made.

        Args:
            base: where the base is; the recorded revision is that of the recorded place.
            options: those that are given.
        """
        options, record = options or BaseOptions(), self.config.base
        return dataclasses.replace(
            options,
            revision=options.revision or (record.revision if str(base) == record.path else None),
            dtype=settled_dtype(record.dtype, options) if options.dtype == "auto" else options.dtype,
            quantization=record.quantization if options.quantization is None else options.quantization,
        )

    def sources(self, moved: Mapping[str, Source] | None = None) -> dict[str, Source]:
        """Where its adapters are, by name and in order; some may be in other places now.

        Raises:
            FusionError: if one is named that it does not have.
        """
        unknown = sorted((moved or {}).keys() - set(self.adapter_names))
        if unknown:
            raise FusionError(f"The fusion {self.name} has no adapter {unknown[0]!r}; it has {self.adapter_names}.")
        return {**self.recorded_sources, **(moved or {})}

    def load(
        self,
        moved: Mapping[str, Source] | None = None,
        *,
        loaded: Iterable[Adapter] = (),
        permit: Permit = lambda path: path,
    ) -> tuple[SavedFusion, list[Adapter]]:
        """The fusion with its adapters in order, each compared with the digest that was recorded for it.

        A save removes the copies of adapters that only the older fusion had. Where that happens after this one was
        read, and before its adapters are, it is the later fusion that is given.

        Args:
            moved: other places of some of them, by name.
            loaded: adapters in memory; one with the digest of a recorded one is taken for it, not read again.
            permit: called with the recorded place of each that is read; gives the one that is meant, or raises.

        Raises:
            LoraflowError: if one cannot be read, or is another one.
        """
        at_hand = {adapter.digest: adapter for adapter in loaded}
        try:
            sources = self.sources(moved)
            return self, [
                self._load(record, at_hand.get(record.digest, sources[record.name]), permit)
                for record in self.config.adapters
            ]
        except LoraflowError:
            later = SavedFusion(self.name, self.path, self.directory, *read_fusion(self.directory))
            if later.stamp == self.stamp:
                raise
        return later.load(moved, loaded=at_hand.values(), permit=permit)

    def _load(self, record: AdapterRecord, source: Source, permit: Permit) -> Adapter:
        """The recorded adapter from a source.

        Raises:
            FusionError: if it cannot be read there, or is another one.
        """
        if isinstance(source, Adapter):
            adapter = source.called(record.name)
        else:
            source = source.source if isinstance(source, BankEntry) else source
            try:
                if isinstance(source, AdapterSource):
                    source = AdapterSource(permit(source.path), source.revision)
                adapter = load_adapter(record.name, source)
            except (AdapterError, OSError) as error:
                raise FusionError(
                    f"The adapter {record.name!r} of the fusion {self.name!r} cannot be read from where it was: "
                    f'{error} Say where it is now: `adapters={{"{record.name}": ...}}`.'
                ) from error
        if adapter.digest != record.digest:
            raise FusionError(
                f"Adapter {record.name!r} ({adapter.source.path}) is not the one that the fusion {self.name!r} was "
                f"made with: its weights or scaling have the digest {adapter.digest[:19]}..., not "
                f"{record.digest[:19]}... Restore it, or fit again."
            )
        return adapter


def fetch_fusion(path: str | Path, revision: str | None) -> Path:
    """The local directory of a fusion: itself, or a snapshot of a Hub repository.

    Raises:
        FusionError: if there is no such directory, and the Hub has no such repository or cannot be reached.
    """
    source = AdapterSource(str(path), revision)
    directory = Path(source.path).expanduser()
    if directory.is_dir():
        return directory
    if source.is_local:
        raise FusionError(
            f"There is no fusion at {source.path!r}. Give a directory written by `save_pretrained`, or a Hub id."
        )
    try:
        return Path(snapshot_download(source.path, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FusionError(f"The fusion {source.path!r} is no directory here, and the Hub gives: {error}") from error


def fusion_digest(base: BaseRecord, adapters: Iterable[tuple[str, str]], method: Method, weights_digest: str) -> str:
    """SHA-256 of what a fusion computes from token ids: all that decides it, and nothing else.

    That is the base, name and digest of each adapter in order, the method, and the digest of what it has learned. Not
    in it: where the base and the adapters are, the prompt format, the record of the training, the version.
    """
    facts = {
        "base": base.model_dump(exclude={"path", "revision"}),
        "adapters": list(adapters),
        "method": [method.name, method.parameters()],
        "learned": weights_digest,
    }
    return f"sha256:{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}"

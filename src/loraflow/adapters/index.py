"""The index of a bank on disk: what its adapters' headers said, and what tells that they are the same files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from loraflow.adapters.base import CONFIG_FILE, WEIGHTS_FILE
from loraflow.files import write_atomically

log = logging.getLogger("loraflow.adapters")

INDEX_FILE = "loraflow_bank.json"
_VERSION = 2


class FileState(NamedTuple):
    """What changes when a file does."""

    size_bytes: int
    modified_ns: int
    inode: int


Signature = tuple[FileState, FileState]
"""The states of an adapter's configuration and of its weights."""


class IndexEntry(BaseModel):
    """What an index has of one adapter."""

    model_config = ConfigDict(extra="forbid")

    source: str
    signature: Signature
    size_bytes: int
    ranks: tuple[int, ...]
    kind: str
    digest: str | None


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: int
    adapters: dict[str, IndexEntry]


def signature_of(directory: Path) -> Signature | None:
    """The signature of the adapter in a directory; None where a file is missing."""
    try:
        return _state(directory / CONFIG_FILE), _state(directory / WEIGHTS_FILE)
    except OSError:
        return None


def read_index(path: Path) -> dict[str, IndexEntry]:
    """What an index says; nothing where there is none that can be read: it is only what the files say anyway."""
    try:
        index = _Index.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        if path.exists():
            log.info("%s is not used: %s", path, error)
        return {}
    return index.adapters if index.format_version == _VERSION else {}


def write_index(path: Path, adapters: Mapping[str, IndexEntry]) -> None:
    """Write an index, whole or not at all."""
    index = _Index(format_version=_VERSION, adapters=dict(adapters))
    write_atomically(path, index.model_dump_json().encode())


def _state(path: Path) -> FileState:
    stat = path.stat()
    return FileState(stat.st_size, stat.st_mtime_ns, stat.st_ino)

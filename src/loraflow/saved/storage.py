"""A fusion's files, which every moment, and every crash, finds whole: those of one save, the old or the new."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from loraflow.adapters import CONFIG_FILE as ADAPTER_CONFIG_FILE
from loraflow.adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE
from loraflow.adapters import Adapter, AdapterSource, load_adapter, tensors_digest
from loraflow.errors import AdapterError, FusionError
from loraflow.files import make_folder, staged, write_atomically
from loraflow.saved.records import (
    ADAPTERS_FOLDER,
    CARD_FILE,
    CONFIG_FILE,
    METADATA_KEY,
    WEIGHTS_FILE,
    FusionConfig,
    parse_config,
    resolve_source,
)

_HEADER_LENGTH = 8

Stamp = tuple[int, ...]
"""Tells the files of a fusion from those of any later save."""


def read_fusion(directory: Path) -> tuple[FusionConfig, dict[str, Tensor], Stamp]:
    """Read a fusion's configuration and learned tensors, and which save they are of.

    Raises:
        FusionError: if files are missing, damaged, or of a newer format.
    """
    path = directory / WEIGHTS_FILE
    try:
        # At once, from one file: safetensors opens a path twice, and another file may have taken its place in between.
        with path.open("rb") as file:
            content, stamp = file.read(), _stamp(file.fileno())
        tensors = load(content)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise FusionError(f"{directory} has no {WEIGHTS_FILE}. Is it a saved fusion?") from error
    except (SafetensorError, OSError) as error:
        raise FusionError(f"{path} is not a readable safetensors file ({error}). Save the fusion again.") from error
    digest = tensors_digest(tensors)
    beside, config_stamp = _read_config(directory / CONFIG_FILE)
    for origin, text in ((str(directory / CONFIG_FILE), beside), (f"{path} (metadata)", _metadata(content))):
        config = None if text is None else parse_config(origin, text)
        if config is not None and config.weights_digest == digest:
            return config, tensors, stamp + config_stamp
    raise FusionError(
        f"{path} is not what {CONFIG_FILE} beside it describes (its digest differs). Restore both files, "
        "or save the fusion again."
    )


def _stamp(descriptor: int) -> Stamp:
    status = os.fstat(descriptor)
    return status.st_ino, status.st_mtime_ns


def _read_config(path: Path) -> tuple[str | None, Stamp]:
    """The configuration beside the weights; None where it is lost.

    Raises:
        FusionError: if it is no text.
    """
    try:
        with path.open("rb") as file:
            return file.read().decode(), _stamp(file.fileno())
    except FileNotFoundError:
        return None, ()
    except (OSError, UnicodeDecodeError) as error:
        raise FusionError(f"{path} is not valid JSON ({error}). Restore it, or save the fusion again.") from error


def _metadata(content: bytes) -> str | None:
    """The configuration in the weights file, whose header is JSON behind its length; None where it has none."""
    length = int.from_bytes(content[:_HEADER_LENGTH], "little")
    header = json.loads(content[_HEADER_LENGTH : _HEADER_LENGTH + length])
    found: str | None = header.get("__metadata__", {}).get(METADATA_KEY)
    return found


def write_fusion(directory: Path, config: FusionConfig, tensors: Mapping[str, Tensor], card: str) -> None:
    """Write a fusion over an older one, whose copies of adapters go when it is replaced.

    The weights file carries the configuration too. It is replaced first, in one step; a configuration file that does
    not match it is then known to be of an older save.
    """
    old_copies = _recorded_copies(directory)
    text = config.model_dump_json(indent=2) + "\n"
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(directory / WEIGHTS_FILE, save(values, metadata={"format": "pt", METADATA_KEY: text}))
    write_atomically(directory / CONFIG_FILE, text.encode())
    write_atomically(directory / CARD_FILE, card.encode())
    for copy in old_copies - _recorded_copies(directory):
        shutil.rmtree(copy, ignore_errors=True)


def copy_adapters(adapters: Sequence[Adapter], directory: Path) -> list[Path]:
    """Copy local adapters' two files each into a fusion's directory: all of them, or none.

    A copy's folder is named by the adapter's digest, so that an older fusion there keeps its own till it is replaced.

    Returns:
        The copies' folders.

    Raises:
        FusionError: if an adapter cannot be read any more, or is not the one in memory.
    """
    targets, copies = [], []
    with contextlib.ExitStack() as stack:
        for adapter in adapters:
            original = Path(adapter.source.path)
            target = directory / ADAPTERS_FOLDER / f"{adapter.name}-{adapter.digest.removeprefix('sha256:')[:8]}"
            targets.append(target)
            # What a fusion was loaded from may be what it is saved to.
            place = original
            if not (target.is_dir() and original.is_dir() and target.samefile(original)):
                place = stack.enter_context(staged(target, folder=True))
                _copy(adapter, place)
                copies.append((place, target))
            _check_same(adapter, place)
        for place, target in copies:
            make_folder(target)
            for name in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE):
                os.replace(place / name, target / name)
    return [target.resolve() for target in targets]


def _copy(adapter: Adapter, place: Path) -> None:
    """Copy an adapter's two files.

    Raises:
        FusionError: if they cannot be read.
    """
    for name in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE):
        original = Path(adapter.source.path) / name
        try:
            content = original.read_bytes()
        except OSError as error:
            raise FusionError(
                f"The adapter {adapter.name!r} cannot be copied into the fusion: {original} cannot be read any "
                f"more ({error.strerror}). Put it back, or leave its copy out."
            ) from error
        write_atomically(place / name, content)


def _check_same(adapter: Adapter, place: Path) -> None:
    """Check that the files in a place are the adapter in memory.

    Raises:
        FusionError: if they are not, and a fusion with them could never be loaded.
    """
    why = "its digest differs"
    try:
        digest = load_adapter(adapter.name, AdapterSource(str(place.resolve()))).digest
    except AdapterError:
        digest, why = "", "it is no whole adapter now"
    if digest != adapter.digest:
        raise FusionError(
            f"The adapter {adapter.name!r} cannot be copied into the fusion: {adapter.source.path} has changed since "
            f"it was loaded ({why}). Fuse again with the adapter as it is now, or bring back the old file."
        )


def _recorded_copies(directory: Path) -> set[Path]:
    """The copies of adapters that a fusion in a directory made there itself; nothing else there is its own."""
    try:
        config, _, _ = read_fusion(directory)
    except FusionError:
        return set()
    folder = (directory / ADAPTERS_FOLDER).resolve()
    paths = {Path(resolve_source(record.path, directory)) for record in config.adapters}
    return {path for path in paths if path.parent == folder and re.search(r"-[0-9a-f]{8}$", path.name)}

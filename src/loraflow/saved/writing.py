"""Writing a fusion's files so that every moment, and every crash, finds a whole one there: the old, or the new."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from loraflow.adapters import CONFIG_FILE as ADAPTER_CONFIG_FILE
from loraflow.adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE
from loraflow.adapters import Adapter
from loraflow.errors import FusionError
from loraflow.files import write_atomically
from loraflow.saved.reading import read_fusion
from loraflow.saved.records import ADAPTERS_FOLDER, CARD_FILE, CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE, FusionConfig
from loraflow.saved.sources import resolve_source


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


def copy_adapter(adapter: Adapter, directory: Path) -> Path:
    """Copy a local adapter's two files into a fusion's directory.

    The copy's folder is named by the adapter's digest, so that an older fusion there keeps its own till it is replaced.

    Raises:
        FusionError: if the adapter cannot be read any more.
    """
    target = directory / ADAPTERS_FOLDER / f"{adapter.name}-{adapter.digest.removeprefix('sha256:')[:8]}"
    for name in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE):
        original = Path(adapter.source.path) / name
        if not (target / name).exists() or not (target / name).samefile(original):
            try:
                content = original.read_bytes()
            except OSError as error:
                raise FusionError(
                    f"The adapter {adapter.name!r} cannot be copied into the fusion: {original} cannot be read any "
                    f"more ({error.strerror}). Put it back, or leave its copy out."
                ) from error
            write_atomically(target / name, content)
    return target.resolve()


def _recorded_copies(directory: Path) -> set[Path]:
    """The copies of adapters that a fusion in a directory made there itself; nothing else there is its own."""
    try:
        config, _, _ = read_fusion(directory)
    except FusionError:
        return set()
    folder = (directory / ADAPTERS_FOLDER).resolve()
    paths = {Path(resolve_source(record.path, directory)) for record in config.adapters}
    return {path for path in paths if path.parent == folder and re.search(r"-[0-9a-f]{8}$", path.name)}

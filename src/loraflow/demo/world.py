"""Where the shipped base model and adapters of the small world lie, and those of the many world."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

from loraflow.files import staged

BASE_NAME = "loraflow/small-world"
"""What the adapters call their base model; no such repository is needed, `base_path()` is the model."""

ADAPTERS: tuple[str, ...] = ("zh-chat", "es-chat", "ru-chat", "math", "code")

_DATA = Path(__file__).parent / "data"


def base_path() -> Path:
    """The folder of the base model and its tokenizer, for `from_pretrained`."""
    return _DATA / "base"


def adapter_paths() -> dict[str, Path]:
    """The folder of each of the five PEFT adapters, by name."""
    return {name: _DATA / "adapters" / name for name in ADAPTERS}


def many_adapter_paths() -> dict[str, Path]:
    """The folder of each of the 48 PEFT adapters of the many world, by name.

    They come as one file, which is unpacked where this is first called: into `loraflow/many-world-DIGEST` of the user's
    cache (`XDG_CACHE_HOME`, by default `~/.cache`). The folder is also one for `AdapterBank` and `--adapters`.

    Raises:
        StorageError: if nothing can be written there.
    """
    packed = _DATA / "many.zip"
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "loraflow" / f"many-world-{digest}"
    with zipfile.ZipFile(packed) as file:
        if not folder.is_dir():
            with staged(folder, folder=True) as temporary:
                file.extractall(temporary)
                _move(temporary, folder)
        names = dict.fromkeys(name.partition("/")[0] for name in file.namelist())
    return {name: folder / name for name in names}


def _move(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        # Another process was faster; what it wrote is the same.
        if not folder.is_dir():
            raise

"""Where a fusion is, and how it records where its base and its adapters are."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from loraflow.adapters import AdapterSource
from loraflow.errors import FusionError


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


def relative_source(path: str, directory: Path) -> str:
    """A path as a fusion records it: Hub ids as they are, directories as `./...` or `../...` from the fusion's own."""
    if not Path(path).is_absolute():
        return path
    relative = Path(os.path.relpath(path, directory.resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def resolve_source(path: str, directory: Path) -> str:
    """The other way: a recorded path as it can be opened from here."""
    return str((directory / path).resolve()) if path.startswith(".") else path

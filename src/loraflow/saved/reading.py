"""Reading a fusion's files: those of one save, whatever is saved over them meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from loraflow.errors import FusionError
from loraflow.saved.digests import tensors_digest
from loraflow.saved.records import CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE, FusionConfig, parse_config

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

"""What `fusion_config.json` holds, and how; the names of the files of a fusion."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraflow.bases import AddedTokens, BaseRecord
from loraflow.endings import Endings
from loraflow.errors import FusionError
from loraflow.prompts import PromptFormat

CONFIG_FILE = "fusion_config.json"
WEIGHTS_FILE = "fusion.safetensors"
CARD_FILE = "README.md"
ADAPTERS_FOLDER = "adapters"
# The configuration's key in the metadata of the weights file.
METADATA_KEY = "fusion_config"
FORMAT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AdapterRecord(_Record):
    """One adapter of a fusion."""

    name: str
    path: str
    revision: str | None = None
    digest: str


class MethodRecord(_Record):
    """A method by name, with its parameters."""

    name: str
    parameters: dict[str, Any] = {}


class FusionConfig(_Record):
    """Everything that a fusion is, less its learned values. The order of `adapters` is that of the fusion weights.

    Fusions of earlier versions have no `endings`; theirs are found as those of a new one are.
    """

    format_version: int = FORMAT_VERSION
    loraflow_version: str
    base: BaseRecord
    adapters: list[AdapterRecord] = Field(min_length=1)
    method: MethodRecord
    prompt: PromptFormat = PromptFormat()
    endings: Endings | None = None
    added_tokens: AddedTokens = {}
    training: dict[str, Any] | None = None
    weights_digest: str


def parse_config(origin: str, text: str) -> FusionConfig:
    """A configuration from its JSON, which was found at `origin`.

    Raises:
        FusionError: if it is damaged, or of another format.
    """
    try:
        version = json.loads(text).get("format_version")
        if version != FORMAT_VERSION:
            raise FusionError(
                f"{origin} has format_version {version}; this loraflow reads {FORMAT_VERSION}. "
                "Install a matching version."
            )
        return FusionConfig.model_validate_json(text)
    except (json.JSONDecodeError, AttributeError) as error:
        raise FusionError(f"{origin} is not valid JSON ({error}). Restore it, or save the fusion again.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise FusionError(f"{origin}: `{key}`: {first['msg']}. Restore it, or save the fusion again.") from error


def relative_source(path: str, directory: Path) -> str:
    """A path as a fusion records it: Hub ids as they are, directories as `./...` or `../...` from the fusion's own."""
    if not Path(path).is_absolute():
        return path
    relative = Path(os.path.relpath(path, directory.resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def resolve_source(path: str, directory: Path) -> str:
    """The other way: a recorded path as it can be opened from here."""
    return str((directory / path).resolve()) if path.startswith(".") else path

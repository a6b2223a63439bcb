"""A fusion on disk: `fusion_config.json`, `fusion.safetensors` (only what was learned), and a model card."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraflow.adapters import CONFIG_FILE as ADAPTER_CONFIG_FILE
from loraflow.adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE
from loraflow.adapters import Adapter, AdapterSource
from loraflow.errors import FusionError
from loraflow.files import write_atomically
from loraflow.prompts import PromptFormat

CONFIG_FILE = "fusion_config.json"
WEIGHTS_FILE = "fusion.safetensors"
CARD_FILE = "README.md"
ADAPTERS_FOLDER = "adapters"
FORMAT_VERSION = 1

_SAMPLES = 64


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BaseRecord(_Record):
    """The base model of a fusion: where it is, and what tells it from others."""

    path: str
    revision: str | None = None
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    dtype: str
    quantization: str | None = None
    digest: str | None = None


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
    """Everything that a fusion is, less its learned values. The order of `adapters` is that of the fusion weights."""

    format_version: int = FORMAT_VERSION
    loraflow_version: str
    base: BaseRecord
    adapters: list[AdapterRecord]
    method: MethodRecord
    prompt: PromptFormat = PromptFormat()
    training: dict[str, Any] | None = None
    weights_digest: str


def base_record(model: PreTrainedModel) -> BaseRecord:
    """Describe a base model, before anything is attached to it, so that another one is recognised later."""
    config = model.config.get_text_config(decoder=True)
    return BaseRecord(
        path=_absolute(str(getattr(model.config, "_name_or_path", "") or "")),
        revision=getattr(model.config, "_commit_hash", None),
        model_type=model.config.model_type,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=_quantization(model),
        digest=_base_digest(model),
    )


def _absolute(path: str) -> str:
    # A later change of the working directory must not change what a path means; Hub ids stay as they are.
    local = Path(path).expanduser()
    return str(local.resolve()) if path and local.is_dir() else path


def _quantization(model: PreTrainedModel) -> str | None:
    """How bitsandbytes quantised the model as it was loaded; models of other quantisers carry that in their files."""
    config = getattr(model.config, "quantization_config", None)
    for flag, name in (("load_in_4bit", "bnb-4bit"), ("load_in_8bit", "bnb-8bit")):
        if config is not None and (config.get(flag) if isinstance(config, dict) else getattr(config, flag, False)):
            return name
    return None


def _base_digest(model: nn.Module) -> str | None:
    """SHA-256 of a few values of every parameter; None where they are quantised or offloaded: those do not compare."""
    if getattr(model, "is_quantized", False) or any(p.is_meta for p in model.parameters()):
        return None
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        # Long tensors are sampled with a stride: gates do not need every one of seven billion values checked.
        digest.update(name.encode() + values[:: max(1, values.numel() // _SAMPLES)].float().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def check_base(expected: BaseRecord, found: BaseRecord) -> None:
    """Check that a model is the base that a fusion was made with.

    Raises:
        FusionError: if its shape differs, or (in the same precision, unquantised) its weights do.
    """
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        ours, theirs = getattr(found, key), getattr(expected, key)
        if ours != theirs:
            raise FusionError(
                f"Wrong base model: the fusion was made with {expected.path!r} ({key}={theirs}), but {found.path!r} "
                f"has {key}={ours}. Give the base that it was made with."
            )
    comparable = found.dtype == expected.dtype and found.digest is not None and expected.digest is not None
    if comparable and found.digest != expected.digest:
        raise FusionError(
            f"Wrong base model: {found.path!r} has the shape of {expected.path!r}, but other weights. "
            "Give the base that the fusion was made with."
        )


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, independent of their order and of any file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def write_fusion(directory: Path, config: FusionConfig, tensors: Mapping[str, Tensor], card: str) -> None:
    """Write a fusion so that a crash at any point leaves a whole one: the old, or the new.

    The weights file carries the configuration too. It is replaced first, in one step; a configuration file that does
    not match it is then known to be of an older save.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = config.model_dump_json(indent=2) + "\n"
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(directory / WEIGHTS_FILE, save(values, metadata={"format": "pt", "fusion_config": text}))
    write_atomically(directory / CONFIG_FILE, text.encode())
    write_atomically(directory / CARD_FILE, card.encode())


def read_fusion(directory: Path) -> tuple[FusionConfig, dict[str, Tensor]]:
    """Read a fusion's configuration and learned tensors.

    Raises:
        FusionError: if files are missing, damaged, or of a newer format.
    """
    weights_path = directory / WEIGHTS_FILE
    if not weights_path.is_file():
        raise FusionError(f"{directory} has no {WEIGHTS_FILE}. Is it a saved fusion?")
    try:
        with safe_open(weights_path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise FusionError(
            f"{weights_path} is not a readable safetensors file ({error}). Save the fusion again."
        ) from error
    digest = tensors_digest(tensors)
    for origin, text in _config_texts(directory, metadata):
        config = _parse_config(origin, text)
        if config.weights_digest == digest:
            return config, tensors
    raise FusionError(
        f"{weights_path} is not what {CONFIG_FILE} beside it describes (its digest differs). Restore both files, "
        "or save the fusion again."
    )


def _config_texts(directory: Path, metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    texts = []
    path = directory / CONFIG_FILE
    if path.is_file():
        try:
            texts.append((str(path), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError as error:
            raise FusionError(f"{path} is not valid JSON ({error}). Restore it, or save the fusion again.") from error
    if "fusion_config" in metadata:
        texts.append((f"{directory / WEIGHTS_FILE} (metadata)", metadata["fusion_config"]))
    return texts


def _parse_config(origin: str, text: str) -> FusionConfig:
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


def copy_adapter(adapter: Adapter, directory: Path) -> Path:
    """Copy a local adapter's two files into a fusion's directory.

    The copy's folder is named by the adapter's digest, so that an older fusion there keeps its own till it is replaced.
    """
    target = directory / ADAPTERS_FOLDER / f"{adapter.name}-{adapter.digest.removeprefix('sha256:')[:8]}"
    target.mkdir(parents=True, exist_ok=True)
    for name in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE):
        original = Path(adapter.source.path) / name
        if not (target / name).exists() or not (target / name).samefile(original):
            write_atomically(target / name, original.read_bytes())
    return target.resolve()


def recorded_copies(directory: Path) -> set[Path]:
    """The copies of adapters that a fusion in a directory made there itself; nothing else there is its own."""
    try:
        config, _ = read_fusion(directory)
    except FusionError:
        return set()
    folder = (directory / ADAPTERS_FOLDER).resolve()
    paths = {Path(resolve_source(record.path, directory)) for record in config.adapters}
    return {path for path in paths if path.parent == folder and re.search(r"-[0-9a-f]{8}$", path.name)}

"""The base model of a fusion: what tells it from others, of a model that is loaded and of files that are not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraflow.bases.sharded import whole
from loraflow.errors import FusionError

# Long tensors are sampled with a stride: gates do not need every one of seven billion values checked.
_SAMPLES = 64
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class BaseRecord(BaseModel):
    """The base model of a fusion: where it is, and what tells it from others."""

    model_config = ConfigDict(extra="forbid")

    path: str
    revision: str | None = None
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    dtype: str
    quantization: str | None = None
    digest: str | None = None


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
        digest=_model_digest(model),
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
    if found.dtype == expected.dtype:
        _check_digest(expected, found.path, found.digest)


def check_base_files(expected: BaseRecord, base: str, empty: nn.Module) -> None:
    """Check the weights in a local directory, where they can be compared.

    They cannot where the base is on the Hub or was quantised, or where its files name parameters otherwise than
    transformers' model does.
    """
    if expected.digest is not None and Path(base).is_dir():
        _check_digest(expected, base, files_digest(Path(base), empty, getattr(torch, expected.dtype)))


def _check_digest(expected: BaseRecord, path: str, digest: str | None) -> None:
    """Compare two digests, where there are two.

    Raises:
        FusionError: if they differ.
    """
    if None not in (digest, expected.digest) and digest != expected.digest:
        raise FusionError(
            f"Wrong base model: {path!r} has the shape of {expected.path!r}, but other weights. "
            "Give the base that the fusion was made with."
        )


def _model_digest(model: nn.Module) -> str | None:
    """SHA-256 of a few values of every parameter; None where they are quantised or offloaded: those do not compare."""
    parameters = dict(model.named_parameters())
    if getattr(model, "is_quantized", False) or any(p.is_meta for p in parameters.values()):
        return None
    return _digest(parameters, lambda name: whole(parameters[name].detach()))


def files_digest(directory: Path, empty: nn.Module, dtype: torch.dtype) -> str | None:
    """The digest that `base_record` gives the loaded model, read from its files; None where names differ."""
    files = _files(directory)
    names = [name for name, _ in empty.named_parameters()]
    if any(name not in files for name in names):
        return None
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in {files[name] for name in names}}
        return _digest(names, lambda name: opened[files[name]].get_tensor(name), dtype)


def _digest(names: Iterable[str], tensor_of: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        values = tensor_of(name).flatten()
        sample = values[:: max(1, values.numel() // _SAMPLES)].to(dtype or values.dtype)
        digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _files(directory: Path) -> dict[str, Path]:
    """The file of each parameter."""
    index, single = directory / _INDEX, directory / _SINGLE
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in places.items()}
    if not single.is_file():
        return {}
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)

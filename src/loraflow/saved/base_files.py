"""Whether the files of a base are those of the base that a fusion was made with; no weights are loaded for it."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from loraflow.errors import FusionError
from loraflow.saved.storage import _SAMPLES, BaseRecord

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def check_base_files(record: BaseRecord, base: str, empty: nn.Module) -> None:
    """Check the weights in a local directory, where they can be compared.

    They cannot where the base is on the Hub or was quantised, or where its files name parameters otherwise than
    transformers' model does.

    Args:
        record: what the fusion knows of its base.
        base: where the base is.
        empty: the base without its weights.

    Raises:
        FusionError: if they are others than those that the fusion was made with.
    """
    if record.digest is None or not Path(base).is_dir():
        return
    found = files_digest(Path(base), empty, getattr(torch, record.dtype))
    if found not in (None, record.digest):
        raise FusionError(
            f"Wrong base model: {base!r} has the shape of {record.path!r}, but other weights. Give the base that the "
            "fusion was made with."
        )


def files_digest(directory: Path, empty: nn.Module, dtype: torch.dtype) -> str | None:
    """The digest that `storage.base_record` gives the loaded model, read from its files; None where names differ."""
    files = _files(directory)
    names = sorted(name for name, _ in empty.named_parameters())
    if any(name not in files for name in names):
        return None
    digest = hashlib.sha256()
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in set(files.values())}
        for name in names:
            digest.update(name.encode() + _sample(opened[files[name]].get_tensor(name), dtype))
    return f"sha256:{digest.hexdigest()}"


def _sample(tensor: Tensor, dtype: torch.dtype) -> bytes:
    values = tensor.flatten()
    return values[:: max(1, values.numel() // _SAMPLES)].to(dtype).float().numpy().tobytes()


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

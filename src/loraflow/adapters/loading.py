"""One adapter from its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loraflow.adapters.base import Adapter, AdapterSource, tensors_digest
from loraflow.adapters.config import MATHS, read_config
from loraflow.adapters.files import locate_config, locate_weights, read_header, read_tensors
from loraflow.adapters.keys import read_modules

if TYPE_CHECKING:  # PEFT is imported where it is used: it imports bitsandbytes, which takes a second and may print.
    from peft import LoraConfig


def load_adapter(name: str, source: str | Path | AdapterSource, *, digest: str | None = None) -> Adapter:
    """Read one adapter from PEFT's files, and refuse what could not be fused exactly on any base.

    Args:
        name: the name it gets in the fusion.
        source: a directory, `user/repo`, `user/repo/subfolder`, each Hub id optionally `@revision`.
        digest: its digest, where these very files were read before; their values are not looked at then, and come from
            the disk as they are used.

    Returns:
        The adapter, its tensors on the CPU in the precision of the file.

    Raises:
        AdapterError: if files are missing, are pickles, or hold what cannot be fused exactly.
    """
    config, resolved = _config(name, source)
    path = locate_weights(name, resolved)
    tensors = read_tensors(name, path)
    modules, copies = read_modules(name, path, config, tensors, values=digest is None)
    if digest is None:
        digest = tensors_digest(tensors, json.dumps({key: getattr(config, key) for key in MATHS}, sort_keys=True))
    return Adapter(name, resolved, config, modules, digest, copies)


def outline_adapter(name: str, source: str | Path | AdapterSource) -> Adapter:
    """Read what the headers of an adapter's files say, and refuse what could not be fused, whatever its values are.

    Args:
        name: the name it gets.
        source: as for `load_adapter`.

    Returns:
        The adapter with its tensors on the meta device, and no digest.

    Raises:
        AdapterError: as by `load_adapter`, but for what only values tell: NaN, or an adapter that was never trained.
    """
    config, resolved = _config(name, source)
    modules, copies = read_modules(name, resolved.path, config, read_header(name, resolved), values=False)
    return Adapter(name, resolved, config, modules, "", copies)


def kind_of(outline: Adapter) -> str:
    """SHA-256 of all that the headers of an adapter's files say: two of a kind differ in their values alone."""
    parts: dict[str, list[Any]] = {name: [_shape(copy)] for name, copy in outline.copies.items()}
    for name, module in outline.modules.items():
        tensors = (module.lora_A, module.lora_B, module.bias, module.magnitude)
        parts[name] = [None if tensor is None else _shape(tensor) for tensor in tensors]
    said = json.dumps([outline.config.to_dict(), parts], sort_keys=True, default=_plain)
    return f"sha256:{hashlib.sha256(said.encode()).hexdigest()}"


def _shape(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype), *tensor.shape]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else repr(value)


def _config(name: str, source: str | Path | AdapterSource) -> tuple[LoraConfig, AdapterSource]:
    # Before the weights: it tells what an adapter of another library is, which has no weights of PEFT's.
    path, resolved = locate_config(name, AdapterSource.parse(source))
    return read_config(name, path), resolved

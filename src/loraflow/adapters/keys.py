"""The keys of a weights file: which module and part each is, and whether the parts of a module fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraflow.adapters.base import CONFIG_FILE, LoraModule
from loraflow.errors import AdapterError

if TYPE_CHECKING:  # PEFT is imported where it is used: it imports bitsandbytes, which takes a second and may print.
    from peft import LoraConfig

KEY_PREFIX = "base_model.model."
_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?)$"
)


def read_modules(name: str, path: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, LoraModule]:
    """The updates that a file's tensors are, by module name.

    Raises:
        AdapterError: if a key is no LoRA weight, a module is incomplete or other than its configuration says, a value
            is not finite, or nothing would change.
    """
    parts = _by_module(name, path, tensors)
    modules = {module: _module(name, path, config, module, found) for module, found in parts.items()}
    if not modules:
        raise AdapterError(f"Adapter {name!r}: {path} holds no LoRA weights. Save the adapter again.")
    if all(not m.lora_B.any() and m.bias is None and m.magnitude is None for m in modules.values()):
        raise AdapterError(
            f"Adapter {name!r} changes nothing: every `lora_B.weight` in {path} is zero, as before any training. "
            "Train it, or leave it out."
        )
    return modules


def _by_module(name: str, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key.removeprefix(KEY_PREFIX))
        if match is None:
            raise AdapterError(
                f"Adapter {name!r}: key '{key}' in {path} is not a LoRA weight of a linear module (embedding LoRA and "
                "saved base weights cannot be fused). Retrain it on linear modules only."
            )
        parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = tensor
    return parts


def _module(name: str, path: Path, config: LoraConfig, module: str, found: Mapping[str, Tensor]) -> LoraModule:
    needed = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if config.use_dora else [])]
    needed += ["lora_B.bias"] if config.lora_bias else []
    for part in needed:
        if part not in found:
            raise AdapterError(f"Adapter {name!r}: {path} lacks '{KEY_PREFIX}{module}.{part}'. Save the adapter again.")
    for part in found:
        if part not in needed:
            raise AdapterError(
                f"Adapter {name!r}: '{KEY_PREFIX}{module}.{part}' in {path} is not what {CONFIG_FILE} describes "
                f"(use_dora={config.use_dora}, lora_bias={config.lora_bias}). Save the adapter again."
            )
    lora_A, lora_B = found["lora_A"], found["lora_B"]
    rank = _by_pattern(config.rank_pattern, module, config.r)
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != rank or lora_B.shape[1] != rank:
        raise AdapterError(
            f"Adapter {name!r}: '{module}' has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} in "
            f"{path}, but {CONFIG_FILE} says rank {rank}. Save the adapter again."
        )
    for part, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"Adapter {name!r}: '{module}.{part}' in {path} holds NaN or infinite values. Train it again."
            )
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    return LoraModule(lora_A, lora_B, scaling, found.get("lora_B.bias"), found.get("lora_magnitude_vector"))


def _by_pattern(pattern: Mapping[str, int] | None, module: str, default: int) -> int:
    """A setting of one module: that of the first pattern that fits its name, else the whole adapter's."""
    from peft.utils.other import get_pattern_key

    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module), default)

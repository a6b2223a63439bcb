"""The names of a file's tensors: which module and part each is of, and whether the parts of a module fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraflow.adapters.base import CONFIG_FILE, LoraModule
from loraflow.adapters.foreign import kind_of_key
from loraflow.errors import AdapterError

if TYPE_CHECKING:  # PEFT is imported where it is used: it imports bitsandbytes, which takes a second and may print.
    from peft import LoraConfig

KEY_PREFIX = "base_model.model."

# PEFT's state dict has the adapter's name inside; `save_pretrained` leaves it out, other ways of saving do not.
_LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|lora_embedding_[AB])"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
# What PEFT wraps modules in: inside it, their parameters have longer names.
_WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.[^.]+)?|base_layer)(?=\.[^.]+$)")
_PARTS = {
    ("lora_A", "weight"): "lora_A",
    ("lora_B", "weight"): "lora_B",
    ("lora_B", "bias"): "lora_B.bias",
    ("lora_magnitude_vector", None): "lora_magnitude_vector",
    ("lora_magnitude_vector", "weight"): "lora_magnitude_vector",
}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# A module of which several parameters are adapted is wrapped for each, and these are the inner ones.
WRAPPED = ".base_layer"
_PART_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


@dataclass
class _Sorted:
    """Keys by what they are of: parts of modules, and parameters of the base."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)


def read_modules(
    name: str, where: str | Path, config: LoraConfig, tensors: Mapping[str, Tensor], *, values: bool = True
) -> tuple[dict[str, LoraModule], dict[str, Tensor]]:
    """The updates that a file's tensors are, by module name, and its copies of the base's parameters, by theirs.

    Args:
        name: the adapter's.
        where: the file, for messages.
        config: PEFT's configuration of it.
        tensors: by the file's keys; on the meta device where only its header was read.
        values: whether to look at values too, which reads all of the file.

    Raises:
        AdapterError: if a key is neither, two are the same, a module is incomplete or other than its configuration
            says, a value is no finite floating-point number, or nothing would change.
    """
    keys = _sort(name, where, tensors)
    modules = {}
    for module, parts in keys.parts.items():
        found = {part: _part(name, where, module, part, tensors[key]) for part, key in parts.items()}
        if values:
            _check_finite(name, where, module, found)
        modules[module] = _module(name, where, config, module, found)
    if not modules:
        raise AdapterError(f"Adapter {name!r}: {where} holds no LoRA weights. Save the adapter again.")
    if values and all(not m.lora_B.any() and m.bias is None and m.magnitude is None for m in modules.values()):
        raise AdapterError(
            f"Adapter {name!r} changes nothing: every `lora_B.weight` in {where} is zero, as before any training. "
            "Train it, or leave it out."
        )
    for parameter, key in keys.copies.items():
        _check_floats(f"Adapter {name!r}: '{parameter}' in {where}", tensors[key])
    return modules, {parameter: tensors[key] for parameter, key in keys.copies.items()}


def write_keys(modules: Mapping[str, LoraModule]) -> dict[str, Tensor]:
    """The tensors of updates by the keys that PEFT gives them."""
    return {
        f"{KEY_PREFIX}{name}.{_PART_KEYS.get(part, part)}": tensor
        for name, module in modules.items()
        for part, tensor in (
            ("lora_A", module.lora_A),
            ("lora_B", module.lora_B),
            ("lora_B.bias", module.bias),
            ("lora_magnitude_vector", module.magnitude),
        )
        if tensor is not None
    }


def _sort(name: str, where: str | Path, tensors: Mapping[str, Tensor]) -> _Sorted:
    found = _Sorted()
    adapters: dict[str, str] = {}
    for key in tensors:
        bare = key.removeprefix(KEY_PREFIX)
        match = _LORA_KEY.fullmatch(bare)
        part = _PARTS.get((match["part"], match["leaf"])) if match else None
        if match is not None and part is not None:
            place, what = found.parts.setdefault(match["module"], {}), part
            adapters.setdefault(match["adapter"] or "", key)
        elif match is None and "lora" not in bare and bare.endswith((".weight", ".bias")) and not kind_of_key(bare):
            place, what = found.copies, _WRAPPED.sub("", bare)
        else:
            raise _no_lora_weight(name, where, key, match)
        if what in place:
            raise AdapterError(
                f"Adapter {name!r}: '{place[what]}' and '{key}' in {where} are the same weight by two names, and which "
                "of them counts is not said. Save the adapter again with one of them."
            )
        place[what] = key
    named = {adapter: key for adapter, key in adapters.items() if adapter}
    if len(named) > 1:
        raise AdapterError(
            f"Adapter {name!r}: {where} holds weights of {len(named)} adapters, {sorted(named)}. Save each by itself "
            "(PEFT's `save_pretrained` with `selected_adapters`)."
        )
    return found


def _no_lora_weight(name: str, where: str | Path, key: str, match: re.Match[str] | None) -> AdapterError:
    fact = f"Adapter {name!r}: key '{key}' in {where} is not a LoRA weight of a linear module"
    kind = kind_of_key(key)
    if match is not None and match["part"].startswith("lora_embedding"):
        embedding = match["module"].rpartition(".")[2]
        return AdapterError(
            f"{fact}: it adapts an embedding, which is outside the decoder layers; fusion weights exist per layer. "
            f"Retrain it without {embedding!r} in `target_modules`."
        )
    if kind is not None:
        return AdapterError(f"{fact}: it is of {kind.name}, not of PEFT's LoRA. {kind.remedy}")
    return AdapterError(f"{fact}. Retrain it on linear modules only.")


def _part(name: str, where: str | Path, module: str, part: str, tensor: Tensor) -> Tensor:
    """A part of a module, as torch can compute with it."""
    fact = f"Adapter {name!r}: '{module}.{part}' in {where}"
    if not tensor.numel():
        raise AdapterError(
            f"{fact} is empty: {tuple(tensor.shape)}. Gather it before saving, if its training was sharded (DeepSpeed "
            "ZeRO-3, FSDP), and save the adapter again."
        )
    _check_floats(fact, tensor)
    if tensor.dtype not in _FLOATS:
        # torch has no arithmetic for 8-bit floats; bfloat16 has every value that they have.
        return tensor.to(torch.bfloat16)
    return tensor


def _check_finite(name: str, where: str | Path, module: str, found: Mapping[str, Tensor]) -> None:
    for part, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"Adapter {name!r}: '{module}.{part}' in {where} holds NaN or infinite values. Train it again."
            )


def _check_floats(fact: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS and not str(tensor.dtype).startswith("torch.float8"):
        raise AdapterError(
            f"{fact} is of {tensor.dtype}, and weights are floating-point numbers of at least 8 bits. Save the adapter "
            "again, in float32 or bfloat16."
        )


def _module(name: str, where: str | Path, config: LoraConfig, module: str, found: Mapping[str, Tensor]) -> LoraModule:
    needed = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if config.use_dora else [])]
    needed += ["lora_B.bias"] if config.lora_bias else []
    for part in needed:
        if part not in found:
            raise AdapterError(
                f"Adapter {name!r}: {where} lacks '{KEY_PREFIX}{module}.{part}'. Save the adapter again."
            )
    for part in found:
        if part not in needed:
            raise AdapterError(
                f"Adapter {name!r}: '{KEY_PREFIX}{module}.{part}' in {where} is not what {CONFIG_FILE} describes "
                f"(use_dora={config.use_dora}, lora_bias={config.lora_bias}). Save the adapter again."
            )
    lora_A, lora_B = found["lora_A"], found["lora_B"]
    rank, scaling = rank_and_scaling(config, module)
    # Which of them are of parameters, and of how many experts, only the base tells.
    known = None if config.target_parameters or WRAPPED in module else rank
    if lora_A.dim() != 2 or lora_B.dim() != 2 or not lora_A.shape[0] == lora_B.shape[1] == (known or lora_A.shape[0]):
        raise AdapterError(
            f"Adapter {name!r}: '{module}' has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} in "
            f"{where}, but {CONFIG_FILE} says rank {rank}. Save the adapter again."
        )
    return LoraModule(lora_A, lora_B, scaling, found.get("lora_B.bias"), found.get("lora_magnitude_vector"))


def rank_and_scaling(config: LoraConfig, name: str) -> tuple[int, float]:
    """The rank and the scaling that a configuration gives a module or parameter."""
    rank = _by_pattern(config.rank_pattern, name, config.r)
    alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
    return rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _by_pattern(pattern: Mapping[str, int] | None, module: str, default: int) -> int:
    """A setting of one module: that of the first pattern that fits its name, else the whole adapter's."""
    from peft.utils.other import get_pattern_key

    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module), default)

"""Which precision a base gets where none is asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
_CPU_INFO = Path("/proc/cpuinfo")


def settled_dtype(own: Any, options: Any) -> Any:
    """The precision of a base for `dtype="auto"`: its own, or float32 where its own would crawl, which is said.

    Args:
        own: the precision of its files, or of the base that a fusion was made with; by name or torch's.
        options: how it is loaded, as `BaseOptions`.
    """
    own_name = str(own).removeprefix("torch.")
    on_cpu = options.device_map is None or str(options.device_map) == "cpu"
    quantised = options.quantization not in (None, "none")
    if own_name != "bfloat16" or not on_cpu or quantised or has_bfloat16():
        return own
    log.warning(
        "This CPU has no bfloat16 instructions: the base is loaded in float32, in twice the memory. "
        "`dtype` (`--dtype`) bfloat16 keeps it as it is."
    )
    return torch.float32 if isinstance(own, torch.dtype) else "float32"


def has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 (AVX-512 BF16, AMX, or Arm's); also where nobody can tell."""
    # Newer versions of torch have it.
    ask = getattr(torch.cpu, "get_capabilities", None)
    names = [name for name, there in ask().items() if there is True] if ask is not None else _flags()
    return not names or any("bf16" in name for name in names)


def _flags() -> list[str]:
    """What Linux says that the CPU can."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return found[0] if found else []

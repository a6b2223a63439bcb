"""Bases of which each of several processes holds a part: by FSDP2, as transformers' `distributed_config` loads them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from loraflow.errors import ArchitectureError


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its parts, where it has some: all processes ask for it at once."""
    parted: Any = tensor
    return parted.full_tensor() if hasattr(parted, "full_tensor") else tensor


def check_sharding(model: nn.Module) -> None:
    """Check that every process computes whole linears, however their weights are stored.

    Raises:
        ArchitectureError: if each computes a part of them, or weights in parts are quantised.
    """
    config: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    if getattr(model, "is_quantized", False) and (getattr(config, "fsdp_size", None) or 1) > 1:
        raise ArchitectureError(
            f"The base is quantised, and stored in parts (`fsdp_size` = {config.fsdp_size}), which was never tried: "
            "its weights could be put together wrongly. Give each process the whole of it, or do not quantise it."
        )
    for name in ("tp_size", "pp_size", "ep_size"):
        size = getattr(config, name, None) or 1
        if size > 1:
            raise ArchitectureError(
                f"The base is split by `{name}` (={size}): each process computes a part of a linear's output or of the "
                "layers, and an adapter's update is of the whole. Shard its storage instead, with "
                "`DistributedConfig(fsdp_size=...)`, or spread its layers with `device_map`."
            )

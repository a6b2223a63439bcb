"""Gradients through quantised bases, where a library's fast path has none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_FLAG = "support_avx512bf16_for_cpu"


def keep_differentiable(model: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes' 4-bit linears on kernels that have a backward; gives those that were changed.

    On CPUs with AVX512-BF16 they repack their weights at the first forward in evaluation, for a kernel that has none:
    gradients through it would be wrong without an error.
    """
    packing = [module for module in model.modules() if getattr(module, _FLAG, False)]
    for linear in packing:
        setattr(linear, _FLAG, False)
        _unpack(linear)
    return packing


def allow_packing(linears: Iterable[nn.Module]) -> None:
    """Undo `keep_differentiable`."""
    for linear in linears:
        setattr(linear, _FLAG, True)


def _unpack(linear: nn.Module) -> None:
    weight: Any = linear.weight
    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)

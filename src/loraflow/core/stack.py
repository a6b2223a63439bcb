"""All adapters' updates of one linear, stacked along the rank, with what is constant in them folded in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraflow.adapters import LoraModule
from loraflow.bases import whole


@dataclass(frozen=True)
class StackedLora:
    """All adapters' updates of one linear module, concatenated along the rank.

    Attributes:
        lora_A: `[slots, in_features]`.
        lora_B: `[slots, out_features]`: the transpose of the concatenated up projections, with the scaling (and DoRA's
            c) folded in.
        input_bias: added to `lora_A x`; 1 at the slots of a `lora_bias`, 0 elsewhere; None without any.
        output_scale: DoRA's `c - 1`, `[adapters, out_features]`, zero for plain adapters; None without any.
        slots: number of slots of each adapter, in adapter order.
    """

    lora_A: Float[Tensor, "slots in_features"]
    lora_B: Float[Tensor, "slots out_features"]
    input_bias: Float[Tensor, " slots"] | None
    output_scale: Float[Tensor, "adapters out_features"] | None
    slots: tuple[int, ...]

    def to(self, device: torch.device) -> StackedLora:
        """The same where it will be used, but for what its `InputGroup` holds."""
        scale = None if self.output_scale is None else self.output_scale.to(device)
        return dataclasses.replace(self, lora_B=self.lora_B.to(device), output_scale=scale)


def stack_adapters(modules: Sequence[LoraModule | None], base_layer: nn.Module, dtype: torch.dtype) -> StackedLora:
    """Concatenate one module's adapters, on the CPU; None stands for one that does not target it.

    The arithmetic is float32 at least, and rounded once, to `dtype`, the precision of the base's activations. DoRA
    reads the base layer's (dequantised) weight; nothing changes it.
    """
    wide = torch.promote_types(dtype, torch.float32)
    weight = dense_weight(base_layer).to(wide) if any(m and m.magnitude is not None for m in modules) else None
    rows_A, rows_B, input_bias, slots = [], [], [], []
    output_scale: list[Tensor | None] = []
    for module in modules:
        if module is None:
            slots.append(0)
            output_scale.append(None)
            continue
        lora_A, lora_B = module.lora_A.to(wide), module.lora_B.to(wide).T * module.scaling
        output_scale.append(None)
        if module.magnitude is not None:
            assert weight is not None
            norm = torch.linalg.norm(weight + lora_B.T @ lora_A, dim=1)
            magnitude_ratio = module.magnitude.to(wide).flatten() / norm
            lora_B = lora_B * magnitude_ratio
            output_scale[-1] = magnitude_ratio - 1
        ones = torch.zeros(module.rank, dtype=wide)
        if module.bias is not None:
            lora_A = torch.cat([lora_A, lora_A.new_zeros(1, lora_A.shape[1])])
            lora_B = torch.cat([lora_B, module.bias.to(wide)[None] * module.scaling])
            ones = torch.cat([ones, ones.new_ones(1)])
        rows_A.append(lora_A)
        rows_B.append(lora_B)
        input_bias.append(ones)
        slots.append(lora_A.shape[0])
    bias = torch.cat(input_bias)
    return StackedLora(
        lora_A=torch.cat(rows_A).to(dtype),
        lora_B=torch.cat(rows_B).to(dtype),
        input_bias=bias.to(dtype) if bias.any() else None,
        output_scale=_stack_output_scale(output_scale, dtype),
        slots=tuple(slots),
    )


def _stack_output_scale(rows: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    present = [row for row in rows if row is not None]
    if not present:
        return None
    return torch.stack([torch.zeros_like(present[0]) if row is None else row for row in rows]).to(dtype)


def dense_weight(base_layer: nn.Module) -> Float[Tensor, "out_features in_features"]:
    """A base linear's weight on the CPU, dequantised, as nn.Linear has it."""
    from peft.utils.integrations import dequantize_module_weight

    # accelerate keeps offloaded weights away until a forward; a quantised weight is read through its own kernel.
    with align_module_device(base_layer):
        own = getattr(base_layer, "weight", None)
        weight = whole(dequantize_module_weight(base_layer).detach()).cpu()
        if own is not None and base_layer.weight is not own:
            # PEFT moves 8-bit weights to where they are, which makes them forget the scales that a forward has moved.
            base_layer.weight = own
    return weight.T if isinstance(base_layer, Conv1D) else weight

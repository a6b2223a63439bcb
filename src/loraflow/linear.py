r"""The fused multi-LoRA linear: one low-rank pass over all adapters, around any base linear.

For k adapters on a linear module, every method computes

$$y = W x + \sum_i w_i s_i B_i (A_i x) = W x + B\,(E w \odot A x)$$

with the adapters' matrices concatenated along the rank: each of the $R = \sum_i r_i$ rows of $A$ is one *slot*, and the
0/1 matrix $E$ repeats each fusion weight over its adapter's slots. Ranks may differ, and an adapter that does not
target the module has no slots in it. The scaling $s_i$ is folded into $B$.

- `lora_bias` is one more slot, whose $A x$ is 1.
- DoRA is linear in $w$ too: with $c_i = m_i / \lVert W + s_i B_i A_i \rVert$ by rows, its update is
  $(c_i - 1) \odot W x + c_i \odot s_i B_i A_i x$; $c_i$ is folded into $B_i$, and the rest is one more term.

Modules that read the same input (q, k and v; gate and up) share one product with their stacked $A$.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from jaxtyping import Float
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraflow.adapters import LoraModule


@dataclass(frozen=True)
class StackedLora:
    """All adapters' updates of one linear module, concatenated along the rank.

    Attributes:
        lora_A: `[slots, in_features]`.
        lora_B: `[slots, out_features]`: the transpose of the concatenated up projections, scaling (and DoRA's c) folded.
        input_bias: added to `lora_A x`; 1 at the slots of a `lora_bias`, 0 elsewhere; None without any.
        output_scale: DoRA's `c - 1`, `[adapters, out_features]`, zero for plain adapters; None without any.
        slots: number of slots of each adapter, in adapter order.
    """

    lora_A: Float[Tensor, "slots in_features"]
    lora_B: Float[Tensor, "slots out_features"]
    input_bias: Float[Tensor, " slots"] | None
    output_scale: Float[Tensor, "adapters out_features"] | None
    slots: tuple[int, ...]


def stack_adapters(modules: Sequence[LoraModule | None], base_layer: nn.Module, dtype: torch.dtype) -> StackedLora:
    """Concatenate one module's adapters; the arithmetic is float32 at least, and rounded once, to `dtype`.

    Args:
        modules: each adapter's update of this module, in adapter order; None where an adapter does not target it.
        base_layer: the base's linear module; DoRA reads its (dequantised) weight, and nothing changes it.
        dtype: precision of the result, that of the base's activations.

    Returns:
        The stacked matrices, on the CPU.
    """
    wide = torch.promote_types(dtype, torch.float32)
    weight = _dense_weight(base_layer).to(wide) if any(m and m.magnitude is not None for m in modules) else None
    rows_A, rows_B, input_bias, output_scale, slots = [], [], [], [], []
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


def _dense_weight(base_layer: nn.Module) -> Float[Tensor, "out_features in_features"]:
    # accelerate keeps offloaded weights away until a forward; a quantised weight is read through its own kernel.
    with align_module_device(base_layer):
        weight = dequantize_module_weight(base_layer).detach().cpu()
    return weight.T if isinstance(base_layer, Conv1D) else weight


class FusedUpdate(torch.autograd.Function):
    r"""`y + B (w * u) + (y - bias) * (v @ C)`, keeping for the backward only what the gate's gradient needs.

    With the adapters frozen, $\partial L / \partial w = (B^T g) \odot u$ and $\partial L / \partial u = (B^T g) \odot w$:
    the R slots of `u` are kept for each token; neither the module's input nor any adapter's full-size output is.
    DoRA needs the base's output too.
    """

    @staticmethod
    def forward(ctx, base_output, u, slot_weights, lora_B, adapter_weights, output_scale, base_bias):  # type: ignore[override]  # noqa: D102
        ctx.save_for_backward(
            u,
            slot_weights,
            lora_B,
            *((adapter_weights, output_scale, base_bias, base_output) if output_scale is not None else ()),
        )
        return _update(base_output, u * slot_weights, lora_B, adapter_weights, output_scale, base_bias)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]  # noqa: D102
        u, slot_weights, lora_B, *dora = ctx.saved_tensors
        grad_slots = grad_output @ lora_B.T.to(grad_output.dtype)
        grad_u = grad_slots * slot_weights if ctx.needs_input_grad[1] else None
        grad_weights = (grad_slots * u).sum_to_size(slot_weights.shape) if ctx.needs_input_grad[2] else None
        grad_base, grad_adapter_weights = grad_output, None
        if dora:
            adapter_weights, output_scale, base_bias, base_output = dora
            grad_base = grad_output + grad_output * (adapter_weights @ output_scale)
            product = base_output if base_bias is None else base_output - base_bias
            if ctx.needs_input_grad[4]:
                grad_adapter_weights = ((grad_output * product) @ output_scale.T).sum_to_size(adapter_weights.shape)
        return grad_base, grad_u, grad_weights, None, grad_adapter_weights, None, None


def _update(
    base_output: Float[Tensor, "*batch out_features"],
    weighted: Float[Tensor, "*batch slots"],
    lora_B: Float[Tensor, "slots out_features"],
    adapter_weights: Float[Tensor, "*weights adapters"] | None,
    output_scale: Float[Tensor, "adapters out_features"] | None,
    base_bias: Float[Tensor, " out_features"] | None,
) -> Float[Tensor, "*batch out_features"]:
    features = base_output.shape[-1]
    flat = torch.addmm(base_output.reshape(-1, features), weighted.reshape(-1, weighted.shape[-1]), lora_B)
    result = flat.view(base_output.shape)
    if output_scale is None:
        return result
    product = base_output if base_bias is None else base_output - base_bias
    return result + product * (adapter_weights @ output_scale)


class SharedInput(nn.Module):
    """The stacked adapters of linear modules that read one input, and their weighted low-rank product.

    The product with the stacked A is computed when the first of them is called, and handed to the others as long as
    they are called with the very same tensor. Modules that turn out to read different inputs are still right, at the
    price of a product each.
    """

    def __init__(self, stacks: Sequence[StackedLora], device: torch.device) -> None:
        super().__init__()
        self.sizes = [stack.lora_A.shape[0] for stack in stacks]
        self.register_buffer("lora_A", torch.cat([stack.lora_A for stack in stacks]).to(device), persistent=False)
        biases = [stack.input_bias for stack in stacks]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([s.lora_A.new_zeros(n) if b is None else b for s, b, n in zip(stacks, biases, self.sizes)])
            bias = bias.to(device)
        self.register_buffer("input_bias", bias, persistent=False)
        self.register_buffer("expand", _expansion(stacks).to(device), persistent=False)
        self.dropout = 0.0
        self.clear()

    def clear(self) -> None:
        """Forget the last input and its products, so that no activation outlives its layer."""
        self._input: Tensor | None = None
        self._products: tuple[Tensor, ...] = ()
        self._weights: Tensor | None = None
        self._slot_weights: tuple[Tensor, ...] = ()

    def product(self, member: int, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch slots"]:
        """`A x` of one member (its position in the group), computed once for the whole group."""
        if self._input is not x:
            self._input = x
            if self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            self._products = F.linear(x.to(self.lora_A.dtype), self.lora_A, self.input_bias).split(self.sizes, dim=-1)
        return self._products[member]

    def slot_weights(self, member: int, weights: Float[Tensor, "*weights adapters"]) -> Float[Tensor, "*weights slots"]:
        """Fusion weights repeated over the slots of one member, in the adapters' precision."""
        if self._weights is not weights:
            self._weights = weights
            expanded = (weights @ self.expand.to(weights.dtype)).to(self.lora_A.dtype)
            self._slot_weights = expanded.split(self.sizes, dim=-1)
        return self._slot_weights[member]


def _expansion(stacks: Sequence[StackedLora]) -> Float[Tensor, "adapters slots"]:
    """The 0/1 matrix E of the module docstring, for all members of a group side by side."""
    adapters = len(stacks[0].slots)
    owner = [adapter for stack in stacks for adapter, count in enumerate(stack.slots) for _ in range(count)]
    return F.one_hot(torch.tensor(owner), adapters).T.float().contiguous()


class FusedLinear(nn.Module):
    """A base linear with all adapters' weighted updates added to its output.

    The base layer is called, never modified, so anything that PEFT itself can wrap works: `nn.Linear`, `Conv1D`, and
    the quantised linears. The fusion weights come from the decoder layer it belongs to (`layer`), or from its own
    gate where the method places one on every module.
    """

    def __init__(
        self, base_layer: nn.Module, layer: nn.Module, name: str, stack: StackedLora, device: torch.device
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.register_buffer("lora_B", stack.lora_B.to(device), persistent=False)
        scale = stack.output_scale
        self.register_buffer("output_scale", None if scale is None else scale.to(device), persistent=False)
        self.name = name
        # Plain references: as registered submodules these would appear below every linear of the layer.
        self.__dict__["layer"] = layer
        self.__dict__["shared"] = None
        self.member = 0

    def share(self, shared: SharedInput, member: int) -> None:
        """Join a group of modules that read one input, as its `member`-th."""
        self.__dict__["shared"] = shared
        self.member = member

    def __getattr__(self, name: str):
        """Fall back to the base layer, whose `weight`, `in_features`, ... model code may ask for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Float[Tensor, "*batch in_features"], *args, **kwargs) -> Float[Tensor, "*batch out_features"]:
        """The base layer's output plus the weighted sum of the adapters' updates."""
        base_output = self.base_layer(x, *args, **kwargs)
        weights = self.layer.weights_for(self.name, x)
        if weights is None:
            return base_output
        u = self.shared.product(self.member, x)
        slot_weights = self.shared.slot_weights(self.member, weights)
        bias = None if self.output_scale is None else getattr(self.base_layer, "bias", None)
        # The arguments' order is FusedUpdate's.
        if torch.is_grad_enabled() and (slot_weights.requires_grad or u.requires_grad):
            scale_weights = None if self.output_scale is None else weights.to(self.lora_B.dtype)
            return FusedUpdate.apply(
                base_output, u.to(base_output.dtype), slot_weights, self.lora_B, scale_weights, self.output_scale, bias
            )
        scale_weights = None if self.output_scale is None else weights.to(self.lora_B.dtype)
        return _update(base_output, u * slot_weights, self.lora_B, scale_weights, self.output_scale, bias)

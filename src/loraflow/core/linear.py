r"""The fused multi-LoRA linear: one low-rank pass over all adapters, around any base linear.

For k adapters on a linear module, every method computes

$$y = W x + \sum_i w_i s_i B_i (A_i x) = W x + B\,(E w \odot A x)$$

with the adapters' matrices concatenated along the rank: each of the $R = \sum_i r_i$ rows of $A$ is one *slot*, and the
0/1 matrix $E$ repeats each fusion weight over its adapter's slots. Ranks may differ, and an adapter that does not
target the module has no slots in it. The scaling $s_i$ is folded into $B$.

- `lora_bias` is one more slot, whose $A x$ is 1.
- DoRA is linear in $w$ too: with $c_i = m_i / \lVert W + s_i B_i A_i \rVert$ by rows, its update is
  $(c_i - 1) \odot W x + c_i \odot s_i B_i A_i x$; $c_i$ is folded into $B_i$, and the rest is one more term.

Parameters can be mixed instead of outputs, as LoRA-Hub does, which multiplies out to cross terms between adapters:

$$y = W x + \Big(\sum_i w_i s_i B_i\Big) \Big(\sum_j w_j A_j\Big) x = W x + B\,(E w \odot P^T P\,(E w \odot A x))$$

where the 0/1 matrix $P$ adds up the slots of all adapters that have the same place within their rank.

Modules that read the same input (q, k and v; gate and up) share one product with their stacked $A$.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraflow.adapters import LoraModule
from loraflow.bases import whole
from loraflow.core.added import add_own_updates
from loraflow.core.context import LayerContext
from loraflow.core.rows import Rows
from loraflow.core.swap import restore_class, swap_class
from loraflow.errors import ArchitectureError


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


class WeightedProduct(torch.autograd.Function):
    r"""`(A x + bias) * (w E)`, keeping for the backward only what the gate's gradient needs.

    With the adapters frozen and $u = A x$, $\partial L / \partial w = E (g \odot u)$ and
    $\partial L / \partial x = A^T (g \odot w E)$: the slots of `u` and the fusion weights are kept for each token; the
    module's input and the expanded weights are not.
    """

    @staticmethod
    def forward(ctx, x, lora_A, input_bias, weights, expand):
        """Weighted slots, `[..., slots]`, in the precision of `lora_A`."""
        u = F.linear(x, lora_A, input_bias)
        # The slots are of use to the gate's gradient only.
        ctx.save_for_backward(lora_A, u if ctx.needs_input_grad[3] else None, weights, expand)
        return u * _slot_weights(weights, expand, u.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        """Gradients of `x` and `weights`."""
        lora_A, u, weights, expand = ctx.saved_tensors
        grad_x = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_u = grad_output * _slot_weights(weights, expand, grad_output.dtype)
            # Under autocast the product was in another precision than the matrix.
            grad_x = grad_u @ lora_A.to(grad_u.dtype)
        if ctx.needs_input_grad[3]:
            grad_weights = ((grad_output * u).to(weights.dtype) @ expand.T.to(weights.dtype)).sum_to_size(weights.shape)
        return grad_x, None, None, grad_weights, None


class ScaledOutput(torch.autograd.Function):
    r"""DoRA's `W x * (w C)`, with C its output scales; the backward keeps W x and w, not their product with C."""

    @staticmethod
    def forward(ctx, product, weights, output_scale):
        """The part of DoRA's update that is no low-rank product, `[..., out_features]`."""
        ctx.save_for_backward(product, weights, output_scale)
        return product * _slot_weights(weights, output_scale, product.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        """Gradients of `product` and `weights`."""
        product, weights, output_scale = ctx.saved_tensors
        grad_product = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_product = grad_output * _slot_weights(weights, output_scale, product.dtype)
        if ctx.needs_input_grad[1]:
            scale = output_scale.T.to(weights.dtype)
            grad_weights = ((grad_output * product).to(weights.dtype) @ scale).sum_to_size(weights.shape)
        return grad_product, grad_weights, None


def _slot_weights(weights: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    # In the gate's precision, then rounded once. At one token a no-op `to` costs as much as the product.
    if matrix.dtype != weights.dtype:
        matrix = matrix.to(weights.dtype)
    slots = weights @ matrix
    return slots if slots.dtype == dtype else slots.to(dtype)


class InputGroup(nn.Module):
    """The stacked adapters of linear modules that read one input, and their weighted low-rank product.

    The product with the stacked A is computed when the first of them is called, and handed to the others as long as
    they are called with the very same tensor. Modules that turn out to read different inputs are still right, at the
    price of a product each.

    Where each module has a gate of its own, the weights of all of them stand side by side, `[..., modules * adapters]`.

    Attributes:
        names: of the modules, within their decoder layer.
        rows: what the rows of their input are.
        lora_A: the modules' stacked A, one below the other, `[slots, in_features]`.
        input_bias: theirs, `[slots]`, or None.
        expand: the 0/1 matrix E for weights that all modules share, `[adapters, slots]`.
        expand_each: the same for weights of each module, `[modules * adapters, slots]`.
        places: the place of each slot within the rank of its adapter, counted on from module to module, `[slots]`.
        dropout: probability with which inputs of A are dropped in training.
    """

    names: tuple[str, ...]
    rows: Rows
    lora_A: Tensor
    input_bias: Tensor | None
    expand: Tensor
    expand_each: Tensor
    places: Tensor
    dropout: float

    def __init__(
        self, names: Sequence[str], stacks: Sequence[StackedLora], device: torch.device, rows: Rows = "tokens"
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.rows = rows
        self.sizes = [stack.lora_A.shape[0] for stack in stacks]
        self.adapters = len(stacks[0].slots)
        self.slots = [stack.slots for stack in stacks]
        self.place_count = sum(max(slots) for slots in self.slots)
        self.dropout = 0.0
        expansions = [_expansion(stack) for stack in stacks]
        self.register_buffer("lora_A", torch.cat([stack.lora_A for stack in stacks]).to(device), persistent=False)
        self.register_buffer("input_bias", _stack_input_bias(stacks, device), persistent=False)
        self.register_buffer("expand", torch.cat(expansions, dim=1).to(device), persistent=False)
        self.register_buffer("expand_each", torch.block_diag(*expansions).to(device), persistent=False)
        self.register_buffer("places", _places(stacks).to(device), persistent=False)

    def project(
        self, context: LayerContext, x: Float[Tensor, "*batch in_features"], weights: Float[Tensor, "*tokens gates"]
    ) -> None:
        """Compute the weighted slots of all modules for one input, and note them in the context."""
        lora_A = self.lora_A
        context.group, context.seen = self, x
        if weights.shape[-1] == self.adapters:
            context.member_weights, expand = (weights,) * len(self.sizes), self.expand
        else:
            context.member_weights, expand = weights.split(self.adapters, dim=-1), self.expand_each
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if x.dtype != lora_A.dtype:
            x = x.to(lora_A.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
            weighted = WeightedProduct.apply(x.reshape(-1, x.shape[-1]), lora_A, self.input_bias, weights, expand)
        else:
            weighted = F.linear(x, lora_A, self.input_bias).view(-1, lora_A.shape[0])
            weighted = weighted * _slot_weights(weights, expand, weighted.dtype)
        if context.mixes is not False:
            mixed = self._mix(weighted, _slot_weights(weights, expand, weighted.dtype))
            mixes = context.mixes_for(len(weighted))
            weighted = mixed if isinstance(mixes, bool) else torch.where(mixes, mixed, weighted)
        context.products = weighted.split_with_sizes(self.sizes, -1) if len(self.sizes) > 1 else (weighted,)

    def _mix(
        self, weighted: Float[Tensor, "tokens slots"], slot_weights: Float[Tensor, "*tokens slots"]
    ) -> Float[Tensor, "tokens slots"]:
        """The cross terms, of modules some of which may have a `lora_bias`."""
        plain = weighted if self.input_bias is None else weighted * (1 - self.input_bias)
        mixed = mix_slots(plain, slot_weights, self.places, self.place_count)
        # A `lora_bias` belongs to B alone: it is weighted once.
        return mixed if self.input_bias is None else torch.where(self.input_bias.bool(), weighted, mixed)

    def slots_of(self, member: int, adapter: int) -> tuple[slice, slice]:
        """Where an adapter's slots are in a module's own stack, and in that of all modules."""
        before = sum(self.slots[member][:adapter])
        start = sum(self.sizes[:member]) + before
        count = self.slots[member][adapter]
        return slice(before, before + count), slice(start, start + count)


def mix_slots(
    weighted: Float[Tensor, "tokens slots"],
    slot_weights: Float[Tensor, "*tokens slots"],
    places: Int[Tensor, " slots"],
    place_count: int,
) -> Float[Tensor, "tokens slots"]:
    """The cross terms: every adapter's B is given the weighted sum of all adapters' A x."""
    sums = weighted.new_zeros(weighted.shape[0], place_count).index_add(1, places, weighted)
    return sums[:, places] * slot_weights


def _places(stacks: Sequence[StackedLora]) -> Int[Tensor, " slots"]:
    places, start = [], 0
    for stack in stacks:
        places += [start + place for count in stack.slots for place in range(count)]
        start += max(stack.slots)
    return torch.tensor(places)


def _stack_input_bias(stacks: Sequence[StackedLora], device: torch.device) -> Tensor | None:
    if all(stack.input_bias is None for stack in stacks):
        return None
    biases = [
        stack.lora_A.new_zeros(stack.lora_A.shape[0]) if stack.input_bias is None else stack.input_bias
        for stack in stacks
    ]
    return torch.cat(biases).to(device)


def _expansion(stack: StackedLora) -> Float[Tensor, "adapters slots"]:
    """The 0/1 matrix E of the module docstring, for one module."""
    owner = [adapter for adapter, count in enumerate(stack.slots) for _ in range(count)]
    return F.one_hot(torch.tensor(owner), len(stack.slots)).T.float().contiguous()


class FusedLinear(nn.Module):
    """Mixed into a base linear's class: adds all adapters' weighted updates to what its own forward gives.

    The base's forward is called and its weight never modified, so anything that PEFT itself can wrap works:
    `nn.Linear`, `Conv1D`, and the quantised linears.

    Attributes:
        lora_B: the adapters' stacked B, `[slots, out_features]`.
        lora_output_scale: DoRA's `c - 1`, `[adapters, out_features]`, or None.
        fused: where it stands in its layer.
    """

    lora_B: Tensor
    lora_output_scale: Tensor | None
    fused: Member

    def forward(self, x: Float[Tensor, "*batch in_features"], *args, **kwargs) -> Float[Tensor, "*batch out_features"]:
        """The base linear's output plus the weighted sum of the adapters' updates."""
        return self.add_updates(x, super().forward(x, *args, **kwargs))

    def add_updates(
        self, x: Float[Tensor, "*batch in_features"], base_output: Float[Tensor, "*batch out_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """What the base gave, which is nobody else's yet, plus the weighted sum of the adapters' updates.

        And what gates add of their own, where a method's do.
        """
        result = self._add_weighted(x, base_output)
        group, member, context, _ = self.fused
        return add_own_updates(context, group.names[member], group.rows, x, result) if context.running.adds else result

    def _add_weighted(
        self, x: Float[Tensor, "*batch in_features"], base_output: Float[Tensor, "*batch out_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        group, member, context, uses_dora = self.fused
        if context.alone is not None:
            return self._each_alone(x, base_output)
        if context.seen is not x or context.group is not group:
            weights = context.weights_for(group.names, group.rows, x)
            if weights is None:
                return base_output
            group.project(context, x, weights)
        product, lora_B = context.products[member], self.lora_B
        if lora_B.dtype != base_output.dtype:
            lora_B = lora_B.to(base_output.dtype)
            product = product.to(base_output.dtype)
        if not base_output.is_contiguous():
            base_output = base_output.contiguous()
        shape = base_output.shape
        flat = base_output.view(-1, shape[-1])
        if not uses_dora and not (torch.is_grad_enabled() and (flat.requires_grad or product.requires_grad)):
            # Adding in place saves a tensor and, at one token, time.
            flat.addmm_(product, lora_B)
            return base_output
        result = torch.addmm(flat, product, lora_B)
        if uses_dora:
            dense = flat if self.bias is None else flat - cast(Tensor, self.bias)
            result = result + ScaledOutput.apply(dense, context.member_weights[member], self.lora_output_scale)
        return result.view(shape)

    def _each_alone(
        self, x: Float[Tensor, "*batch in_features"], base_output: Float[Tensor, "*batch out_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Every row with one adapter or none, at the price of that adapter alone; without gradients.

        Raises:
            ArchitectureError: if it cannot be told which rows are whose.
        """
        group, member, context, _ = self.fused
        assert context.alone is not None
        if group.rows == "unknown" and len(context.alone) > 1:
            raise ArchitectureError(
                f"'{group.names[member]}' of decoder layer {context.index} reads rows of which it cannot be told whose "
                "they are. Read one prompt at a time."
            )
        rows = x.reshape(len(context.alone), -1, x.shape[-1])
        result = base_output.reshape(len(context.alone), -1, base_output.shape[-1])
        for row, adapter in enumerate(context.alone):
            if adapter is None or not group.slots[member][adapter]:
                continue
            own, grouped = group.slots_of(member, adapter)
            bias = None if group.input_bias is None else group.input_bias[grouped]
            lora_A, lora_B = group.lora_A[grouped], self.lora_B[own]
            product = F.linear(rows[row].to(lora_A.dtype), lora_A, bias)
            if self.lora_output_scale is not None:
                dense = result[row] if self.bias is None else result[row] - cast(Tensor, self.bias)
                result[row] += dense * self.lora_output_scale[adapter].to(dense.dtype)
            result[row].addmm_(product.to(result.dtype), lora_B.to(result.dtype))
        return result.view(base_output.shape)


class Member(NamedTuple):
    """Where a fused linear stands in its layer; a tuple, for modules are slow to read from.

    Attributes:
        group: the linears that read its input.
        member: its position among them.
        context: what its layer's gates and linears share.
        uses_dora: whether one of the adapters is a DoRA there.
    """

    group: InputGroup
    member: int
    context: LayerContext
    uses_dora: bool

    @property
    def name(self) -> str:
        """The linear's name within its layer."""
        return self.group.names[self.member]


def fuse_linear(linear: nn.Module, stack: StackedLora, fused: Member, mixin: type[FusedLinear] = FusedLinear) -> None:
    """Make a base linear a `FusedLinear`, in its place."""
    device, scale = fused.group.lora_A.device, stack.output_scale
    linear.register_buffer("lora_B", stack.lora_B.to(device), persistent=False)
    linear.register_buffer("lora_output_scale", None if scale is None else scale.to(device), persistent=False)
    swap_class(linear, mixin)
    assert isinstance(linear, FusedLinear)
    linear.fused = fused


def unfuse_linear(linear: FusedLinear) -> None:
    """Make a fused linear the base's own again."""
    restore_class(linear)
    del linear.lora_B, linear.lora_output_scale, linear.fused

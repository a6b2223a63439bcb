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

from collections.abc import Callable
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.core.active import Active, Use
from loraflow.core.added import add_own_updates
from loraflow.core.context import LayerContext
from loraflow.core.cuts import Cuts
from loraflow.core.group import InputGroup, Picked, cut_writing
from loraflow.core.matrices import Writing
from loraflow.core.products import ScaledOutput
from loraflow.core.stack import StackedLora
from loraflow.core.swap import restore_class, swap_class
from loraflow.errors import ArchitectureError


class FusedLinear(nn.Module):
    """Mixed into a base linear's class: adds all adapters' weighted updates to what its own forward gives.

    The base's forward is called and its weight never modified, so anything that PEFT itself can wrap works:
    `nn.Linear`, `Conv1D`, and the quantised linears.

    Attributes:
        lora_B: the adapters' stacked B, `[slots, out_features]`.
        lora_output_scale: DoRA's `c - 1`, `[adapters, out_features]`, or None.
        fused: where it stands in its layer.
        lora_cuts: parts of these for some of the adapters.
    """

    lora_B: Tensor
    lora_output_scale: Tensor | None
    fused: Member
    lora_cuts: Cuts[Writing]

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
        group, member, context = self.fused
        return add_own_updates(context, group.names[member], group.rows, x, result) if context.running.adds else result

    def _add_weighted(
        self, x: Float[Tensor, "*batch in_features"], base_output: Float[Tensor, "*batch out_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        group, member, context = self.fused
        if context.alone is not None:
            return self._each_alone(x, base_output)
        if context.seen is not x or context.group is not group:
            if context.running.reads_slots:
                group.look(context, x)
            weights = context.weights_for(group.names, group.rows, x)
            if weights is None:
                return base_output
            group.project(context, x, weights)
        product, lora_B, output_scale = context.products[member], self.lora_B, self.lora_output_scale
        if context.active is not None or not isinstance(product, Tensor):
            writing = self.writing(context.active)
            if not len(writing.lora_B):
                return base_output
            lora_B, output_scale = writing.lora_B, writing.output_scale
        if not isinstance(product, Tensor):
            return self._add_picked(cast(Picked, product), base_output, writing)
        if lora_B.dtype != base_output.dtype:
            lora_B = lora_B.to(base_output.dtype)
            product = product.to(base_output.dtype)
        if not base_output.is_contiguous():
            base_output = base_output.contiguous()
        shape = base_output.shape
        flat = base_output.view(-1, shape[-1])
        if output_scale is None and not (torch.is_grad_enabled() and (flat.requires_grad or product.requires_grad)):
            # Adding in place saves a tensor and, at one token, time.
            flat.addmm_(product, lora_B)
            return base_output
        result = torch.addmm(flat, product, lora_B)
        if output_scale is not None:
            dense = flat if self.bias is None else flat - cast(Tensor, self.bias)
            result = result + ScaledOutput.apply(dense, context.member_weights[member], output_scale)
        return result.view(shape)

    def _add_picked(
        self, picked: Picked, base_output: Float[Tensor, "*batch out_features"], writing: Writing
    ) -> Float[Tensor, "*batch out_features"]:
        """Add the updates of the adapters that each row uses; without gradients."""
        _, member, context = self.fused
        uses_dora = writing.output_scale is not None
        flat = base_output.reshape(-1, base_output.shape[-1])
        dense = flat if not uses_dora or self.bias is None else flat - cast(Tensor, self.bias)
        scaled = None
        if uses_dora:
            scaled = ScaledOutput.apply(dense, context.member_weights[member], writing.output_scale)
        if flat.dtype == writing.lora_B.dtype:
            picked.picks.write(picked.slots, writing.part, flat)
        else:
            update = flat.new_zeros(flat.shape, dtype=writing.lora_B.dtype)
            picked.picks.write(picked.slots, writing.part, update)
            flat += update
        return (flat if scaled is None else flat + scaled).view(base_output.shape)

    def writing(self, active: Active | None) -> Writing:
        """The stacked B of these adapters, or of all, cut out once as long as it is used."""
        group, member, _ = self.fused
        if group.shelf is not None:
            return group.shelf.of(active).writings[member]
        return self.lora_cuts.of(active, self.lora_B, self._cut)

    def prepare(self, use: Use, *, each: bool) -> None:
        """Make what lanes use, before the first forward that does; `each` if linears have weights of their own."""
        group, member, context = self.fused
        if use.active is not None and not context.keeps:
            use.index(self.lora_B.device)
            self.writing(use.active)
        if member == 0:
            group.reading(None if context.keeps else use.active).expansion(each and len(group.names) > 1)

    def _cut(self, active: Active | None) -> Writing:
        group, member, _ = self.fused
        return cut_writing(self.lora_B, self.lora_output_scale, group, member, active)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What was cut out is on the old device until then.
        self.lora_cuts.clear()
        return super()._apply(fn, recurse)

    def _each_alone(
        self, x: Float[Tensor, "*batch in_features"], base_output: Float[Tensor, "*batch out_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Every row with one adapter or none, at the price of that adapter alone; without gradients.

        Raises:
            ArchitectureError: if it cannot be told which rows are whose.
        """
        group, member, context = self.fused
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
            lora_A, bias, lora_B, scale = self._of_one(adapter)
            product = F.linear(rows[row].to(lora_A.dtype), lora_A, bias)
            if scale is not None:
                dense = result[row] if self.bias is None else result[row] - cast(Tensor, self.bias)
                result[row] += dense * scale.to(dense.dtype)
            result[row].addmm_(product.to(result.dtype), lora_B.to(result.dtype))
        return result.view(base_output.shape)

    def _of_one(self, adapter: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """A, its bias, B and DoRA's output scale of one adapter."""
        group, member, _ = self.fused
        if group.shelf is not None:
            part = group.shelf.of((adapter,))
            (lora_A, bias), writing = part.reading.of(member), part.writings[member]
            return lora_A, bias, writing.lora_B, None if writing.output_scale is None else writing.output_scale[0]
        own, grouped = group.slots_of(member, adapter)
        bias = None if group.input_bias is None else group.input_bias[grouped]
        scale = None if self.lora_output_scale is None else self.lora_output_scale[adapter]
        return group.lora_A[grouped], bias, self.lora_B[own], scale


class Member(NamedTuple):
    """Where a fused linear stands in its layer; a tuple, for modules are slow to read from.

    Attributes:
        group: the linears that read its input.
        member: its position among them.
        context: what its layer's gates and linears share.
    """

    group: InputGroup
    member: int
    context: LayerContext

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
    linear.fused, linear.lora_cuts = fused, Cuts()


def unfuse_linear(linear: FusedLinear) -> None:
    """Make a fused linear the base's own again."""
    restore_class(linear)
    del linear.lora_B, linear.lora_output_scale, linear.fused, linear.lora_cuts

"""The products of the fused pass, with backwards that keep only what the gates' gradients need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


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
        return u * slot_weights(weights, expand, u.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        """Gradients of `x` and `weights`."""
        lora_A, u, weights, expand = ctx.saved_tensors
        grad_x = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_u = grad_output * slot_weights(weights, expand, grad_output.dtype)
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
        return product * slot_weights(weights, output_scale, product.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        """Gradients of `product` and `weights`."""
        product, weights, output_scale = ctx.saved_tensors
        grad_product = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_product = grad_output * slot_weights(weights, output_scale, product.dtype)
        if ctx.needs_input_grad[1]:
            scale = output_scale.T.to(weights.dtype)
            grad_weights = ((grad_output * product).to(weights.dtype) @ scale).sum_to_size(weights.shape)
        return grad_product, grad_weights, None


def slot_weights(
    weights: Float[Tensor, "*tokens gates"], matrix: Float[Tensor, "gates slots"], dtype: torch.dtype
) -> Float[Tensor, "*tokens slots"]:
    """The weight of each slot: those of the gates times a matrix, E or DoRA's output scales."""
    # In the gate's precision, then rounded once. At one token a no-op `to` costs as much as the product.
    if matrix.dtype != weights.dtype:
        matrix = matrix.to(weights.dtype)
    slots = weights @ matrix
    return slots if slots.dtype == dtype else slots.to(dtype)


def mix_slots(
    weighted: Float[Tensor, "tokens slots"],
    slot_weights: Float[Tensor, "*tokens slots"],
    places: Int[Tensor, " slots"],
    place_count: int,
) -> Float[Tensor, "tokens slots"]:
    """The cross terms: every adapter's B is given the weighted sum of all adapters' A x."""
    sums = weighted.new_zeros(weighted.shape[0], place_count).index_add(1, places, weighted)
    return sums[:, places] * slot_weights

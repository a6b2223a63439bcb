"""What gates and methods share: scores of the adapters from an input, and weights from scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from loraflow.adapters import LoraModule
from loraflow.methods._shared.projections import right_singular
from loraflow.methods.base import Site


class GateLogits(torch.autograd.Function):
    """`x @ weight.T` in the gate's precision, keeping `x` in its own.

    Plain autograd would keep a float32 copy of every gate's input, twice the size of a bfloat16 residual stream that
    is kept anyway.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        grad_output = grad_output.to(weight.dtype)
        grad_x = (grad_output @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad_output.flatten(0, -2).T @ x.flatten(0, -2).to(weight.dtype)
        return grad_x, grad_weight


def linear_scores(
    x: Float[Tensor, "*batch features"], weight: Float[Tensor, "scores features"]
) -> Float[Tensor, "*batch scores"]:
    """`x @ weight.T` in the precision of `weight`, whatever that of `x`, under autocast too."""
    learning = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
    return GateLogits.apply(x, weight) if learning else _product(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype != weight.dtype:
        x = x.to(weight.dtype)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight)
    return F.linear(x, weight)


def top_k_softmax(
    scores: Float[Tensor, "*batch adapters"],
    top_k: int,
    temperature: float,
    targets: Bool[Tensor, " adapters"] | None = None,
) -> Float[Tensor, "*batch adapters"]:
    """Softmax over the largest `top_k` scores; the other adapters, and those that are not `targets`, get 0."""
    if targets is not None:
        scores = scores.masked_fill(~targets, float("-inf"))
    if top_k < scores.shape[-1]:
        scores = scores.masked_fill(~largest(scores, top_k), float("-inf"))
    return torch.softmax(scores / temperature, dim=-1)


def top_k_equal(
    scores: Float[Tensor, "*batch adapters"], top_k: int, targets: Bool[Tensor, " adapters"]
) -> Float[Tensor, "*batch adapters"]:
    """Equal weights, with sum 1, of those of the largest `top_k` scores that are `targets`, of which there must be."""
    kept = largest(scores.masked_fill(~targets, float("-inf")), top_k) & targets
    return kept.to(scores.dtype) / kept.sum(dim=-1, keepdim=True)


def largest(scores: Float[Tensor, "*batch adapters"], count: int) -> Bool[Tensor, "*batch adapters"]:
    """Which scores are so many of the largest."""
    chosen = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def softmax_among(
    scores: Float[Tensor, "*batch adapters"], among: Bool[Tensor, "*batch adapters"]
) -> Float[Tensor, "*batch adapters"]:
    """Softmax over some of the adapters; the others get 0, and where there are none all do, with zero gradients."""
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~among, lowest), dim=-1) * among


def largest_normalized(scores: Float[Tensor, " adapters"], top_k: int | None) -> Float[Tensor, " adapters"]:
    """Keep the largest `top_k` of non-negative scores and divide by their sum; where all are zero, weigh evenly.

    Where there are fewer, all are kept.
    """
    kept = torch.zeros_like(scores)
    chosen = scores.topk(min(top_k or len(scores), len(scores))).indices
    kept[chosen] = scores[chosen]
    total = kept.sum()
    if total > 0:
        return kept / total
    kept[chosen] = 1 / len(chosen)
    return kept


def main_input_direction(update: LoraModule) -> Float[Tensor, " in_features"]:
    """The top right singular vector of B A in float32: the input that the update answers most strongly; or zero."""
    rows = right_singular(update).rows
    return rows[0].float() if len(rows) else torch.zeros(update.lora_A.shape[1])


def targets_of(site: Site) -> Bool[Tensor, " adapters"]:
    """Which adapters update the linear of a module's site."""
    return torch.tensor([update is not None for update in site.updates[site.module or ""]])

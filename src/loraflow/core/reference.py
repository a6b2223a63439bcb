"""The same mathematics as slow, separate loops over the adapters: the oracle of the tests.

Nothing here shares code with the fused pass, and nothing is fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loraflow.adapters import LoraModule


def reference_linear(
    x: Float[Tensor, "*batch in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None,
    modules: Sequence[LoraModule | None],
    fusion_weights: Float[Tensor, "*batch adapters"],
) -> Float[Tensor, "*batch out_features"]:
    r"""A linear with every adapter computed for itself: $y = W x + \sum_i w_i \Delta_i(x)$."""
    y = F.linear(x, weight, bias)
    for i, module in enumerate(modules):
        if module is not None:
            y = y + fusion_weights[..., i : i + 1] * reference_update(x, weight, module)
    return y


def reference_update(
    x: Float[Tensor, "*batch in_features"], weight: Float[Tensor, "out_features in_features"], module: LoraModule
) -> Float[Tensor, "*batch out_features"]:
    r"""One adapter's update: $s (B A x + b)$, or DoRA's $(c - 1) W x + c\, s B A x$."""
    A, B = module.lora_A.to(x.dtype), module.lora_B.to(x.dtype)
    update = module.scaling * F.linear(F.linear(x, A), B)
    if module.bias is not None:
        update = update + module.scaling * module.bias.to(x.dtype)
    if module.magnitude is not None:
        norm = torch.linalg.norm(weight + module.scaling * B @ A, dim=1)
        c = module.magnitude.to(x.dtype) / norm
        update = (c - 1) * F.linear(x, weight) + c * update
    return update


def merged_weight(
    weight: Float[Tensor, "out_features in_features"],
    modules: Sequence[LoraModule | None],
    fusion_weights: Sequence[float],
) -> Float[Tensor, "out_features in_features"]:
    r"""The explicit $W + \sum_i w_i \Delta W_i$ for constant fusion weights, in float64."""
    wide = weight.double()
    merged = wide.clone()
    for module, fusion_weight in zip(modules, fusion_weights, strict=True):
        if module is None:
            continue
        delta = module.scaling * module.lora_B.double() @ module.lora_A.double()
        if module.magnitude is not None:
            norm = torch.linalg.norm(wide + delta, dim=1)
            delta = (module.magnitude.double() / norm)[:, None] * (wide + delta) - wide
        merged += fusion_weight * delta
    return merged


def reference_gate(
    x: Float[Tensor, "*batch features"],
    weight: Float[Tensor, "adapters features"],
    bias: Float[Tensor, " adapters"],
    temperature: float = 1.0,
) -> Float[Tensor, "*batch adapters"]:
    r"""LoRA-Flow's gate, $\operatorname{softmax}(W x / \tau) + b$."""
    logits = torch.einsum("...d,kd->...k", x.to(weight.dtype), weight) / temperature
    exponentials = torch.exp(logits - logits.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True) + bias

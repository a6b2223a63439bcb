"""The mean weights of a dynamic fusion on examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from loraflow.core.fusion import Fusion
from loraflow.methods import QueryMethod
from loraflow.training.data import IGNORED, Collator, TokenExamples

Weights = dict[str, Float[Tensor, " adapters"]]
"""Constant fusion weights of every fused linear, by site (`layers.3.self_attn.q_proj`); float64, on the CPU."""


def mean_weights(model: Fusion, batches: list[TokenExamples], on_batch: Callable[[int], object]) -> Weights:
    """The mean of a dynamic fusion's weights for every fused linear.

    Methods that weigh tokens: over all tokens of prompts and completions. Methods that weigh whole prompts: over the
    prompts, each counted once. `on_batch` is called after each batch with its size.
    """
    sums: Weights = {}
    count = 0
    for batch in batches:
        tensors = {key: value.to(model.device) for key, value in Collator(0)(batch.rows).items()}
        measure = _sums_of_prompts if isinstance(model.method, QueryMethod) else _sums_of_tokens
        found, counted = measure(model, tensors)
        sums = {name: total + sums.get(name, 0) for name, total in found.items()}
        count += counted
        on_batch(len(batch))
    return {name: total / count for name, total in sums.items()}


def _sums_of_tokens(model: Fusion, batch: Mapping[str, Tensor]) -> tuple[Weights, int]:
    traced = model.trace(batch["input_ids"], batch["attention_mask"], prompt_mask=batch["labels"] == IGNORED)
    real = traced.attention_mask.bool()
    sums = {
        name: traced.module_weights.get(name, traced.weights[:, :, site.layer])[real].double().sum(dim=0)
        for name, site in model.attachment.sites["module"].items()
    }
    return sums, int(real.sum())


def _sums_of_prompts(model: Fusion, batch: Mapping[str, Tensor]) -> tuple[Weights, int]:
    weights = model.weigh(batch["input_ids"], batch["attention_mask"] * (batch["labels"] == IGNORED)).double().cpu()
    sums = {name: weights[:, site.layer].sum(dim=0) for name, site in model.attachment.sites["module"].items()}
    return sums, len(weights)

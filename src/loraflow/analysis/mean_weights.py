"""What a dynamic fusion loses when its weights are fixed: mean weights, and losses with and without the fusion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loraflow.adapters import LoraModule
from loraflow.core.linear import FusedLinear, StackedLora, stack_adapters
from loraflow.methods import QueryMethod
from loraflow.training.data import IGNORED, Collator, TokenExamples
from loraflow.training.loss import mean_loss

if TYPE_CHECKING:
    from loraflow.model import FusedModel

Weights = dict[str, Float[Tensor, " adapters"]]
"""Constant fusion weights of every fused linear, by site (`layers.3.self_attn.q_proj`); float64, on the CPU."""
Advance = Callable[[], object]
"""Called after each batch."""


def split_batches(data: TokenExamples, batch_size: int) -> list[TokenExamples]:
    """The examples in batches of similar length."""
    rows = sorted(data.rows, key=lambda row: len(row.input_ids))
    return [TokenExamples(rows[start : start + batch_size], []) for start in range(0, len(rows), batch_size)]


def mean_weights(model: FusedModel, batches: list[TokenExamples], advance: Advance) -> Weights:
    """The mean of a dynamic fusion's weights for every fused linear.

    Methods that weigh tokens: over all tokens of prompts and completions. Methods that weigh whole prompts: over the
    prompts, each counted once.
    """
    sums: Weights = {}
    count = 0
    for batch in batches:
        tensors = {key: value.to(model.device) for key, value in Collator(0)(batch.rows).items()}
        measure = _sums_of_prompts if isinstance(model.method, QueryMethod) else _sums_of_tokens
        found, counted = measure(model, tensors)
        sums = {name: total + sums.get(name, 0) for name, total in found.items()}
        count += counted
        advance()
    return {name: total / count for name, total in sums.items()}


def _sums_of_tokens(model: FusedModel, batch: Mapping[str, Tensor]) -> tuple[Weights, int]:
    traced = model.trace(batch["input_ids"], batch["attention_mask"])
    real = traced.attention_mask.bool()
    sums = {
        name: traced.module_weights.get(name, traced.weights[:, :, site.layer])[real].double().sum(dim=0)
        for name, site in model.attachment.sites["module"].items()
    }
    return sums, int(real.sum())


def _sums_of_prompts(model: FusedModel, batch: Mapping[str, Tensor]) -> tuple[Weights, int]:
    weights = model.weigh(batch["input_ids"], batch["attention_mask"] * (batch["labels"] == IGNORED)).double().cpu()
    sums = {name: weights[:, site.layer].sum(dim=0) for name, site in model.attachment.sites["module"].items()}
    return sums, len(weights)


def loss_of_batches(model: FusedModel, batches: list[TokenExamples], advance: Advance) -> float:
    """Mean negative log-likelihood of the response tokens, in nats a token."""
    total, tokens = 0.0, 0
    for batch in batches:
        # The first token of a row is predicted from nothing, and not counted.
        count = sum(label != IGNORED for row in batch.rows for label in row.labels[1:])
        total += mean_loss(model, batch, len(batch)) * count
        tokens += count
        advance()
    return total / tokens


@contextlib.contextmanager
def replaced_by(model: FusedModel, modules: Mapping[str, LoraModule]) -> Iterator[None]:
    """Let a fused model answer as its base with one other adapter does, inside a `with` block.

    Args:
        model: the fused model.
        modules: that adapter's updates, by the base's module names; of linears that are fused.
    """
    with model.using("base"), contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            linear = model.base_model.get_submodule(name)
            assert isinstance(linear, FusedLinear)
            hook = _updating(stack_adapters([module], linear, model.dtype), linear.lora_B.device)
            hooks.callback(linear.register_forward_hook(hook).remove)
        yield


def _updating(stack: StackedLora, device: torch.device) -> Callable[..., Tensor]:
    """A forward hook that adds one adapter's update to a linear's output."""
    lora_A, lora_B = stack.lora_A.to(device), stack.lora_B.to(device)
    input_bias = None if stack.input_bias is None else stack.input_bias.to(device)
    scale = None if stack.output_scale is None else stack.output_scale[0].to(device)

    def hook(linear: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        update = F.linear(inputs[0].to(lora_A.dtype), lora_A, input_bias) @ lora_B
        if scale is not None:
            update = update + scale * (output if linear.bias is None else output - linear.bias)
        return output + update.to(output.dtype)

    return hook

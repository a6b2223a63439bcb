"""The loss of a fused model on examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraflow.methods import QueryMethod
from loraflow.training.data import IGNORED, Collator, TokenExamples

if TYPE_CHECKING:
    from loraflow.model import FusedModel


@torch.no_grad()
def mean_loss(model: FusedModel, data: TokenExamples, batch_size: int) -> float:
    """Mean negative log-likelihood of the response tokens, in nats a token.

    Methods that weigh whole prompts read each example's prompt, never its response.
    """
    collate = Collator(0)
    total, tokens = 0.0, 0
    model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data[i].input_ids))
    for start in range(0, len(order), batch_size):
        batch = {
            key: value.to(model.device)
            for key, value in collate([data[i] for i in order[start : start + batch_size]]).items()
        }
        labels = batch.pop("labels")
        if isinstance(model.method, QueryMethod):
            prompts = batch["attention_mask"] * (labels == IGNORED)
            batch["fusion_weights"] = model.weigh(batch["input_ids"], prompts)
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        labels = labels[:, 1:]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        tokens += int((labels != IGNORED).sum())
    return total / tokens

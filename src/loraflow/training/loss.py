"""The loss of a fused model on examples."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraflow.core.fusion import Fusion
from loraflow.methods import QueryMethod
from loraflow.training.data import IGNORED, Collator, TokenExamples


@torch.no_grad()
def mean_loss(
    fusion: Fusion, data: TokenExamples, batch_size: int, on_batch: Callable[[int], object] = lambda count: None
) -> float:
    """Mean negative log-likelihood of the response tokens, in nats a token; modules stay in their modes.

    Methods that weigh whole prompts read each example's prompt, never its response. `on_batch` is called after each
    batch with its size.
    """
    collate = Collator(0)
    total, tokens = 0.0, 0
    order = sorted(range(len(data)), key=lambda i: len(data[i].input_ids))
    with fusion.evaluating():
        for start in range(0, len(order), batch_size):
            rows = collate([data[i] for i in order[start : start + batch_size]])
            batch = {key: value.to(fusion.device) for key, value in rows.items()}
            labels = batch.pop("labels")
            if isinstance(fusion.method, QueryMethod):
                prompts = batch["attention_mask"] * (labels == IGNORED)
                batch["fusion_weights"] = fusion.weigh(batch["input_ids"], prompts)
            logits = fusion(**batch, use_cache=False).logits[:, :-1].float()
            labels = labels[:, 1:]
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            tokens += int((labels != IGNORED).sum())
            on_batch(len(labels))
    return total / tokens

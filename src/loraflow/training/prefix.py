"""The beginning that all rows of a data set share, such as a system prompt: read once in a pass over the data.

Its keys and values are those of any row, as long as nothing learns in between; so only passes that measure have it. It
is tried before it is believed: the loss of two rows is to be the one that they have as a whole.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from loraflow.core.fusion import Fusion
from loraflow.training.data import IGNORED, Collator, TokenExample

# Shorter ones, or those that are a small part of the rows, are not worth a forward of their own.
_SHORTEST, _SHARE = 16, 0.25


@dataclass(frozen=True)
class Prefix:
    """A beginning that was read.

    Attributes:
        length: its tokens.
        cache: what the model keeps of it, for one row.
    """

    length: int
    cache: DynamicCache

    def rest(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """A batch of whole rows as what is left to read of it, behind the cache."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(batch["input_ids"]))
        left = {name: batch[name][:, self.length :] for name in ("input_ids", "labels")}
        return {**left, "attention_mask": batch["attention_mask"], "past_key_values": cache, "use_cache": True}


@torch.no_grad()
def read_prefix(model: Any, rows: Sequence[TokenExample]) -> Prefix | None:
    """Read what all rows begin with; None where that does not pay, or the model cannot go on from it.

    Args:
        model: in evaluation mode; a fusion, or what the trainer takes for one.
        rows: those of a data set.
    """
    length = _common(rows)
    mean = sum(len(row.input_ids) for row in rows) / len(rows)
    reads_prompts = isinstance(model, Fusion) and model.method.reads_prompt
    if len(rows) < 2 or length < max(_SHORTEST, _SHARE * mean) or reads_prompts:
        return None
    ids = torch.tensor([rows[0].input_ids[:length]], device=model.device)
    base = model.base_model if isinstance(model, Fusion) else model.get_base_model()
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    cache = getattr(model(input_ids=ids, use_cache=True, **few), "past_key_values", None)
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    prefix = Prefix(length, cache)
    batch = {name: tensor.to(model.device) for name, tensor in Collator(0)(sorted(rows, key=_size)[:2]).items()}
    whole, found = (model(**inputs).loss for inputs in (batch, prefix.rest(batch)))
    allowed = 16 * torch.finfo(base.dtype).eps * (1 + whole.abs())
    return prefix if (found - whole).abs() <= allowed else None


def _common(rows: Sequence[TokenExample]) -> int:
    """Tokens that all rows begin with; what predicts the first answer is left to each."""
    shortest = min(next((i for i, label in enumerate(row.labels) if label != IGNORED), 0) for row in rows) - 1
    first, length = rows[0].input_ids, 0
    while length < shortest and all(row.input_ids[length] == first[length] for row in rows):
        length += 1
    return length


def _size(row: TokenExample) -> int:
    return len(row.input_ids)

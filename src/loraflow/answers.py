"""Answers to many prompts: batches of similar length, greedy by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraflow.errors import LoraflowError
from loraflow.prompts import Message, PromptFormat


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or an error that says how to give one.

    Raises:
        LoraflowError: if there is none.
    """
    if tokenizer is None:
        raise LoraflowError("Text needs a tokenizer, and the base model came without one. Give it as `tokenizer=`.")
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that rows are padded with: the tokenizer's, else the end token's."""
    chosen = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(chosen or 0)


def generate_answers(
    model: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptFormat,
    max_new_tokens: int,
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> list[str]:
    """Answer conversations with `model.generate`.

    Args:
        model: anything with transformers' `generate`.
        conversations: each ends with the user's turn.
        tokenizer: the model's tokenizer.
        prompt: how a conversation becomes a prompt.
        max_new_tokens: the longest answer, in tokens.
        batch_size: how many are generated together.
        on_batch: called after each batch with its size, for progress bars.
        options: further options of `generate`; sampling is off unless one of them turns it on.

    Returns:
        The answers, in the order of the conversations.
    """
    ids = [prompt.prompt_ids(tokenizer, conversation) for conversation in conversations]
    answers = [""] * len(ids)
    # Rows of similar length waste the least padding.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = _generate(model, [ids[row] for row in rows], tokenizer, max_new_tokens, options)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
        on_batch(len(rows))
    return answers


def pad_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, Int[Tensor, "batch seq"]]:
    """Token ids of prompts as `generate` takes them: `input_ids` and `attention_mask`, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding_id(tokenizer))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.inference_mode()
def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    options: dict[str, Any],
) -> list[str]:
    inputs = pad_prompts(prompts, tokenizer, model.device)
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding_id(tokenizer),
        **{"do_sample": False, **options},
    )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

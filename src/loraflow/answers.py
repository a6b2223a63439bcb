"""Answers to many prompts: batches of similar length, greedy by default."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraflow.endings import Endings, before_first, token_ids
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


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: without special tokens, the token or the text that ended it, and what follows that.
        tokens: how many tokens were generated, the end token included.
        token_ids: those tokens.
    """

    text: str
    tokens: int
    token_ids: Sequence[int] = field(default=(), repr=False, compare=False)


def generate_answers(
    model: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptFormat,
    max_new_tokens: int,
    endings: Endings | None = None,
    batch_size: int = 16,
    stop: Sequence[str] = (),
    on_batch: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> list[Answer]:
    """Answer conversations with `model.generate`.

    Args:
        model: anything with transformers' `generate`.
        conversations: each ends with the user's turn.
        tokenizer: the model's tokenizer.
        prompt: how a conversation becomes a prompt.
        max_new_tokens: the longest answer, in tokens.
        endings: what ends an answer; by default what the prompt, the tokenizer and the model's configuration say.
        batch_size: how many are generated together.
        stop: an answer ends before the first of these strings too.
        on_batch: called after each batch with its size, for progress bars.
        options: further options of `generate`, but no configuration; sampling is off unless one of them turns it on.

    Returns:
        The answers, in the order of the conversations.
    """
    ids = [prompt.prompt_ids(tokenizer, conversation) for conversation in conversations]
    endings = endings or Endings.find(prompt, tokenizer, model.generation_config)
    endings = endings.and_stop(stop, tokenizer)
    options, _ = endings.options(options, None, model.generation_config, tokenizer)
    ends = token_ids(options.get("eos_token_id", model.generation_config.eos_token_id))
    texts = options.get("stop_strings") or ()
    texts = [texts] if isinstance(texts, str) else texts
    answers: list[Answer | None] = [None] * len(ids)
    # Rows of similar length waste the least padding.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        generated = _generate(model, [ids[row] for row in rows], tokenizer, max_new_tokens, ends, options)
        for row, tokens in zip(rows, generated, strict=True):
            ended = bool(tokens) and tokens[-1] in ends
            # The end token is no part of the text, whether or not the tokenizer calls it special.
            text = str(tokenizer.decode(tokens[: len(tokens) - ended], skip_special_tokens=True))
            kept = before_first(text, texts)
            # A row that a stop string ended is padded, maybe with the end token, which it has not generated then.
            padded = kept != text and tokens[-1] == padding_id(tokenizer)
            generated_ids = tokens[: len(tokens) - padded]
            answers[row] = Answer(kept, len(generated_ids), generated_ids)
        on_batch(len(rows))
    return cast(list[Answer], answers)


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
    ends: Collection[int],
    options: dict[str, Any],
) -> list[list[int]]:
    """The generated token ids of each prompt, up to and with its end token."""
    inputs = pad_prompts(prompts, tokenizer, model.device)
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding_id(tokenizer),
        **{"do_sample": False, **options},
    )
    padding = padding_id(tokenizer)
    answers = []
    for ids in out[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        while end and ids[end - 1] == padding and padding not in ends:
            end -= 1
        answers.append(ids[:end])
    return answers

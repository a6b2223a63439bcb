"""Examples as token ids, with the loss on the response only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from loraflow.answers import require_tokenizer
from loraflow.errors import DataError
from loraflow.examples import Example, check_rows, parse_examples
from loraflow.prompts import PromptFormat
from loraflow.training.config import FitConfig
from loraflow.training.turns import earlier_turns

IGNORED = -100


@dataclass(frozen=True)
class TokenExample:
    """Prompt and completion in one row; `labels` are the ids of the completion, and ignored elsewhere."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TokenExamples(Dataset):
    """A data set of token examples, and the origins of those that had to be cut."""

    rows: list[TokenExample]
    truncated: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenExample:
        return self.rows[index]


def longest_example(model: Any) -> int:
    """How many tokens of an example are read where nothing else is said: what the model takes, at most 2048."""
    return min(2048, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptFormat,
    max_length: int,
    train_on: str = "last",
) -> TokenExamples:
    """Turn examples into token ids; one that is too long loses the end of its completion, and is reported.

    Args:
        examples: what is turned.
        tokenizer: the model's.
        prompt: how conversations become prompts.
        max_length: how many tokens of an example are kept.
        train_on: whose ids are labels too: those of the completion, the "last" turn, or of "all" the assistant's turns.

    Raises:
        DataError: if an example's prompt alone leaves no room for its completion, or the chat template refuses it; the
            message names the first such example.
    """
    truncated = []

    def row(example: Example, _: str) -> TokenExample:
        try:
            prompt_ids = prompt.prompt_ids(tokenizer, example.messages)
            completion_ids = prompt.completion_ids(tokenizer, example.messages, example.completion)
            learned = earlier_turns(prompt, tokenizer, example.messages) if train_on == "all" else []
        except DataError as error:
            raise DataError(f"{example.origin}: {error}") from error
        if len(prompt_ids) >= max_length:
            raise DataError(
                f"{example.origin}: the prompt has {len(prompt_ids)} tokens, which leaves none of the {max_length} "
                "(`max_length`) for the completion. Shorten it, or raise the limit."
            )
        if len(prompt_ids) + len(completion_ids) > max_length:
            truncated.append(example.origin)
        ids = (prompt_ids + completion_ids)[:max_length]
        labels = [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]
        for place in learned:
            labels[place] = ids[place]
        return TokenExample(ids, labels)

    return TokenExamples(check_rows(((example.origin, example) for example in examples), row), truncated)


@dataclass(frozen=True)
class FitData:
    """The examples of a fit.

    Attributes:
        train: training examples as token ids.
        dev: dev examples as token ids, where there are some.
        dev_examples: the same as they were given.
        digest: SHA-256 of all token ids.
        origins: where each training example comes from.
    """

    train: TokenExamples
    dev: TokenExamples | None
    dev_examples: Sequence[Example]
    digest: str
    origins: Sequence[str] = ()


def note_endings(fusion: Any, examples: Sequence[Example]) -> None:
    """Let a fusion's answers end as its prompt format ends the answers of examples, whatever it does otherwise."""
    tokenizer = require_tokenizer(fusion.tokenizer)
    for example in examples:
        found = fusion.endings.and_turn_end(fusion.prompt, tokenizer, example.messages)
        fusion.endings = found or fusion.endings


def prepare(model: Any, examples: Any, dev: Any, config: FitConfig) -> FitData:
    """Check examples and turn them into token ids, by the tokenizer and in the prompt format of a model."""
    tokenizer = require_tokenizer(model.tokenizer)
    max_length = config.max_length or longest_example(model)
    parsed = parse_examples(examples)
    train = tokenize(parsed, tokenizer, model.prompt, max_length, config.train_on)
    dev_examples = parse_examples(dev) if dev is not None else []
    dev_rows = tokenize(dev_examples, tokenizer, model.prompt, max_length, config.train_on) if dev_examples else None
    rows = [[dataclasses.astuple(row) for row in split.rows] for split in (train, dev_rows) if split is not None]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return FitData(train, dev_rows, dev_examples, digest, [example.origin for example in parsed])


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right."""

    pad_token_id: int

    def __call__(self, rows: Sequence[TokenExample]) -> dict[str, Tensor]:
        """A batch of `input_ids`, `attention_mask` and `labels`, each `[batch, seq]`."""
        width = max(len(row.input_ids) for row in rows)

        def pad(values: list[int], fill: int) -> list[int]:
            return values + [fill] * (width - len(values))

        return {
            "input_ids": torch.tensor([pad(row.input_ids, self.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([pad([1] * len(row.input_ids), 0) for row in rows]),
            "labels": torch.tensor([pad(row.labels, IGNORED) for row in rows]),
        }


def split_batches(data: TokenExamples, batch_size: int) -> list[TokenExamples]:
    """The examples in batches of similar length."""
    rows = sorted(data.rows, key=lambda row: len(row.input_ids))
    return [TokenExamples(rows[start : start + batch_size], []) for start in range(0, len(rows), batch_size)]

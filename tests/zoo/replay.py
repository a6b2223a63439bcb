"""One text read by a model in two ways: all of it at once, or token by token as `generate` does with its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from loraflow import FusedModel
from tests.zoo.bases import FIRST_WORD, VOCAB, Base

LENGTH, PROMPT = 7, 4
"""How many words a text has, and how many of them are there before generation."""


def random_words(batch: int, seed: int = 3) -> Tensor:
    """Token ids that stand for nothing special, `[batch, LENGTH]`."""
    return torch.randint(FIRST_WORD, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, eq=False)
class Reader:
    """Hands words to a model, after what stands before them in every row.

    Attributes:
        prefix: token ids before the words, such as those of an image.
        inputs: what the model is given beside token ids, for one row.
        types: its name for what tells the image's tokens from others, where it takes that.
        image: the token id of an image's parts.
    """

    prefix: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    types: str | None = None
    image: int | None = None

    @torch.no_grad()
    def at_once(self, model: Any, words: Tensor, **kwargs: Any) -> Tensor:
        """Logits at every word in one forward without a cache, `[batch, LENGTH, vocabulary]`."""
        ids = self._ids(words)
        return model(input_ids=ids, use_cache=False, **self._inputs(ids), **kwargs).logits[:, -LENGTH:]

    @torch.no_grad()
    def step_by_step(self, model: Any, words: Tensor, prompt: int = PROMPT, padding: int = 0, **kwargs: Any) -> Tensor:
        """Logits from the last word of the prompt to the last word but one, as `generate` finds them.

        Args:
            model: a base or a fusion.
            words: the text, `[batch, LENGTH]`.
            prompt: how many words there are before generation.
            padding: positions before the first row's text that hold words, and padding before all other rows' texts.
            kwargs: the model's.
        """
        ids, mask = self._padded(words, padding)
        steps, found = LENGTH - prompt, []
        # What `generate` itself returns is rounded to float32.
        inner = model.base_model if isinstance(model, FusedModel) else model
        handle = inner.register_forward_hook(lambda _, __, output: found.append(output.logits[:, -1]))
        try:
            model.generate(
                ids[:, :-steps],
                attention_mask=mask[:, :-steps],
                max_new_tokens=steps,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                logits_processor=LogitsProcessorList([_Dictated(ids)]),
                **self._inputs(ids[:, :-steps]),
                **kwargs,
            )
        finally:
            handle.remove()
        return torch.stack(found[-steps:], dim=1)

    def alone(self, words: Tensor, padding: int) -> list[Tensor]:
        """The rows of a batch that `step_by_step` pads so, each as a batch of its own without padding."""
        ids, mask = self._padded(words, padding)
        return [row[None, kept.bool()] for row, kept in zip(ids, mask, strict=True)]

    @torch.no_grad()
    def whole(self, model: Any, ids: Tensor) -> Tensor:
        """`at_once` for one row of `alone`."""
        return model(input_ids=ids, use_cache=False, **self._inputs(ids)).logits[:, -LENGTH:]

    def _ids(self, words: Tensor) -> Tensor:
        return torch.cat([self.prefix.expand(len(words), -1), words], dim=1)

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        inputs = {name: torch.cat([value] * len(ids)) for name, value in self.inputs.items()}
        return inputs if self.types is None else {**inputs, self.types: (ids == self.image).long()}

    def _padded(self, words: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        before = torch.zeros(len(words), padding, dtype=torch.long)
        before[0] = FIRST_WORD + 1
        ids = torch.cat([before, self._ids(words)], dim=1)
        mask = torch.ones_like(ids)
        mask[1:, :padding] = 0
        return ids, mask


@dataclass(frozen=True)
class Abilities:
    """What a base does by itself.

    Attributes:
        batches: whether rows of a batch leave one another alone.
        caches: whether its answer with a cache is that without.
        steps: whether that is so from the first token on.
        pads: whether padding on the left changes nothing.
    """

    batches: bool
    caches: bool
    steps: bool
    pads: bool

    @classmethod
    @functools.cache
    def of(cls, base: Base, reader: Reader) -> Abilities:
        """Try them; an error means no."""
        words = random_words(2)
        expected = reader.at_once(base.model, words)

        def agrees(answer: Callable[[], Tensor], wanted: Tensor) -> bool:
            try:
                found = answer()
            except Exception:
                return False
            return bool(torch.allclose(found, wanted, atol=1e-5 if base.precise else 1e-4, rtol=0))

        asked = expected[:, PROMPT - 1 : -1]
        batches = agrees(lambda: torch.cat([reader.at_once(base.model, row[None]) for row in words]), expected)
        caches = agrees(lambda: reader.step_by_step(base.model, words), asked)
        steps = not len(reader.prefix) and agrees(
            lambda: reader.step_by_step(base.model, words[:1], 1), expected[:1, :-1]
        )
        # The row with words in place of padding is longer than any other text here.
        rows = [reader.whole(base.model, row) for row in reader.alone(words, 2)]
        padded = torch.cat(rows)[:, PROMPT - 1 : -1]
        pads = caches and agrees(lambda: reader.step_by_step(base.model, words, padding=2), padded)
        return cls(batches, caches, steps, pads)


class _Dictated(LogitsProcessor):
    """Lets generation go on with given tokens, whatever the model says."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Only the next dictated token is possible."""
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, self.ids[:, input_ids.shape[1], None], 0.0)

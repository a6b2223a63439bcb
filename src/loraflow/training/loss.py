"""How good a model is on examples: its loss, and scores of what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from loraflow.answers import generate_answers, require_tokenizer
from loraflow.core.fusion import Fusion
from loraflow.errors import DataError
from loraflow.examples import Example
from loraflow.methods import QueryMethod
from loraflow.training.config import Score
from loraflow.training.data import IGNORED, Collator, TokenExamples, split_batches
from loraflow.training.processes import ALONE, Processes


@torch.no_grad()
def mean_loss(
    fusion: Fusion,
    data: TokenExamples,
    batch_size: int,
    on_batch: Callable[[int], object] = lambda count: None,
    processes: Processes = ALONE,
) -> float:
    """Mean negative log-likelihood of the response tokens, in nats a token; modules stay in their modes.

    Methods that weigh whole prompts read each example's prompt, never its response. `on_batch` is called after each
    batch with its size. Several `processes` share the batches, and have the same mean.
    """
    collate = Collator(0)

    def sums(of_similar_length: TokenExamples) -> tuple[float, int]:
        batch = {key: value.to(fusion.device) for key, value in collate(of_similar_length.rows).items()}
        labels = batch.pop("labels")
        if isinstance(fusion.method, QueryMethod):
            prompts = batch["attention_mask"] * (labels == IGNORED)
            batch["fusion_weights"] = fusion.weigh(batch["input_ids"], prompts)
        logits = fusion(**batch, use_cache=False).logits[:, :-1].float()
        labels = labels[:, 1:]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        on_batch(len(labels))
        return total, int((labels != IGNORED).sum())

    with fusion.evaluating():
        totals, tokens = zip(*processes.each(split_batches(data, batch_size), sums), strict=True)
    return sum(totals) / sum(tokens)


def mean_score(
    model: Any, examples: Sequence[Example], max_new_tokens: int, score: Score, processes: Processes = ALONE
) -> float:
    """Mean score of a model's answers to examples, which several processes share."""
    own = examples[processes.rank :: processes.count]
    answers = generate_answers(
        model,
        [example.messages for example in own],
        tokenizer=require_tokenizer(model.tokenizer),
        prompt=model.prompt,
        max_new_tokens=max_new_tokens,
        endings=model.endings,
    )
    scores = [score(answer.text, _scored(example)) for answer, example in zip(answers, own, strict=True)]
    total, count = processes.total(sum(scores), len(scores))
    return total / count


def check_score(score: Score | None, examples: Sequence[Example]) -> None:
    """Check before anything is trained that the dev examples have what their scorer reads.

    A scorer with a method `check`, of the record, checks each of them; any other scores an empty answer to the first.

    Raises:
        DataError: if one has not; the message names it.
    """
    if score is None:
        return
    check = getattr(score, "check", None)
    for example in examples if check is not None else examples[:1]:
        try:
            check(_scored(example)) if check is not None else score("", _scored(example))
        except DataError as error:
            raise DataError(f"{example.origin}: {error}") from error


def _scored(example: Example) -> dict[str, Any]:
    # Wherever the completion came from, scorers find it under one name.
    return {**example.record, "completion": example.completion}

"""Scores of generated answers to dev examples, where they decide between checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loraflow.answers import generate_answers, require_tokenizer
from loraflow.errors import DataError
from loraflow.examples import Example
from loraflow.training.config import Score


def make_scorer(model: Any, examples: Sequence[Example], max_new_tokens: int, score: Score) -> Callable[[], float]:
    """What scores a model's answers to the dev examples, as they are when it is called."""

    def mean_score() -> float:
        answers = generate_answers(
            model,
            [example.messages for example in examples],
            tokenizer=require_tokenizer(model.tokenizer),
            prompt=model.prompt,
            max_new_tokens=max_new_tokens,
        )
        scores = [score(answer.text, record) for answer, record in zip(answers, records, strict=True)]
        return sum(scores) / len(scores)

    records = [_scored(example) for example in examples]
    return mean_score


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

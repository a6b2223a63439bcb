"""How good a model is on examples: its loss, and scores of what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraflow.answers import generate_answers, require_tokenizer
from loraflow.core.fusion import Fusion
from loraflow.core.head import IGNORED, call_with_labels
from loraflow.errors import DataError
from loraflow.examples import Example
from loraflow.methods import QueryMethod
from loraflow.training.config import Score
from loraflow.training.data import Collator, TokenExamples, split_batches
from loraflow.training.prefix import read_prefix
from loraflow.training.processes import ALONE, Processes


def answer_loss(
    model: Any,
    *,
    input_ids: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch positions"] | None = None,
    **kwargs: Any,
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the labels, in nats a token, without the logits of all positions.

    It is the loss of the model's own forward, its gradients too, at the cost of a head that reads the answers only
    (`core/head.py` says how, and which models have to compute all logits all the same). Methods that read whole
    prompts read what has no label; while their gates learn, these do without.

    Args:
        model: a `FusedModel`, a transformers model, or one of PEFT's.
        input_ids: the rows, prompts and answers.
        labels: the ids of the answers, and -100 elsewhere.
        attention_mask: 1 at real tokens, 0 at padding, of cached positions too; by default all are real.
        kwargs: anything else for the model's forward, such as `num_items_in_batch`, which the sum is divided by then.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if isinstance(model, Fusion) and isinstance(model.method, QueryMethod) and kwargs.get("fusion_weights") is None:
        kwargs["fusion_weights"] = model.weigh(input_ids, mask * (labels == IGNORED))
    elif isinstance(model, Fusion) and model.method.reads_prompt and not model.training:
        kwargs["prompt_mask"] = mask * (labels == IGNORED)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "use_cache": False, **kwargs}
    return (model(**inputs) if isinstance(model, Fusion) else labelled_forward(model, **inputs)).loss


def labelled_forward(model: nn.Module, **kwargs: Any) -> Any:
    """The forward of a transformers model, or of one of PEFT's, whose head reads the answers only."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return call_with_labels(model, cast(PreTrainedModel, base), (), kwargs)


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
    batch with its size. Several `processes` share the batches, and have the same mean. What all rows begin with is read
    once.
    """
    collate = Collator(0)

    def sums(of_similar_length: TokenExamples) -> tuple[float, int]:
        batch = {key: value.to(fusion.device) for key, value in collate(of_similar_length.rows).items()}
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total = count * answer_loss(fusion, **(batch if prefix is None else prefix.rest(batch))).item()
        on_batch(len(of_similar_length))
        return total, count

    with fusion.evaluating():
        prefix = None if processes.sharded else read_prefix(fusion, data.rows)
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

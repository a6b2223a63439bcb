"""Answering one task with one model: answers, scores, time, memory, and the fusion weights on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.answers import generate_answers
from loraflow.core.fusion import Fusion
from loraflow.errors import DataError
from loraflow.evaluation.compare.store import Item
from loraflow.evaluation.compare.tasks import HarnessTask, Task
from loraflow.evaluation.harness.evaluate import HarnessItem, HarnessResult, evaluate_task, rescore_task
from loraflow.evaluation.harness.models import Progress

# Answers of a cell whose mean fusion weights are recorded: each costs one more forward.
WEIGHED_ANSWERS = 64


Measured = tuple[list[Item], dict[str, Any]]
"""A task's problems, answered, and what a `Record` says of that."""


def answer_task(
    model: Fusion, task: Task, *, limit: int | None, batch_size: int, allow_code: bool, progress: Progress
) -> Measured:
    """Answer a task's problems greedily with a model as it is, and score the answers.

    Args:
        model: the fused model.
        task: the task.
        limit: only the first so many problems.
        batch_size: problems answered together.
        allow_code: whether a task of lm-evaluation-harness may run what the model wrote, in the sandbox.
        progress: called after each batch with how many are answered, and how many there are.
    """
    if task.harness is not None:
        return _answer_harness(model, task.harness, limit, batch_size, allow_code, progress)
    problems, answered = task.test[:limit], 0

    def advance(count: int) -> None:
        nonlocal answered
        answered += count
        progress(answered, len(problems))

    tokenizer = model.tokenizer
    assert tokenizer is not None
    with _peak_memory(model.device) as peak:
        started = time.perf_counter()
        answers = generate_answers(
            model,
            [problem.messages for problem in problems],
            tokenizer=tokenizer,
            prompt=model.prompt,
            max_new_tokens=task.max_new_tokens,
            endings=model.endings,
            batch_size=batch_size,
            on_batch=advance,
        )
        seconds = time.perf_counter() - started
    scores = task.score([answer.text for answer in answers])
    items = [
        Item(
            id=problem.origin.rpartition("/")[2],
            prompt=str(tokenizer.decode(model.prompt.prompt_ids(tokenizer, problem.messages))),
            answer=answer.text,
            scores=of_answer,
            tokens=answer.tokens,
            reference=problem.completion,
        )
        for problem, answer, of_answer in zip(problems, answers, scores, strict=True)
    ]
    tokens = sum(answer.tokens for answer in answers)
    return items, {"metric": task.metric, "answer_s": seconds, "tokens": tokens, "memory_mib": peak()}


def _answer_harness(
    model: Fusion, task: HarnessTask, limit: int | None, batch_size: int, allow_code: bool, progress: Progress
) -> Measured:
    """Answer a task of lm-evaluation-harness.

    Raises:
        DataError: if the metric that decides has no score for single problems.
    """
    with _peak_memory(model.device) as peak:
        started = time.perf_counter()
        result = evaluate_task(
            model,
            task.name,
            limit=limit,
            batch_size=batch_size,
            allow_code=allow_code,
            include_path=task.folder,
            num_fewshot=task.num_fewshot,
            chat=task.chat,
            metric=task.metric,
            on_progress=progress,
        )
        seconds = time.perf_counter() - started
    if any(result.metric not in item.scores for item in result.items):
        known = sorted(set.intersection(*(set(item.scores) for item in result.items)))
        raise DataError(
            f"The metric {result.metric!r} of {task.name!r} has no score for single problems, which intervals need. "
            f"Give `metric`, one of {', '.join(map(repr, known)) or 'none'}."
        )
    items = [
        Item(item.id, item.prompt, item.responses, item.scores, item.tokens, item.target, item.digest)
        for item in result.items
    ]
    counts = [item.tokens for item in items]
    tokens = None if None in counts else sum(count or 0 for count in counts)
    facts = {name: getattr(result, name) for name in ("metric", "higher_is_better", "notice")}
    return items, {**facts, "answer_s": seconds, "tokens": tokens, "memory_mib": peak()}


def score_again(task: Task, items: Sequence[Item], metric: str, *, allow_code: bool = False) -> list[Item]:
    """Kept answers with new scores; needs no model.

    Raises:
        DataError: if there are more answers than problems.
    """
    if task.harness is None:
        if len(items) > len(task.test):
            raise DataError(f"There are {len(items)} answers to {task.name!r}, which has {len(task.test)} problems.")
        scores = task.score([item.answer for item in items])
        return [dataclasses.replace(item, scores=new) for item, new in zip(items, scores, strict=True)]
    stored = HarnessResult(
        task=task.harness.name,
        metric=metric,
        higher_is_better=True,
        items=[HarnessItem(i.id, i.prompt, i.answer, i.reference, dict(i.scores), i.tokens, i.digest) for i in items],
        aggregate={},
    )
    new = rescore_task(stored, allow_code=allow_code, include_path=task.harness.folder)
    return [dataclasses.replace(item, scores=other.scores) for item, other in zip(items, new.items, strict=True)]


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Gives what tells the most memory in use inside the block, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 2**20
        return
    process, most, ended = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], process.memory_info().rss)
            ended.wait(0.1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: most[0] / 2**20
    finally:
        ended.set()
        watcher.join()


def weigh_answers(model: Fusion, task: Task, items: Sequence[Item]) -> dict[str, Any]:
    """The mean fusion weight of each adapter over answers' tokens and layers, how answers differ in it, and in which
    answers which adapter has the most.

    Args:
        model: the fused model that gave the answers.
        task: the task that was answered.
        items: its answers; the first 64 count.

    Returns:
        What a `Record` has of it: `weights` and `chosen`, both empty for the base or one adapter alone, and for tasks
        of lm-evaluation-harness.
    """
    if not model.gates or len(model.adapters) == 1 or task.harness is not None:
        return {"weights": {}, "chosen": []}
    tokenizer = model.tokenizer
    assert tokenizer is not None
    found: list[Tensor | None] = []
    for problem, item in zip(task.test, items[:WEIGHED_ANSWERS], strict=False):
        prompt = model.prompt.prompt_ids(tokenizer, problem.messages)
        answer = tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        trace = model.trace(ids, prompt_length=len(prompt)) if answer else None
        found.append(None if trace is None else trace.token_weights()[len(prompt) :].mean(dim=0).double())
    names = model.adapter_names
    chosen = [None if mean is None else _largest(mean, names) for mean in found]
    # An answer without a token has no weights; which adapter it chose is not known.
    weighed = [mean for mean in found if mean is not None]
    if not weighed:
        return {"weights": {}, "chosen": chosen}
    means = torch.stack(weighed)
    spread = means.std(dim=0, unbiased=False)
    weights = {name: (float(means[:, i].mean()), float(spread[i])) for i, name in enumerate(names)}
    return {"weights": weights, "chosen": chosen}


def _largest(weights: Float[Tensor, " adapters"], names: Sequence[str]) -> str | None:
    """The adapter with the largest weight, unless another one's is the same but for rounding."""
    most, at = weights.max(dim=0)
    alone = (weights > most - 1e-6 * most.abs()).sum() == 1
    return names[int(at)] if alone else None

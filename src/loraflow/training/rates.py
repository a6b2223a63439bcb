"""Which learning rate to take: a range test, on a copy of the gates.

The rate rises by the same factor at every step, from far too low to far too high, and the loss of each step is noted
([Smith 2017, section 3.3](https://arxiv.org/abs/1506.01186)). The suggestion is a tenth of the rate at which the
smoothed loss is lowest: there it is about to rise, and a tenth of that is where it still falls.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from transformers import set_seed

from loraflow.answers import padding_id, require_tokenizer
from loraflow.core.fusion import Fusion
from loraflow.errors import LoraflowError, MethodError
from loraflow.training.batches import Packed
from loraflow.training.capacity import settle
from loraflow.training.config import FitConfig
from loraflow.training.data import IGNORED, Collator, TokenExample, prepare
from loraflow.training.guard import FACTOR
from loraflow.training.learners import learner_of
from loraflow.training.learners.base import Examples
from loraflow.training.learners.gradient import set_start
from loraflow.training.progress import counting_progress
from loraflow.training.trainer import as_it_was

LOWEST, HIGHEST = 1e-6, 10.0
STEPS = 70
"""Ten for each power of ten."""
SMOOTHING = 0.8
"""What a step's smoothed loss keeps of the one before."""
SHARE = 0.1
"""The suggestion, of the rate at which the smoothed loss is lowest."""


@dataclass(frozen=True)
class RateTest:
    """What a range test has found.

    Attributes:
        rates: the learning rate of each step.
        losses: the loss before each step, in nats for each response token.
        smoothed: the same, as an exponential mean without its bias to the first.
        suggestion: the rate to take.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float


def find_learning_rate(
    model: Fusion, examples: Examples, *, config: FitConfig | None = None, console: Console | None = None
) -> RateTest:
    """Try learning rates on examples; the model's gates are afterwards as they were.

    Args:
        model: the fused model, with a method that learns by gradient.
        examples: training examples of the task.
        config: the recipe that the rate is for; its own rate is not looked at.
        console: where progress is shown; standard error by default.

    Raises:
        LoraflowError: if there is no rate at which the loss falls.
        MethodError: if the method does not learn by gradient on examples of a task.
    """
    model.attachment.check_attached()
    learner = learner_of(model.method)
    if not learner.has_grid:
        raise MethodError(
            f"The method {model.method.name!r} does not learn by gradient on examples of a task, and has no learning "
            "rate to find. Fit it as it is."
        )
    learner.check_method(model)
    config = config or FitConfig.for_method(model.method)
    data = prepare(model, learner.check_examples(model, examples, None), None, config)
    config = settle(model, data.train, config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with model.learning(), as_it_was(model):
        try:
            set_start(model, data.train, config)
            losses = _losses(model, data.train.rows, config, console or Console(stderr=True))
        finally:
            model.set_method(model.method)
            model.load_state_dict(before)
    rates = [_rate(step) for step in range(len(losses))]
    smoothed = _smoothed(losses)
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    if lowest == 0:
        raise LoraflowError(
            f"No learning rate from {LOWEST:g} to {rates[-1]:g} lowers the loss (={losses[0]:.4g} at the start). Look "
            "at the examples, or give more."
        )
    return RateTest(rates, losses, smoothed, float(f"{SHARE * rates[lowest]:.1g}"))


def _rate(step: int) -> float:
    return LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))


def _losses(model: Fusion, rows: Sequence[Any], config: FitConfig, console: Console) -> list[float]:
    """The loss before each step, until it has exploded."""
    set_seed(config.seed)
    collate = Packed() if config.packing else Collator(padding_id(require_tokenizer(model.tokenizer)))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, betas=config.betas, eps=config.epsilon, weight_decay=config.weight_decay)
    order: list[int] = []
    losses: list[float] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.attachment.dropping(config.adapter_dropout))
        progress = stack.enter_context(counting_progress(console))
        if not console.is_terminal:
            console.print(f"trying learning rates, in {STEPS} steps at most")
        bar = progress.add_task("trying learning rates", total=STEPS)
        model.train()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        for step in range(STEPS):
            if len(order) < config.batch_size:
                order += torch.randperm(len(rows)).tolist()
            chosen, order = order[: config.batch_size], order[config.batch_size :]
            optimizer.zero_grad()
            loss = _backward(model, [rows[i] for i in chosen], collate, config.forward_size)
            if not math.isfinite(loss):
                break
            losses.append(loss)
            if _smoothed(losses)[-1] > FACTOR * losses[0]:
                break
            for group in optimizer.param_groups:
                group["lr"] = _rate(step)
            if config.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
            optimizer.step()
            progress.advance(bar)
    return losses


def _backward(model: Fusion, rows: Sequence[TokenExample], collate: Any, size: int) -> float:
    """The mean loss of a step's response tokens, and its gradient, by forwards of so many rows."""
    total = 0.0
    answers = sum(label != IGNORED for row in rows for label in row.labels[1:])
    for start in range(0, len(rows), size):
        batch = send_to_device(dict(collate(rows[start : start + size])), model.device)
        own = int((batch["labels"][:, 1:] != IGNORED).sum())
        loss = model(**{"use_cache": False, **batch}).loss * (own / answers)
        loss.backward()
        total += loss.item()
    return total


def _smoothed(losses: Sequence[float]) -> list[float]:
    mean, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**count))
    return smoothed

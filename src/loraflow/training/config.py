"""The recipe of a fit, what a new adapter is like, and what came out. Light: command lines read defaults here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from loraflow.training.processes import Processes

Score = Callable[[str, Mapping[str, Any]], float]
"""Scores a generated answer against its example's record."""

# The paper gives no learning rate for its fine-tuned baselines. A gate's 1e-3 is too high for a whole LoRA of a large
# model; QLoRA's 2e-4 (arXiv 2305.14314) is what LoRAs of 7B models are usually trained with.
LEARNING_RATE = 2e-4


class HasRecipe(Protocol):
    """A method, as far as its recipe goes."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Fields of `FitConfig` that its own source changes."""


@dataclass(frozen=True)
class FitConfig:
    """How gates are learned; the defaults are LoRA-Flow's recipe (section 5.1 of the paper, and the official code).

    Attributes:
        epochs: passes over the examples.
        max_steps: go on for so many steps, whatever `epochs` says; None goes by `epochs`.
        learning_rate: the peak of the schedule.
        batch_size: examples in a step, of all processes together.
        gradient_accumulation: forwards and backwards in a step; they share its `batch_size` examples evenly.
        betas: AdamW's.
        epsilon: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm; 0 clips nothing.
        warmup: share of the steps over which the learning rate rises; it falls along a cosine after that.
        adapter_dropout: dropout on the adapters' input. Off here; the official code appears to leave 0.1 on.
        gradient_checkpointing: recompute activations in the backward, to save memory.
        max_length: longest example, in tokens; None takes the model's limit, at most 2048.
        seed: of the examples' order, and of dropout.
        checkpoint_steps: steps between checkpoints; None makes one after every epoch.
        score_max_new_tokens: longest answer when dev examples are scored by generation.
    """

    epochs: int = 5
    max_steps: int | None = None
    learning_rate: float = 1e-3
    batch_size: int = 4
    gradient_accumulation: int = 1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-5
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    warmup: float = 0.2
    adapter_dropout: float = 0.0
    gradient_checkpointing: bool = False
    max_length: int | None = None
    seed: int = 0
    checkpoint_steps: int | None = None
    score_max_new_tokens: int = 512

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "gradient_accumulation", "learning_rate", "epsilon", "score_max_new_tokens")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be greater than 0, and finite.")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be at least 0, and finite.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise LoraflowError(f"`betas` (={self.betas}) must be two numbers, each at least 0 and less than 1.")
        for name in ("adapter_dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be at least 0 and less than 1.")
        for name in ("max_length", "max_steps", "checkpoint_steps"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) < math.inf:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be at least 1, and finite.")
        if self.batch_size % self.gradient_accumulation:
            raise LoraflowError(
                f"`gradient_accumulation` (={self.gradient_accumulation}) must divide "
                f"`batch_size` (={self.batch_size})."
            )

    @classmethod
    def for_method(cls, method: HasRecipe, **settings: Any) -> FitConfig:
        """The recipe of a method: the paper's, with what the method's own source changes, and then these settings."""
        return cls(**{**method.recipe, **settings})


def search_grid(method: HasRecipe) -> list[dict[str, Any]]:
    """The grid that the paper chooses from on its dev sets, at the method's own learning rate and a tenth of it."""
    rate = FitConfig.for_method(method).learning_rate
    return [{"learning_rate": lr, "batch_size": batch} for lr in (rate, rate / 10) for batch in (2, 4, 8)]


def _alone() -> Processes:
    from loraflow.training.processes import ALONE

    return ALONE


@dataclass(frozen=True)
class Run:
    """How one fit is run.

    Attributes:
        config: the recipe.
        directory: where its checkpoints are.
        resume: whether it goes on from what is there.
        console: where progress is shown.
        score: what decides on dev examples instead of their loss.
        label: what it is called where progress is shown; empty for the learner's own words.
        processes: those that run it together.
    """

    config: FitConfig
    directory: Path
    resume: bool
    console: Console
    score: Score | None = None
    label: str = ""
    processes: Processes = field(default_factory=_alone)


@dataclass(frozen=True)
class LoraSettings:
    """A new LoRA; the defaults are those of the paper's adapters.

    Attributes:
        r: rank.
        alpha: the updates are multiplied by alpha / r.
        dropout: on its input while it is trained.
        target_modules: names of the linear modules that it adapts, or "all-linear".
    """

    r: int = 64
    alpha: float = 16
    dropout: float = 0.1
    target_modules: str | Sequence[str] = "all-linear"

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise LoraflowError(f"`r` (={self.r!r}) must be a whole number of at least 1.")
        if not 0 < self.alpha < math.inf:
            raise LoraflowError(f"`alpha` (={self.alpha!r}) must be greater than 0, and finite.")
        if not 0 <= self.dropout < 1:
            raise LoraflowError(f"`dropout` (={self.dropout!r}) must be at least 0 and less than 1.")
        if not self.target_modules:
            raise LoraflowError('`target_modules` names no module. Give names, or "all-linear".')


@dataclass(frozen=True)
class FitResult:
    """What a fit did.

    Attributes:
        start: the fusion weights at which training started, by adapter; empty where gates start as made.
        start_losses: each adapter's loss alone on the examples, where the start was chosen by it.
        steps: optimiser steps, or evaluations of a search, of the whole run, those before a resume included.
        train_loss: mean loss of the last epoch's steps, or that of a search's result, in nats for each response token;
            None where there was none.
        dev_loss: loss on the dev examples at the kept checkpoint.
        dev_score: score on the dev examples at the kept checkpoint, where they were scored.
        kept_step: the step whose gates were kept.
        seconds: wall-clock time of this call.
        truncated: origins of the examples that were cut to `max_length`.
        log: every logged loss, as (step, loss).
        search: dev results by setting, where a grid was searched.
    """

    start: Mapping[str, float] = field(default_factory=dict)
    start_losses: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    train_loss: float | None = None
    dev_loss: float | None = None
    dev_score: float | None = None
    kept_step: int = 0
    seconds: float = 0.0
    truncated: list[str] = field(default_factory=list)
    log: list[tuple[int, float]] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)

"""The recipe of a fit, what a new adapter is like, and what came out. Light: command lines read defaults here."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rich.console import Console

from loraflow.errors import LoraflowError, did_you_mean
from loraflow.training.recipes import SCHEDULES, TRACKERS, read_recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from loraflow.training.processes import Processes

Score = Callable[[str, Mapping[str, Any]], float]
"""Scores a generated answer against its example's record."""

# The paper gives no learning rate for its fine-tuned baselines. A gate's 1e-3 is too high for a whole LoRA of a large
# model; QLoRA's 2e-4 (arXiv 2305.14314) is what LoRAs of 7B models are usually trained with.
LEARNING_RATE = 2e-4

TURNS = ("last", "all")
"""What `train_on` may be."""
BESIDE = frozenset({"keep_last", "report_to"})
"""Fields that change nothing of what is learned: a run that goes on may have others."""
LATER = frozenset({"min_steps", "schedule", "group_by_length", "packing", "train_on", "early_stopping"})
"""Fields that recipes had not at first."""


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
        min_steps: go on for so many steps at least, over more epochs where the examples are few.
        max_steps: go on for so many steps, whatever `epochs` says; None goes by `epochs`.
        learning_rate: the peak of the schedule.
        batch_size: examples in a step, of all processes together; "auto" is the recipe's own number, and "auto" for
            `gradient_accumulation`.
        gradient_accumulation: forwards and backwards in a step; they share its `batch_size` examples evenly. "auto" is
            the fewest whose memory suffices.
        group_by_length: let examples of similar length share a step, which spares padding, and is another order than
            the paper's random one.
        packing: lay the examples of a forward one behind the other in one row, without padding; the loss is the same.
        betas: AdamW's.
        epsilon: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm; 0 clips nothing.
        warmup: share of the steps over which the learning rate rises.
        schedule: how it goes on from there: "cosine" or "linear", to 0, or "constant".
        adapter_dropout: dropout on the adapters' input. Off here; the official code appears to leave 0.1 on.
        gradient_checkpointing: recompute activations in the backward, to save memory.
        train_on: which of the assistant's turns in a conversation are learned: the "last" one, or "all".
        max_length: longest example, in tokens; None takes the model's limit, at most 2048.
        seed: of the examples' order, and of dropout.
        checkpoint_steps: steps between checkpoints; None makes one after every epoch.
        keep_last: how many checkpoints are kept, beside the best one.
        early_stopping: stop after so many evaluations on the dev examples, one at each checkpoint, without a better
            one; None goes on to the end.
        score_max_new_tokens: longest answer when dev examples are scored by generation.
        report_to: trackers that get the curves: "tensorboard", "wandb", "mlflow", "trackio".
    """

    epochs: int = 5
    min_steps: int = 0
    max_steps: int | None = None
    learning_rate: float = 1e-3
    batch_size: int = 4
    gradient_accumulation: int | Literal["auto"] = 1
    group_by_length: bool = False
    packing: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-5
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    warmup: float = 0.2
    schedule: str = "cosine"
    adapter_dropout: float = 0.0
    gradient_checkpointing: bool = False
    train_on: str = "last"
    max_length: int | None = None
    seed: int = 0
    checkpoint_steps: int | None = None
    keep_last: int = 2
    early_stopping: int | None = None
    score_max_new_tokens: int = 512
    report_to: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        self._settle_auto()
        self._check_kinds()
        positive = ("epochs", "batch_size", "gradient_accumulation", "learning_rate", "epsilon", "score_max_new_tokens")
        for name in positive:
            if getattr(self, name) != "auto" and not 0 < getattr(self, name) < math.inf:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be greater than 0, and finite.")
        for name in ("min_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be at least 0, and finite.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise LoraflowError(f"`betas` (={self.betas}) must be two numbers, each at least 0 and less than 1.")
        for name in ("adapter_dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be at least 0 and less than 1.")
        for name in ("max_length", "max_steps", "checkpoint_steps", "keep_last", "early_stopping"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) < math.inf:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be at least 1, and finite.")
        self._check_whole()
        if self.gradient_accumulation != "auto" and self.batch_size % self.gradient_accumulation:
            raise LoraflowError(
                f"`gradient_accumulation` (={self.gradient_accumulation}) must divide "
                f"`batch_size` (={self.batch_size})."
            )
        if not 0 <= self.seed < 2**32:
            raise LoraflowError(f"`seed` (={self.seed}) must be at least 0 and less than 2**32.")
        for name, value, known in [
            ("schedule", self.schedule, SCHEDULES),
            ("train_on", self.train_on, TURNS),
            *(("report_to", one, TRACKERS) for one in self.report_to),
        ]:
            if value not in known:
                raise LoraflowError(f"`{name}` is unknown: {value!r}. {did_you_mean(str(value), known)}")

    def _check_kinds(self) -> None:
        """Bring every field to its kind, so that two spellings of one recipe are equal, and JSON can hold it.

        Raises:
            LoraflowError: if a field is of another kind.
        """
        for of in fields(self):
            value, kind = getattr(self, of.name), str(of.type)
            if value is None and kind.endswith(" | None"):
                continue
            if value == "auto" and of.name == "gradient_accumulation":
                continue
            kind = kind.removesuffix(" | None").removesuffix(' | Literal["auto"]')
            if kind == "str" and not isinstance(value, str):
                raise LoraflowError(f"`{of.name}` (={value!r}) must be a word, such as {of.default!r}.")
            if kind == "bool" and not isinstance(value, bool):
                raise LoraflowError(f"`{of.name}` (={value!r}) must be True or False.")
            if kind in ("int", "float"):
                object.__setattr__(self, of.name, _number(of.name, value))
        betas: Any = self.betas
        if not isinstance(betas, Sequence) or isinstance(betas, str):
            raise LoraflowError(f"`betas` (={betas!r}) must be two numbers, each at least 0 and less than 1.")
        object.__setattr__(self, "betas", tuple(_number("betas", beta) for beta in betas))
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        if not isinstance(trackers, Sequence):
            raise LoraflowError(f"`report_to` (={trackers!r}) must be names of trackers: {', '.join(TRACKERS)}.")
        object.__setattr__(self, "report_to", tuple(trackers))

    def _check_whole(self) -> None:
        for of in fields(self):
            value = getattr(self, of.name)
            if str(of.type).startswith("int") and isinstance(value, float):
                raise LoraflowError(f"`{of.name}` (={value}) must be a whole number.")

    def _settle_auto(self) -> None:
        """Take `batch_size="auto"` for what it means.

        Raises:
            LoraflowError: if there is another word, or the number of forwards is given too.
        """
        for name in ("batch_size", "gradient_accumulation"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise LoraflowError(f"`{name}` (={value!r}) must be a number, or 'auto'.")
        if str(self.batch_size) == "auto":
            if self.gradient_accumulation not in (1, "auto"):
                raise LoraflowError(
                    f"`batch_size` (='auto') finds how many forwards a step needs, and `gradient_accumulation` "
                    f"(={self.gradient_accumulation}) says it. Leave one of them out."
                )
            object.__setattr__(self, "batch_size", type(self).batch_size)
            object.__setattr__(self, "gradient_accumulation", "auto")

    def identity(self) -> dict[str, Any]:
        """What of a recipe makes two fits the same one; those from before a field was there are as by its default."""
        found = {name: value for name, value in asdict(self).items() if name not in BESIDE}
        return {name: value for name, value in found.items() if name not in LATER or value != getattr(FitConfig, name)}

    def epochs_over(self, examples: int) -> int:
        """Passes over so many examples: `epochs`, or as many as `min_steps` take."""
        return max(self.epochs, math.ceil(self.min_steps / math.ceil(examples / self.batch_size)))

    @property
    def forward_size(self) -> int:
        """Examples in a forward.

        Raises:
            LoraflowError: if the number of forwards is left to a fit.
        """
        if self.gradient_accumulation == "auto":
            raise LoraflowError("`gradient_accumulation` (='auto') is found when a model is fitted. Give a number.")
        return self.batch_size // self.gradient_accumulation

    @classmethod
    def for_method(cls, method: HasRecipe, **settings: Any) -> FitConfig:
        """The recipe of a method: the paper's, with what the method's own source changes, and then these settings."""
        return cls(**{**method.recipe, **settings})

    @classmethod
    def from_yaml(cls, path: str | Path, **settings: Any) -> FitConfig:
        """The recipe in a YAML file: fields by name, or those under `recipe` in a file of `loraflow fit --config`.

        Args:
            path: the file.
            settings: fields that win over those of the file.

        Raises:
            DataError: if the file cannot be read.
            LoraflowError: if a field is unknown or wrong.
        """
        return cls(**{**read_recipe(path, [of.name for of in fields(cls)]), **settings})

    def training_arguments(self, output_dir: str | Path, **overrides: Any) -> TrainingArguments:
        """The same recipe as transformers' `Trainer` takes it, with what else it is to have."""
        from loraflow.training.arguments import training_arguments

        return training_arguments(self, output_dir, overrides)

    @classmethod
    def from_training_arguments(cls, arguments: TrainingArguments, **settings: Any) -> FitConfig:
        """The recipe of transformers' `TrainingArguments`, with what they have no word for.

        What is not of the recipe is left out, whatever it says: folders, logging, evaluation, the Hub, data loading and
        devices are given to `fit`, or to the base.

        Args:
            arguments: of a training on one process.
            settings: fields of the recipe that win, such as `adapter_dropout`, for which there is no argument.

        Raises:
            LoraflowError: if an argument changes what is learned in a way that a recipe cannot say.
        """
        from loraflow.training.arguments import settings_of

        return cls(**{**settings_of(arguments), **settings})


def _number(name: str, value: Any) -> float:
    """A number, as Python's own."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise LoraflowError(f"`{name}` (={value!r}) must be a number.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


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
        reports: where files of trackers and the picture of the weights go; None takes a new folder in `runs`.
        lasting: whether the directory is there after the run.
        processes: those that run it together.
    """

    config: FitConfig
    directory: Path
    resume: bool
    console: Console
    score: Score | None = None
    label: str = ""
    reports: Path | None = None
    lasting: bool = True
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
        start_losses: the loss of each possible start on the examples, by name (an adapter's is that one alone), where
            the start was chosen by it.
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

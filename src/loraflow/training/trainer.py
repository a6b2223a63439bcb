"""transformers' `Trainer`, with checkpoints that are whole or absent and, on request, a score instead of a loss."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

COMPLETE = "COMPLETE"
_KEEP = 2


class GateTrainer(Trainer):
    """Trains a fused model's gates.

    A checkpoint holds the gates and the trainer's state, never the base, since that is what a fused model's
    `state_dict` gives. It counts only once its `COMPLETE` file stands: a crash while writing costs one checkpoint.
    """

    def __init__(self, *args: Any, score: Callable[[], float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._score = score

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's loss on the dev examples, and their score where one is asked for."""
        metrics = super().evaluate(*args, **kwargs)
        if self._score is not None:
            assert self.model is not None
            self.model.eval()
            metrics["eval_score"] = self._score()
            self.log({"eval_score": metrics["eval_score"]})
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        # What a crash left there may be half of a checkpoint.
        shutil.rmtree(checkpoint, ignore_errors=True)
        super()._save_checkpoint(model, trial)
        (checkpoint / COMPLETE).touch()
        self._drop_old_checkpoints(checkpoint.parent)

    def _drop_old_checkpoints(self, directory: Path) -> None:
        best = self.state.best_model_checkpoint
        for old in complete_checkpoints(directory)[:-_KEEP]:
            if best is None or old != Path(best):
                # First the mark, so that a crash in between leaves no checkpoint that counts and is not whole.
                (old / COMPLETE).unlink()
                shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Outcome:
    """What the log of a finished training says.

    Attributes:
        steps: optimiser steps.
        train_loss: mean loss of the last epoch's steps.
        dev_loss: loss on the dev examples at the kept step.
        dev_score: score on the dev examples at the kept step.
        kept_step: the step whose values were kept: the best on dev, else the last.
        log: every logged loss, as (step, loss).
    """

    steps: int
    train_loss: float
    dev_loss: float | None
    dev_score: float | None
    kept_step: int
    log: list[tuple[int, float]]


def outcome_of(trainer: Trainer, *, has_dev: bool) -> Outcome:
    """Read the log of a finished training, whose every step was logged."""
    state = trainer.state
    losses = logged(state.log_history, "loss")
    last_epoch = losses[-max(1, round(len(losses) / max(1.0, state.epoch or 1.0))) :]
    kept = (state.best_global_step if has_dev else None) or state.global_step
    return Outcome(
        steps=state.global_step,
        train_loss=sum(loss for _, loss in last_epoch) / len(last_epoch),
        dev_loss=dict(logged(state.log_history, "eval_loss")).get(kept),
        dev_score=dict(logged(state.log_history, "eval_score")).get(kept),
        kept_step=kept,
        log=losses,
    )


def complete_checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a directory, oldest first."""
    found = [mark.parent for mark in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def logged(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """All values of a key in the trainer's log, as (step, value)."""
    return [(int(entry["step"]), float(entry[key])) for entry in history if key in entry]

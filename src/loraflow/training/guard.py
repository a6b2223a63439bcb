"""A training that diverges is stopped: at which step, by which examples, and with the last good values kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraflow.errors import TrainingError
from loraflow.training.data import FitData

STEPS = 10
"""So many steps in a row decide whether a loss has exploded: a single one may be of an odd example."""
FACTOR = 2.0
"""A loss has exploded above so many times what training started at, or what guessing costs, whichever is more."""
_SHOWN = 8


def exploded(losses: Sequence[float], vocabulary: int) -> bool:
    """Whether losses have exploded: the mean of the last ten is above twice the first and twice log(vocabulary).

    The second is the loss of a model that takes every token for as likely as any other, in nats: one that learns, or
    stands still, is never twice as bad for ten steps on end.
    """
    if len(losses) < STEPS:
        return False
    return sum(losses[-STEPS:]) / STEPS > FACTOR * max(losses[0], math.log(vocabulary))


class Guard:
    """Watches one training.

    Attributes:
        good: what the model's `state_dict` held when a step's loss was last as it should be.
        good_step: the step that had led there.
    """

    good: dict[str, Tensor]
    good_step: int = 0

    def __init__(self, model: Any, data: FitData) -> None:
        self._model, self._data = model, data
        self._batches: list[Any] = []
        self._before: dict[str, Tensor] = {}
        self.good = {}

    def begin(self, batches: list[Any]) -> None:
        """Note a step's batches, and what is learned so far."""
        self._batches = batches
        self._before = {name: value.detach().clone() for name, value in self._model.state_dict().items()}
        self.good = self.good or self._before

    def check(self, step: int, name: str, value: Tensor | float) -> None:
        """Check a step's loss, or the norm of its gradient, before it is taken.

        Raises:
            TrainingError: if it is not finite.
        """
        number = float(value)
        if not math.isfinite(number):
            raise TrainingError(self._message(f"The {name} of step {step} is not finite ({number})"))

    def note(self, step: int, losses: Sequence[float]) -> None:
        """Take a step that was done for good, if its loss is.

        Raises:
            TrainingError: if the losses have exploded.
        """
        vocabulary = self._model.config.get_text_config().vocab_size
        if exploded(losses, vocabulary):
            mean, start = sum(losses[-STEPS:]) / STEPS, max(losses[0], math.log(vocabulary))
            fact = f"The loss has exploded at step {step}: {mean:.3g} over {STEPS} steps, and {start:.3g} at the start"
            raise TrainingError(self._message(fact))
        if losses[-1] <= FACTOR * max(losses[0], math.log(vocabulary)):
            self.good, self.good_step = self._before, step - 1

    def _message(self, fact: str) -> str:
        found = origins(self._batches, self._data)
        shown = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
        return (
            f"{fact}; its examples: {shown or 'unknown'}. Lower `learning_rate`, look at these examples, and give the "
            f"base another precision (`dtype`) if it is float16. What is learned is as it was after step "
            f"{self.good_step}, the last good one."
        )


def origins(batches: Sequence[Mapping[str, Tensor]], data: FitData) -> list[str]:
    """Where the examples of batches come from: those whose token ids stand in a row of one, packed or not."""
    rows = [_text(row.tolist()) for batch in batches for row in batch["input_ids"].to("cpu", torch.int64)]
    named = zip(data.train.rows, data.origins, strict=True) if data.origins else ()
    return [origin for row, origin in named if any(_text(row.input_ids) in found for found in rows)]


def _text(ids: Sequence[int]) -> str:
    return f" {' '.join(map(str, ids))} "

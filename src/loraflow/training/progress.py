"""Loss, speed and time left while gates are learned."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def counting_progress(console: Console) -> Progress:
    """A bar for work that is counted; gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


class RichProgress(TrainerCallback):
    """A progress bar on a terminal and in a notebook, a line after each epoch elsewhere."""

    def __init__(self, console: Console, description: str) -> None:
        self._console = console
        self._description = description
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._in_notebook: Any = None
        self._loss = float("nan")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        if self._console.is_jupyter:
            from transformers.utils.notebook import NotebookProgressBar

            # Rich's own needs ipywidgets, which not every notebook has.
            self._in_notebook = NotebookProgressBar(state.max_steps, prefix=self._description)
        if not self._console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:.1f} examples/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console)
        self._progress.start()
        self._task = self._progress.add_task(
            self._description, total=state.max_steps, completed=state.global_step, loss=float("nan"), speed=0.0
        )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Take over the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self._in_notebook is not None:
            self._in_notebook.update(state.global_step, comment=f"loss {self._loss:.4f}")
        if self._progress is not None and self._task is not None:
            speed = self._progress.tasks[self._task].speed or 0.0
            examples = args.train_batch_size * args.gradient_accumulation_steps
            self._progress.update(self._task, completed=state.global_step, loss=self._loss, speed=speed * examples)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Print a line where there is no bar."""
        if self._progress is None and self._in_notebook is None:
            epoch, step = math.ceil(state.epoch or 0), f"step {state.global_step}/{state.max_steps}"
            self._console.print(f"{self._description}: epoch {epoch}, {step}, loss {self._loss:.4f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also where a training has ended before its end."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

"""Options of the commands that train; their defaults are those of `FitConfig`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.groups import panel
from loraflow.errors import LoraflowError
from loraflow.files import alone
from loraflow.training.config import FitConfig

if TYPE_CHECKING:
    from rich.console import Console

recipe_option = panel("Recipe (the defaults are the papers')")

Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an older result in --output, and start over an interrupted run there."),
]


@dataclass(frozen=True)
class Run:
    """What becomes of files in --output."""

    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after an interruption, from the last checkpoint in --output.")
    ] = False
    keep_checkpoints: Annotated[bool, typer.Option("--keep-checkpoints", help="Keep them after a finished run.")] = (
        False
    )
    overwrite: Overwrite = False


def _number_or_auto(value: object) -> int | str:
    """What an option that takes a number or `auto` was given."""
    if value == "auto":
        return "auto"
    try:
        return int(str(value))
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number nor 'auto'.") from None


_NUMBER_OR_AUTO: dict[str, Any] = {"parser": _number_or_auto, "metavar": "INTEGER|auto"}


@dataclass(frozen=True)
class Steps:
    """The steps of an optimiser, as `loraflow fit` takes them."""

    epochs: Annotated[int, recipe_option(help="Passes over the examples.")] = FitConfig.epochs
    min_steps: Annotated[
        int | None,
        recipe_option(
            help="Go on for so many at least, over more epochs of few examples.  [default: 0; adapter-core 125]"
        ),
    ] = None
    max_steps: Annotated[
        int | None,
        recipe_option(help="Go on for so many steps, whatever --epochs says.  [default: none; phatgoose, ramole 100]"),
    ] = None
    learning_rate: Annotated[
        float | None,
        recipe_option(
            help="Peak of the schedule.  [default: 1e-3; learned-static, ramole 1e-2, adapter-core 2e-2, "
            "phatgoose 5e-3]"
        ),
    ] = None
    batch_size: Annotated[
        Any,
        recipe_option(
            help="Examples in a step; auto takes the default, in as few forwards as memory allows.", **_NUMBER_OR_AUTO
        ),
    ] = FitConfig.batch_size
    gradient_accumulation: Annotated[
        Any,
        recipe_option(
            help="Forwards in a step; must divide the batch size. auto finds the fewest whose memory suffices; what is "
            "learned does not depend on it.",
            **_NUMBER_OR_AUTO,
        ),
    ] = FitConfig.gradient_accumulation
    warmup: Annotated[float, recipe_option(help="Share of the steps with a rising learning rate.")] = FitConfig.warmup
    schedule: Annotated[
        str, recipe_option(help="How the learning rate goes on after its rise: cosine, linear, constant.")
    ] = FitConfig.schedule
    early_stopping: Annotated[
        int | None,
        recipe_option(help="Stop after so many checkpoints that are no better on --dev.  [default: go on to the end]"),
    ] = FitConfig.early_stopping
    weight_decay: Annotated[
        float | None, recipe_option(help="AdamW's.  [default: 0.1; learned-static, phatgoose 0]")
    ] = None


@dataclass(frozen=True)
class Room:
    """What a training takes of memory and disk."""

    max_length: Annotated[
        int | None,
        recipe_option(
            help="Longest example in tokens; longer ones are cut and reported.  [default: the model's, at most 2048]"
        ),
    ] = FitConfig.max_length
    group_by_length: Annotated[
        bool,
        recipe_option(
            "--group-by-length",
            help="Steps of examples of similar length: less padding, and another order than the paper's.",
        ),
    ] = FitConfig.group_by_length
    packing: Annotated[
        bool,
        recipe_option(
            "--packing",
            help="No padding: a forward's examples in one row, none of which sees another. The base is tried first.",
        ),
    ] = FitConfig.packing
    gradient_checkpointing: Annotated[
        bool, recipe_option("--gradient-checkpointing", help="Less memory, more time.")
    ] = FitConfig.gradient_checkpointing
    checkpoint_steps: Annotated[int | None, recipe_option(help="Steps between checkpoints.  [default: an epoch]")] = (
        FitConfig.checkpoint_steps
    )
    keep_last: Annotated[int, recipe_option(help="Checkpoints that are kept, beside the best one.")] = (
        FitConfig.keep_last
    )
    report_to: Annotated[
        list[str],
        recipe_option(
            "--report-to",
            help="Trackers that get the curves, several after one flag: tensorboard, wandb, mlflow, trackio. Files and "
            "the picture of the weights are in --output/reports.",
            show_default=False,
        ),
    ] = ()  # type: ignore[assignment]


def check_output(output: Path, *, overwrite: bool, makes: str) -> None:
    """Check that what a command writes replaces nothing unasked.

    Raises:
        LoraflowError: if there is a file, another fusion, or an adapter.
    """
    marks = {"fusion": ("fusion.safetensors", "fusion_config.json"), "adapter": ("adapter_config.json",)}
    if output.is_file():
        raise LoraflowError(f"`--output` (={str(output)!r}) is a file. Give a directory.")
    for kind, names in marks.items():
        if not any((output / name).exists() for name in names):
            continue
        if kind != makes:
            raise LoraflowError(f"`--output` (={str(output)!r}) holds a LoRA {kind}. Give another directory.")
        if not overwrite:
            raise LoraflowError(
                f"`--output` (={str(output)!r}) holds a finished {kind}. Give another directory, or say --overwrite."
            )


@contextlib.contextmanager
def held_output(output: Path, run: Run, *, makes: str) -> Iterator[Path]:
    """Hold --output for a run that may write there, and find out before anything is loaded.

    Yields:
        Where its checkpoints are.
    """
    from loraflow.training.checkpoints import check_decision

    check_output(output, overwrite=run.overwrite or run.resume, makes=makes)
    checkpoints = output / "checkpoints"
    with alone(output, "fit"):
        check_decision(checkpoints, resume=run.resume, overwrite=run.overwrite)
        yield checkpoints


def print_cut(console: Console, truncated: Sequence[str], count: int) -> None:
    """Tell which examples were cut, if there are any."""
    if truncated:
        origins = ", ".join(truncated[:5]) + (", ..." if len(truncated) > 5 else "")
        console.print(f"[yellow]{len(truncated)} of {count} examples were cut to the longest length:[/] {origins}")

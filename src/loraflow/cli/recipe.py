"""Options of the commands that train; their defaults are those of `FitConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraflow.cli.groups import panel
from loraflow.errors import LoraflowError
from loraflow.training.config import FitConfig

if TYPE_CHECKING:
    from rich.console import Console

recipe_option = panel("Recipe (the defaults are the papers')")

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older result in --output.")]


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


@dataclass(frozen=True)
class Steps:
    """The steps of an optimiser, as `loraflow fit` takes them."""

    epochs: Annotated[int, recipe_option(help="Passes over the examples.")] = FitConfig.epochs
    max_steps: Annotated[
        int | None,
        recipe_option(help="Go on for so many steps, whatever --epochs says.  [default: none; phatgoose 100]"),
    ] = None
    learning_rate: Annotated[
        float | None,
        recipe_option(
            help="Peak of the cosine schedule.  [default: 1e-3; learned-static, adapter-core 1e-2; phatgoose 5e-3]"
        ),
    ] = None
    batch_size: Annotated[int, recipe_option(help="Examples in a step.")] = FitConfig.batch_size
    gradient_accumulation: Annotated[int, recipe_option(help="Forwards in a step; must divide the batch size.")] = (
        FitConfig.gradient_accumulation
    )
    warmup: Annotated[float, recipe_option(help="Share of the steps with a rising learning rate.")] = FitConfig.warmup
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
    gradient_checkpointing: Annotated[
        bool, recipe_option("--gradient-checkpointing", help="Less memory, more time.")
    ] = FitConfig.gradient_checkpointing
    checkpoint_steps: Annotated[int | None, recipe_option(help="Steps between checkpoints.  [default: an epoch]")] = (
        FitConfig.checkpoint_steps
    )


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


def print_cut(console: Console, truncated: Sequence[str], count: int) -> None:
    """Tell which examples were cut, if there are any."""
    if truncated:
        origins = ", ".join(truncated[:5]) + (", ..." if len(truncated) > 5 else "")
        console.print(f"[yellow]{len(truncated)} of {count} examples were cut to the longest length:[/] {origins}")

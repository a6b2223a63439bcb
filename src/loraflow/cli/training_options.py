"""Options of the subcommands that read examples and train on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from loraflow.examples import Fields

DATA = "Data"
RECIPE = "Recipe (the defaults are the papers')"

Dev = Annotated[
    Path | None, typer.Option("--dev", help="Examples on which the best checkpoint is chosen.", rich_help_panel=DATA)
]
PromptField = Annotated[
    str | None,
    typer.Option(
        "--prompt-field",
        help="Field that is the prompt; `data.0` is the first item of the list `data`.",
        rich_help_panel=DATA,
    ),
]
CompletionField = Annotated[
    str | None, typer.Option("--completion-field", help="Field that is the completion.", rich_help_panel=DATA)
]
DevPromptField = Annotated[
    str | None,
    typer.Option("--dev-prompt-field", help="The same for --dev, where its fields differ.", rich_help_panel=DATA),
]
DevCompletionField = Annotated[
    str | None,
    typer.Option("--dev-completion-field", help="The same for --dev, where its fields differ.", rich_help_panel=DATA),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on after an interruption, from the last checkpoint in --output.")
]
KeepCheckpoints = Annotated[bool, typer.Option("--keep-checkpoints", help="Keep them after a finished run.")]
Epochs = Annotated[int, typer.Option(help="Passes over the examples.", rich_help_panel=RECIPE)]
BatchSize = Annotated[int, typer.Option(help="Examples in a step.", rich_help_panel=RECIPE)]
GradientAccumulation = Annotated[
    int, typer.Option(help="Forwards in a step; must divide the batch size.", rich_help_panel=RECIPE)
]
Warmup = Annotated[float, typer.Option(help="Share of the steps with a rising learning rate.", rich_help_panel=RECIPE)]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Longest example in tokens; longer ones are cut and reported.  [default: the model's, at most 2048]",
        rich_help_panel=RECIPE,
    ),
]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=RECIPE)
]
CheckpointSteps = Annotated[
    int | None, typer.Option(help="Steps between checkpoints.  [default: an epoch]", rich_help_panel=RECIPE)
]


def fields(prompt: str | None, completion: str | None) -> Fields | None:
    """The two fields that `--prompt-field` and `--completion-field` name.

    Raises:
        LoraflowError: if only one of them is given.
    """
    from loraflow.examples import Fields

    if (prompt is None) != (completion is None):
        raise LoraflowError("`--prompt-field` and `--completion-field` go together. Give both, or neither.")
    return None if prompt is None or completion is None else Fields(prompt, completion)

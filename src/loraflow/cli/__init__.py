"""The `loraflow` command: one file for each subcommand.

Subcommands import torch and transformers only when they run, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from loraflow import __version__
from loraflow.cli import (
    advise,
    compare,
    demo,
    export,
    finetune,
    fit,
    generate,
    import_official,
    info,
    plot,
    serve,
    trace,
)
from loraflow.cli.devices import check_alone, leave, tells_errors
from loraflow.cli.flags import with_flags
from loraflow.cli.groups import ARGUMENTS
from loraflow.cli.values import spread_values
from loraflow.errors import LoraflowError


class _Group(TyperGroup):
    """Takes several values after one option, as vLLM does; shows the library's errors in flags, without traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, spread_values(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if not {"-h", "--help", "--list"} & {*rest}:
            check_alone(name)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            leave()
            return result
        except LoraflowError as error:
            from rich.console import Console

            if tells_errors():
                Console(stderr=True).print("[bold red]Error:[/] ", end="")
                print(with_flags(str(error)), file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            print("Interrupted.", file=sys.stderr)
            raise typer.Exit(130) from error


app = typer.Typer(
    name="loraflow",
    cls=_Group,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Dynamic fusion of existing LoRA adapters for large language models. Start with `loraflow demo`.",
    pretty_exceptions_show_locals=False,
)
app.command()(demo.demo)
app.command()(advise.advise)
app.command()(info.info)
app.command()(fit.fit)
app.command()(finetune.finetune)
app.command()(compare.compare)
app.command()(generate.generate)
app.command()(trace.trace)
app.add_typer(plot.plot, name="plot")
app.command()(export.export)
app.command()(serve.serve)
app.command(name="import-official")(import_official.import_official)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"loraflow {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Options of the program itself."""

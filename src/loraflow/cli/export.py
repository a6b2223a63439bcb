"""`loraflow export`: a fusion as one ordinary PEFT adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraflow.cli.groups import panel, with_groups
from loraflow.cli.recipe import Overwrite
from loraflow.cli.sources import FusionSource
from loraflow.cli.texts import FieldNames
from loraflow.errors import LoraflowError, did_you_mean

if TYPE_CHECKING:
    from loraflow.export import ExportReport

_FORMATS = ("peft",)
_DTYPES = ("float32", "bfloat16", "float16")
_mean = panel("Dynamic fusions")


@dataclass(frozen=True)
class MeanFields(FieldNames):
    """The fields of the examples that weights are averaged on."""

    prompt_field: Annotated[str | None, _mean("--prompt-field", help="Field of the examples that is the prompt.")] = (
        None
    )
    completion_field: Annotated[str | None, _mean("--completion-field", help="Field that is the completion.")] = None


@with_groups
def export(
    *,
    to: Annotated[str, typer.Option("--to", help="Format: peft.")] = "peft",
    output: Annotated[Path, typer.Option("--output", help="Directory for the adapter.")],
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", help="Compress to this rank, and print the error.  [default: exact, the adapters' ranks together]"
        ),
    ] = None,
    adapter_dtype: Annotated[
        str, typer.Option("--adapter-dtype", help="Precision of the saved adapter: float32, bfloat16, float16.")
    ] = "float32",
    overwrite: Overwrite = False,
    mean_weights_on: Annotated[
        str | None,
        _mean(
            "--mean-weights-on",
            help="Export the mean of a dynamic fusion's weights on these examples (given as for fit), and print the "
            "loss with it and with the fusion.",
        ),
    ] = None,
    names: MeanFields,
    batch_size: Annotated[int, _mean(min=1, help="Examples in a forward.")] = 4,
    source: FusionSource,
) -> None:
    """Write a fusion as one ordinary PEFT adapter, for PEFT, transformers, vLLM and whatever else loads adapters.

    Weights that never change (one adapter, average, static, learned-static, lorahub, adapter-core) give an adapter that
    answers as the fusion does. LoRA-Flow and others weigh every token or prompt anew, which no adapter can: for those,
    --mean-weights-on exports the mean of their weights on your examples, and says what that costs.

    Examples: `loraflow export zh-math --output zh-math-adapter --mean-weights-on dev.jsonl --rank 64`;
    `loraflow export --base B --lora-modules zh=path math=path --method average --output adapter`
    """  # noqa: DOC501 (it is the --help text)
    from rich.console import Console

    from loraflow.examples import read_examples
    from loraflow.prompts import PromptFormat

    # Cheap checks come before the model is loaded.
    if to not in _FORMATS:
        raise LoraflowError(f"`--to` is unknown: {to!r}. {did_you_mean(to, _FORMATS)}")
    if adapter_dtype not in _DTYPES:
        raise LoraflowError(f"`--adapter-dtype` is unknown: {adapter_dtype!r}. {did_you_mean(adapter_dtype, _DTYPES)}")
    fields = names.fields()
    if fields is not None and mean_weights_on is None:
        raise LoraflowError("`--prompt-field` names a field of `--mean-weights-on`, which is missing. Give it too.")
    if mean_weights_on is None and source.prompt.format() != PromptFormat():
        raise LoraflowError(
            "`--system-prompt`, `--prompt-template` and `--chat-template` are how the examples of `--mean-weights-on` "
            "are asked, which is missing. Give it too."
        )
    examples = None if mean_weights_on is None else read_examples(mean_weights_on, fields)

    import torch

    from loraflow.export import export_peft

    console = Console(stderr=True)
    model = source.open()
    report = export_peft(
        model,
        output,
        rank=rank,
        dtype=getattr(torch, adapter_dtype),
        mean_weights_on=examples,
        batch_size=batch_size,
        overwrite=overwrite,
        console=console,
    )
    for line in describe(report):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def describe(report: ExportReport) -> list[str]:
    """What was exported and what it cost, in lines for people."""
    kind = " (DoRA)" if report.uses_dora else ""
    lines = [
        f"one adapter{kind} of {', '.join(report.adapters)}: {report.modules} modules, rank {report.rank}, "
        f"in {report.directory}"
    ]
    compression, cost = report.compression, report.cost
    if compression is not None:
        lines.append(
            f"compressed to rank {compression.rank}: relative error {compression.error:.3g} over all modules, at most "
            f"{compression.worst_error:.3g} in one ({compression.worst_module})"
        )
    if cost is not None:
        if cost.truncated:
            shown = ", ".join(cost.truncated[:5]) + (", ..." if len(cost.truncated) > 5 else "")
            lines.append(f"{len(cost.truncated)} of {cost.examples} examples were cut to the longest length: {shown}")
        lines.append(
            f"constant weights, the means on {cost.examples} examples: loss {cost.exported_loss:.4f} there, against "
            f"{cost.dynamic_loss:.4f} of the fusion itself; they cost "
            f"{cost.exported_loss - cost.dynamic_loss:+.4f} nats per response token"
        )
    lines.append(report.vllm)
    return lines

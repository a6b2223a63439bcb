"""`loraflow export`: a fusion, or a merge of adapters, as one adapter or a whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.groups import panel, with_groups
from loraflow.cli.recipe import Overwrite
from loraflow.cli.sources import FusionSource
from loraflow.cli.texts import FieldNames
from loraflow.cli.values import parse_method_options
from loraflow.errors import LoraflowError, did_you_mean

if TYPE_CHECKING:
    from loraflow.export import CheckpointReport, Compression, ExportReport, GgufReport, MeanCost
    from loraflow.merging import Loss, Merge
    from loraflow.model import FusedModel

_FORMATS = ("peft", "merged", "gguf", "gguf-model")
_DTYPES = ("float32", "bfloat16", "float16")
_mean = panel("Dynamic fusions")
_merging = panel("Merges")


@dataclass(frozen=True)
class MeanFields(FieldNames):
    """The fields of the examples that weights are averaged on."""

    prompt_field: Annotated[str | None, _mean("--prompt-field", help="Field of the examples that is the prompt.")] = (
        None
    )
    completion_field: Annotated[str | None, _mean("--completion-field", help="Field that is the completion.")] = None


@dataclass(frozen=True)
class MergeChoice:
    """A merge of the adapters in place of a method's weights."""

    merge: Annotated[
        str | None,
        _merging(
            "--merge",
            help="Merge the adapters, whatever a fusion's method weighs them by: sum, linear, ties, dare-linear, "
            "dare-ties, magnitude-prune (as PEFT has them), knots-ties, knots-dare-ties, core-sum, core-ties, "
            "core-iso-c, lego; prints how far that is from their sum.",
        ),
    ] = None
    merge_option: Annotated[
        list[str],
        _merging(
            "--merge-option",
            help='Options of the merge, as `key=value`, values as JSON or text: for all `weights={"zh": 0.5}`, for '
            "knots-ties `scale=0.5`, for ties `density=0.2`, for lego `clusters=16` (docs/methods/merges.md).",
            show_default=False,
        ),
    ] = field(default_factory=list)

    def resolve(self) -> Merge | None:
        """The merge, if there is to be one.

        Raises:
            LoraflowError: if there are options and no merge.
        """
        if self.merge is None:
            if self.merge_option:
                raise LoraflowError("`--merge-option` is of a `--merge`, which is missing. Give it too.")
            return None
        from loraflow.merging import make_merge

        return make_merge(self.merge, parse_method_options(self.merge_option, "--merge-option"))


@dataclass(frozen=True)
class Written:
    """What is written, and where to."""

    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="peft: one adapter. merged: a checkpoint of the base with it folded in. gguf: a LoRA for llama.cpp. "
            "gguf-model: a whole model for llama.cpp.",
        ),
    ] = "peft"
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", help="Compress to this rank, and print the error.  [default: exact, the adapters' ranks together]"
        ),
    ] = None
    adapter_dtype: Annotated[
        str | None,
        typer.Option(
            "--adapter-dtype",
            help="Precision of a saved adapter: float32, bfloat16, float16; a checkpoint has the base's (--dtype).  "
            "[default: float32]",
        ),
    ] = None
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", help="Largest file of a checkpoint.  [default: 5GB]")
    ] = None
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", help="A copy of llama.cpp, whose converter makes the gguf-model."),
    ] = None
    overwrite: Overwrite = False

    @property
    def whole(self) -> bool:
        """Whether it is a whole model, with a tokenizer."""
        return self.to in ("merged", "gguf-model")

    def check(self) -> None:
        """Check what is cheap to check, before a model is loaded.

        Raises:
            LoraflowError: if an option is unknown, or is not of this format.
        """
        if self.to not in _FORMATS:
            raise LoraflowError(f"`--to` is unknown: {self.to!r}. {did_you_mean(self.to, _FORMATS)}")
        if self.adapter_dtype is not None and self.adapter_dtype not in _DTYPES:
            raise LoraflowError(
                f"`--adapter-dtype` is unknown: {self.adapter_dtype!r}. {did_you_mean(self.adapter_dtype, _DTYPES)}"
            )
        for flag, value, fits in (
            ("--adapter-dtype", self.adapter_dtype, not self.whole),
            ("--max-shard-size", self.max_shard_size, self.to == "merged"),
            ("--llama-cpp", self.llama_cpp, self.to == "gguf-model"),
        ):
            if value is not None and not fits:
                raise LoraflowError(f"`{flag}` (={str(value)!r}) is nothing that `--to {self.to}` has. Leave it out.")
        if self.to == "gguf-model" and self.llama_cpp is None:
            raise LoraflowError(
                "`--llama-cpp` is missing: a whole model becomes GGUF by llama.cpp's own converter. Give a copy of "
                "llama.cpp, or export a LoRA: `--to gguf`."
            )

    def write(self, model: FusedModel, output: Path, **options: Any) -> list[str]:
        """Write it; gives what there is to say, in lines for people."""
        import torch

        from loraflow import export

        options |= {"rank": self.rank, "overwrite": self.overwrite}
        if self.to == "merged":
            shards: dict[str, Any] = {} if self.max_shard_size is None else {"max_shard_size": self.max_shard_size}
            return describe_checkpoint(export.export_merged(model, output, **shards, **options))
        if self.llama_cpp is not None:
            return describe_gguf(export.export_gguf_model(model, output, self.llama_cpp, **options))
        dtype = getattr(torch, self.adapter_dtype or "float32")
        if self.to == "gguf":
            return describe_gguf(export.export_gguf(model, output, dtype=dtype, **options))
        return describe(export.export_peft(model, output, dtype=dtype, **options))


@with_groups
def export(
    *,
    output: Annotated[
        Path, typer.Option("--output", help="Directory for the adapter or checkpoint, or the GGUF file.")
    ],
    written: Written,
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
    merging: MergeChoice,
    source: FusionSource,
) -> None:
    """Write a fusion, or a merge of adapters, as one adapter or as a whole model, for whatever else loads those.

    Weights that never change (one adapter, average, static, learned-static, lorahub, adapter-core) give an adapter that
    answers as the fusion does. LoRA-Flow and others weigh every token or prompt anew, which no adapter can: for those,
    --mean-weights-on exports the mean of their weights on your examples, and says what that costs. --merge makes one
    adapter of several by their weights alone, and says how far it is from their sum.

    Examples: `loraflow export zh-math --output zh-math-adapter --mean-weights-on dev.jsonl --rank 64`;
    `loraflow export --base B --lora-modules zh=path math=path --method average --output adapter`;
    `loraflow export --base B --lora-modules zh=path math=path --merge knots-ties --to merged --output model`
    """  # noqa: DOC501 (it is the --help text)
    from rich.console import Console

    from loraflow.examples import read_examples
    from loraflow.prompts import PromptFormat

    # Cheap checks come before the model is loaded.
    written.check()
    merge = merging.resolve()
    if merge is not None and (source.choice.method is not None or source.choice.method_option):
        raise LoraflowError("`--merge` takes the place of `--method`, whose weights it does not read. Leave one out.")
    fields = names.fields()
    if fields is not None and mean_weights_on is None:
        raise LoraflowError("`--prompt-field` names a field of `--mean-weights-on`, which is missing. Give it too.")
    if mean_weights_on is None and not written.whole and source.prompt.format() != PromptFormat():
        raise LoraflowError(
            "`--system-prompt`, `--prompt-template` and `--chat-template` are how the examples of `--mean-weights-on` "
            "are asked, which is missing. Give it too."
        )
    examples = None if mean_weights_on is None else read_examples(mean_weights_on, fields)

    console = Console(stderr=True)
    model = source.open()
    lines = written.write(model, output, mean_weights_on=examples, merge=merge, batch_size=batch_size, console=console)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def describe(report: ExportReport) -> list[str]:
    """What was exported and what it cost, in lines for people."""
    kind = " (DoRA)" if report.uses_dora else ""
    lines = [
        f"one adapter{kind} of {', '.join(report.adapters)}: {report.modules} modules, rank {report.rank}, "
        f"in {report.directory}"
    ]
    lines += _losses(report.compression, report.from_sum, report.cost)
    lines.append(report.vllm)
    return lines


def describe_checkpoint(report: CheckpointReport) -> list[str]:
    """What was written, in lines for people."""
    dtype = str(report.dtype).removeprefix("torch.")
    what = "with its tokenizer" if report.tokenizer else "without a tokenizer, of which there is none"
    lines = [
        f"the base with {', '.join(report.folded.sources)} folded in: {report.shards} files of weights in {dtype}, "
        f"{what}, in {report.directory}"
    ]
    lines += _losses(report.folded.compression, report.folded.from_sum, report.folded.cost)
    if report.dequantised is not None:
        lines.append(f"the base's weights were {report.dequantised}, and are written dequantised")
    lines.append(
        f"rounded to {dtype}: relative error {report.rounding.error:.3g} of all updates, at most "
        f"{report.rounding.worst_error:.3g} in one ({report.rounding.worst_module})"
    )
    if report.prompt is not None:
        lines.append(f"a checkpoint has no place for the fusion's {report.prompt}: give that yourself")
    if report.unsampled:
        lines.append(
            f"the base's generation configuration does not sample, and transformers writes none that then has "
            f"{', '.join(report.unsampled)}: left out; give it where you sample"
        )
    return lines


def describe_gguf(report: GgufReport) -> list[str]:
    """What was written, in lines for people."""
    folded = report.folded
    if report.checkpoint is not None:
        rest = describe_checkpoint(report.checkpoint)[1:]
        return [f"a whole model, the base with {', '.join(folded.sources)} folded in: {report.file}", *rest]
    return [
        f"one LoRA of {', '.join(folded.sources)}: {len(folded.adapter.modules)} modules, rank "
        f"{folded.adapter.config.r}, in {report.file}",
        *_losses(folded.compression, folded.from_sum, folded.cost),
        f"llama.cpp can load it: --lora {report.file}",
    ]


def _losses(compression: Compression | None, from_sum: Loss | None, cost: MeanCost | None) -> list[str]:
    """What making one adapter lost, in lines for people."""
    lines = []
    if compression is not None:
        lines.append(
            f"compressed to rank {compression.rank}: relative error {compression.error:.3g} over all modules, at most "
            f"{compression.worst_error:.3g} in one ({compression.worst_module})"
        )
    if from_sum is not None:
        lines.append(
            f"merged, whatever a method weighs them by: relative difference from the sum of the updates "
            f"{from_sum.error:.3g} over all modules, at most {from_sum.worst_error:.3g} in one "
            f"({from_sum.worst_module})"
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
    return lines

"""`loraflow plot`: the paper's figures for any fusion and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli import options as o
from loraflow.cli import training_options as t
from loraflow.errors import DataError, LoraflowError

if TYPE_CHECKING:
    from loraflow.analysis.weights import WeightStatistics
    from loraflow.model import FusedModel

plot = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Draw the paper's figures 3 to 6 for any fusion and data, as PNG, SVG or PDF. `loraflow plot layers` shows "
    "which layers use which adapter, `decoding` how that changes along an answer, `answer` which adapter speaks at "
    "each token, `transfer` what a gate does on other tasks. Needs `pip install 'loraflow[plots]'`.",
)

_FIGURE = "Figure"
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        help="The figure's file, ending in .png, .svg or .pdf; without an ending, .png and .svg are both written.",
        rich_help_panel=_FIGURE,
    ),
]
Title = Annotated[str | None, typer.Option("--title", help="Text above the figure.", rich_help_panel=_FIGURE)]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers of the figure there.", rich_help_panel=_FIGURE)
]
Data = Annotated[
    Path,
    typer.Option(
        "--data",
        help="JSON lines with a `prompt` each (or `messages`); with --completions a `completion` too.",
        rich_help_panel=t.DATA,
    ),
]
Examples = Annotated[
    int | None,
    typer.Option("--examples", min=1, help="Only the first so many.  [default: all]", rich_help_panel=t.DATA),
]
Completions = Annotated[
    bool,
    typer.Option(
        "--completions",
        help="Read the given answers instead of generating: one forward each, which is quick, but shows the weights on "
        "text that the fusion might not have written.",
        rich_help_panel=t.DATA,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest generated answer, in tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a forward.")]


@dataclass(frozen=True)
class _Answers:
    """Which answers' weights a figure shows, as the command line says it."""

    data: Path
    examples: int | None
    completions: bool
    prompt_field: str | None
    completion_field: str | None
    max_new_tokens: int
    batch_size: int

    def weigh(self, output: Path, open_model: Callable[[], FusedModel]) -> WeightStatistics:
        """The statistics of a model's weights on the answers; what else is wrong is told before it is loaded."""
        from loraflow.visual.figures import check_figure_path, require_matplotlib

        require_matplotlib()
        check_figure_path(output)
        examples = self._read()
        return self._weigh(open_model(), examples)

    def _read(self) -> list[Any]:
        """The examples; where answers are generated, only their prompts need to be there.

        Raises:
            LoraflowError: if there is a field of completions that are not read.
        """
        from loraflow.examples import Fields, parse_example, read_examples, read_records

        if self.completions:
            return read_examples(self.data, t.fields(self.prompt_field, self.completion_field))[: self.examples]
        if self.completion_field is not None:
            raise LoraflowError("`--completion-field` names what --completions reads. Say --completions too.")
        found = []
        for origin, record in read_records(self.data):
            named = self.prompt_field is not None or not (isinstance(record, dict) and "messages" in record)
            field = self.prompt_field or "prompt"
            found.append(parse_example(record, origin, Fields(field, field) if named else None))
        return found[: self.examples]

    def _weigh(self, model: FusedModel, examples: list[Any]) -> WeightStatistics:
        from rich.console import Console
        from rich.progress import Progress

        from loraflow.analysis.weights import answer_tokens, statistics_of_tokens, weight_statistics

        console = Console(stderr=True)
        with Progress(console=console) as progress:

            def follow(what: str) -> Any:
                task = progress.add_task(what, total=len(examples))
                return lambda count: progress.advance(task, count)

            if self.completions:
                found = weight_statistics(model, examples, batch_size=self.batch_size, on_batch=follow("reading"))
            else:
                answers = answer_tokens(
                    model,
                    [example.messages for example in examples],
                    max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size,
                    on_batch=follow("answering"),
                )
                found = statistics_of_tokens(model, answers, batch_size=self.batch_size, on_batch=follow("reading"))
        if found.truncated:
            console.print(f"{len(found.truncated)} of {found.examples} examples were cut to the longest length")
        return found


@plot.command()
def layers(
    fusion: o.Fusion = None,
    *,
    data: Data,
    output: Output,
    title: Title = None,
    json_file: JsonFile = None,
    examples: Examples = None,
    completions: Completions = False,
    prompt_field: t.PromptField = None,
    completion_field: t.CompletionField = None,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 8,
    method: o.Method = None,
    method_option: o.MethodOptions = [],  # noqa: B006 (typer reads the default)
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    quantization: o.Quantization = None,
) -> None:
    """Draw the mean weight of each adapter in every layer, with the middle 80 % of its weights (the paper's figure 3).

    The weights are those that produced the answers' tokens. Answers are generated greedily unless --completions takes
    the given ones.

    Example: `loraflow plot layers zh-math --data test.jsonl --output layers.svg`
    """
    from loraflow.visual.figures import layers_figure, save_figure

    answers = _Answers(data, examples, completions, prompt_field, completion_field, max_new_tokens, batch_size)
    placement = o.Placement(revision, dtype, device, quantization)
    found = answers.weigh(output, lambda: o.open_model(fusion, base, lora_modules, method, method_option, placement))
    _report(save_figure(layers_figure(found, title), output))
    _write_json(json_file, {**_heading("layers", found), "layers": found.layers, **found.answers.as_json()})


@plot.command()
def decoding(
    fusion: o.Fusion = None,
    *,
    data: Data,
    output: Output,
    title: Title = None,
    json_file: JsonFile = None,
    examples: Examples = None,
    completions: Completions = False,
    prompt_field: t.PromptField = None,
    completion_field: t.CompletionField = None,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 8,
    method: o.Method = None,
    method_option: o.MethodOptions = [],  # noqa: B006 (typer reads the default)
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    quantization: o.Quantization = None,
) -> None:
    """Draw the mean weight of each adapter in every tenth of the answers (the paper's figure 4).

    The weights are those that produced each token, averaged over the layers. Answers are generated greedily unless
    --completions takes the given ones.

    Example: `loraflow plot decoding zh-math --data test.jsonl --examples 50 --output decoding`
    """
    from loraflow.visual.figures import decoding_figure, save_figure

    answers = _Answers(data, examples, completions, prompt_field, completion_field, max_new_tokens, batch_size)
    placement = o.Placement(revision, dtype, device, quantization)
    found = answers.weigh(output, lambda: o.open_model(fusion, base, lora_modules, method, method_option, placement))
    _report(save_figure(decoding_figure(found, title), output))
    _write_json(json_file, {**_heading("decoding", found), **found.tenths.as_json()})


@plot.command()
def answer(
    fusion: o.Fusion = None,
    *,
    prompt: Annotated[str, typer.Option("--prompt", help="The question.")],
    given: Annotated[
        str | None, typer.Option("--answer", help="Show this answer.  [default: the one that the fusion generates]")
    ] = None,
    output: Output,
    title: Title = None,
    json_file: JsonFile = None,
    max_new_tokens: MaxNewTokens = 256,
    method: o.Method = None,
    method_option: o.MethodOptions = [],  # noqa: B006 (typer reads the default)
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    quantization: o.Quantization = None,
) -> None:
    """Draw each adapter's weight at every token of one answer (the paper's figure 5).

    A token has the weights that produced it, averaged over the layers; long answers go on in further panels. In the
    terminal, `loraflow trace` shows the same as colours.

    Example: `loraflow plot answer zh-math --prompt "..." --output answer.png`
    """
    from loraflow.cli.trace import trace_answer
    from loraflow.visual.figures import answer_figure, check_figure_path, require_matplotlib, save_figure

    require_matplotlib()
    check_figure_path(output)
    placement = o.Placement(revision, dtype, device, quantization)
    model = o.open_model(fusion, base, lora_modules, method, method_option, placement)
    traced = trace_answer(model, prompt, given, max_new_tokens)
    _report(save_figure(answer_figure(traced, title=title), output))
    answered = slice(traced.prompt_length, None)
    content = {
        "figure": "answer",
        "adapters": traced.adapters,
        "tokens": traced.tokens[0][answered],
        "weights": traced.token_weights()[answered].tolist(),
    }
    _write_json(json_file, content)


@plot.command()
def transfer(
    report: Annotated[
        Path, typer.Argument(help="What `loraflow compare` wrote: its report.json, or the directory with it.")
    ],
    *,
    output: Output,
    title: Title = None,
    json_file: JsonFile = None,
) -> None:
    """Draw what gates that were fitted on one task gain on all tasks, over the comparison's reference (figure 6).

    Each gate has a group of bars, one for every task, with their intervals; a star marks the task it was fitted on.

    Example: `loraflow plot transfer results/report.json --output transfer.svg`
    """
    from dataclasses import asdict

    from loraflow.visual.figures import (
        check_figure_path,
        require_matplotlib,
        save_figure,
        transfer_figure,
        transfer_gains,
    )

    require_matplotlib()
    check_figure_path(output)
    content = _read_report(report)
    _report(save_figure(transfer_figure(content, title), output))
    gains = [{**asdict(gain), "own": gain.own} for gain in transfer_gains(content)]
    _write_json(json_file, {"figure": "transfer", "reference": content["reference"], "gains": gains})


def _read_report(path: Path) -> Any:
    """The report of a comparison.

    Raises:
        DataError: if the file cannot be read, or is no JSON.
    """
    import json

    file = path / "report.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The report {file} cannot be read: {error}. Give the one that `loraflow compare` wrote."
        ) from error


def _heading(figure: str, found: WeightStatistics) -> dict[str, Any]:
    return {"figure": figure, "method": found.method, "adapters": found.adapters, "examples": found.examples}


def _report(files: list[Path]) -> None:
    for file in files:
        print(file)


def _write_json(path: Path | None, content: Any) -> None:
    import json

    from loraflow.files import write_atomically

    if path is not None:
        write_atomically(path, json.dumps(content, ensure_ascii=False).encode())

"""`loraflow plot`: the paper's figures for any fusion and data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.groups import panel, with_groups
from loraflow.cli.sources import FusionSource
from loraflow.cli.texts import FieldNames, data_option
from loraflow.errors import DataError, LoraflowError

if TYPE_CHECKING:
    from loraflow.analysis.weights import WeightStatistics
    from loraflow.model import FusedModel

plot = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Draw the paper's figures 3 to 6 for any fusion and data, and learning curves, as PNG, SVG or PDF. `loraflow "
    "plot layers` shows which layers use which adapter, `decoding` how that changes along an answer, `answer` which "
    "adapter speaks at each token, `transfer` what a gate does on other tasks, `curves` how scores grow with examples. "
    "Needs `pip install 'loraflow[plots]'`.",
)

_figure = panel("Figure")
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest generated answer, in tokens.")]


@dataclass(frozen=True)
class FigureFile:
    """Where a figure goes, and what else is written."""

    output: Annotated[
        Path,
        _figure(
            "--output",
            help="The figure's file, ending in .png, .svg or .pdf; without an ending, .png and .svg are both written.",
        ),
    ]
    title: Annotated[str | None, _figure("--title", help="Text above the figure.")] = None
    json_file: Annotated[Path | None, _figure("--json", help="Write the numbers of the figure there.")] = None

    def check(self) -> None:
        """Check, before any work, that figures can be drawn, and this one be saved."""
        from loraflow.visual.figures import check_figure_path, require_matplotlib

        require_matplotlib()
        check_figure_path(self.output)

    def save(self, figure: Any, numbers: dict[str, Any]) -> None:
        """Write both, and tell the figure's files."""
        import json

        from loraflow.files import write_atomically
        from loraflow.visual.figures import save_figure

        for file in save_figure(figure, self.output):
            print(file)
        if self.json_file is not None:
            self.json_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.json_file, json.dumps(numbers, ensure_ascii=False).encode())


@dataclass(frozen=True)
class Answers:
    """Which answers' weights a figure shows."""

    data: Annotated[
        str,
        data_option(
            "--data",
            help="Rows with a `prompt` each (or `messages`), from where `fit` has them; with --completions a "
            "`completion` too.",
        ),
    ]
    examples: Annotated[
        int | None, data_option("--examples", min=1, help="Only the first so many.  [default: all]")
    ] = None
    completions: Annotated[
        bool,
        data_option(
            "--completions",
            help="Read the given answers instead of generating: one forward each, which is quick, but shows the "
            "weights on text that the fusion might not have written.",
        ),
    ] = False
    names: FieldNames = field(default_factory=FieldNames)
    max_new_tokens: MaxNewTokens = 256
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a forward.")] = 8

    def weigh(self, figure: FigureFile, source: FusionSource) -> WeightStatistics:
        """The statistics of a model's weights on the answers; what else is wrong is told before it is loaded."""
        figure.check()
        examples = self._read()
        return self._weigh(source.open(), examples)

    def _read(self) -> list[Any]:
        """The examples; where answers are generated, only their prompts need to be there.

        Raises:
            LoraflowError: if there is a field of completions that are not read.
        """
        from loraflow.examples import Fields, check_rows, parse_example, read_examples, read_records

        if self.completions:
            return read_examples(self.data, self.names.fields(), limit=self.examples)
        if self.names.completion_field is not None:
            raise LoraflowError("`--completion-field` names what --completions reads. Say --completions too.")
        name = self.names.prompt_field

        def parse(record: Any, origin: str) -> Any:
            named = name is not None or not (isinstance(record, dict) and "messages" in record)
            return parse_example(record, origin, Fields(*[name or "prompt"] * 2) if named else None)

        return check_rows(read_records(self.data, limit=self.examples), parse)

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
@with_groups
def layers(
    *,
    answers: Answers,
    figure: FigureFile,
    source: FusionSource,
) -> None:
    """Draw the mean weight of each adapter in every layer, with the middle 80 % of its weights (the paper's figure 3).

    The weights are those that produced the answers' tokens. Answers are generated greedily unless --completions takes
    the given ones.

    Example: `loraflow plot layers zh-math --data test.jsonl --output layers.svg`
    """
    from loraflow.visual.figures import layers_figure

    found = answers.weigh(figure, source)
    numbers = {**_heading("layers", found), "layers": found.layers, **found.answers.as_json()}
    figure.save(layers_figure(found, figure.title), numbers)


@plot.command()
@with_groups
def decoding(
    *,
    answers: Answers,
    figure: FigureFile,
    source: FusionSource,
) -> None:
    """Draw the mean weight of each adapter in every tenth of the answers (the paper's figure 4).

    The weights are those that produced each token, averaged over the layers. Answers are generated greedily unless
    --completions takes the given ones.

    Example: `loraflow plot decoding zh-math --data test.jsonl --examples 50 --output decoding`
    """
    from loraflow.visual.figures import decoding_figure

    found = answers.weigh(figure, source)
    numbers = {**_heading("decoding", found), **found.tenths.as_json()}
    figure.save(decoding_figure(found, figure.title), numbers)


@plot.command()
@with_groups
def answer(
    *,
    prompt: Annotated[str, typer.Option("--prompt", help="The question.")],
    given: Annotated[
        str | None, typer.Option("--answer", help="Show this answer.  [default: the one that the fusion generates]")
    ] = None,
    figure: FigureFile,
    max_new_tokens: MaxNewTokens = 256,
    source: FusionSource,
) -> None:
    """Draw each adapter's weight at every token of one answer (the paper's figure 5).

    A token has the weights that produced it, averaged over the layers; long answers go on in further panels. In the
    terminal, `loraflow trace` shows the same as colours.

    Example: `loraflow plot answer zh-math --prompt "..." --output answer.png`
    """
    from loraflow.cli.trace import trace_answer
    from loraflow.visual.figures import answer_figure

    figure.check()
    traced = trace_answer(source.open(), prompt, given, max_new_tokens)
    answered = slice(traced.prompt_length, None)
    numbers = {
        "figure": "answer",
        "adapters": traced.adapters,
        "tokens": traced.tokens[0][answered],
        "weights": traced.token_weights()[answered].tolist(),
    }
    figure.save(answer_figure(traced, title=figure.title), numbers)


@plot.command()
@with_groups
def transfer(
    *,
    report: Annotated[
        Path, typer.Argument(help="What `loraflow compare` wrote: its report.json, or the directory with it.")
    ],
    figure: FigureFile,
) -> None:
    """Draw what gates that were fitted on one task gain on all tasks, over the comparison's reference (figure 6).

    Each gate has a group of bars, one for every task, with their intervals; a star marks the task it was fitted on.

    Example: `loraflow plot transfer results/report.json --output transfer.svg`
    """
    from loraflow.visual.figures import transfer_figure, transfer_gains

    figure.check()
    content = _read_report(report)
    drawn = transfer_figure(content, figure.title)
    gains = [{**asdict(gain), "own": gain.own} for gain in transfer_gains(content)]
    figure.save(drawn, {"figure": "transfer", "reference": content["reference"], "gains": gains})


@plot.command()
@with_groups
def curves(
    *,
    report: Annotated[
        Path, typer.Argument(help="What `loraflow compare` wrote: its report.json, or the directory with it.")
    ],
    task: Annotated[
        str | None,
        typer.Option("--task", help="One of its tasks, or average.  [default: the average, or the only task]"),
    ] = None,
    figure: FigureFile,
) -> None:
    """Draw scores by the number of examples: one line for each row of the plan that lists several numbers of them.

    Lines are scores with their 95 % intervals, moved a little aside of each other; a row that learned from no example
    of the task is a thin line right through.

    Example: `loraflow plot curves runs/curves --output curves.svg`
    """
    from loraflow.visual.curves import curve_points, curves_figure

    figure.check()
    content = _read_report(report)
    drawn = curves_figure(content, task, figure.title)
    figure.save(drawn, {"figure": "curves", "points": [asdict(point) for point in curve_points(content, task)]})


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

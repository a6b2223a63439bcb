"""`loraflow demo`: the whole job on the built-in small world."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.sources import MethodOptions
from loraflow.cli.values import parse_method_options
from loraflow.errors import SandboxError

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.demo.comparison import Result

UNFINISHED = "unfinished"
"""Where a demo keeps what it has measured, until it is whole."""


def demo(
    task: Annotated[str, typer.Option(help="zh-math, zh-code, es-math, es-code, ru-math or ru-code.")] = "zh-math",
    output: Annotated[Path, typer.Option(help="Directory for the fusion, the data and every answer.")] = Path(
        "loraflow-demo"
    ),
    method_option: MethodOptions = [],  # noqa: B006 (typer reads the default)
    seed: Annotated[int, typer.Option(help="Of the examples' order while fitting.")] = 0,
    problems: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=500,
            help="How many of the 500 test problems to answer.  [default: 500; 100 with --quick]",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fit for fewer steps and answer fewer problems: under two minutes.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let code tasks run generated code, in a sandbox.")
    ] = False,
) -> None:
    """Try the whole job, offline, on a small world that comes with the package.

    Its base model reads four languages and half knows two skills; its adapters are chat in one language (zh, es, ru)
    and a skill in English (math, code). A task needs both at once: the demo fits LoRA-Flow on 200 examples, compares
    it on test problems with the base, each adapter alone and the average, and shows which adapter spoke in one answer.
    One that was stopped goes on when it is started again.
    """  # noqa: DOC501 (it is the --help text)
    from loraflow.demo.tasks import load_task

    chosen = load_task(task)
    if chosen.skill == "code" and not allow_code:
        raise SandboxError(f"The task {task!r} runs generated code. Say --allow-code, or take a math task.")

    from rich.console import Console

    from loraflow.demo import comparison
    from loraflow.evaluation.compare import Options, Store, compare, open_comparison
    from loraflow.model import FusedModel

    console = Console()
    size = comparison.QUICK if quick else comparison.Size(problems=len(chosen.test))
    size = size if problems is None else dataclasses.replace(size, problems=problems)
    plan = comparison.demo_plan(chosen, parse_method_options(method_option), seed, size)
    cells = open_comparison(plan, allow_code=allow_code).cells
    console.print(f"[bold]{task}[/]: {chosen.skill} asked and answered in {chosen.language}, from two adapters:")
    console.print(f"  {chosen.adapters[0]} (chat, no {chosen.skill}) and {chosen.adapters[1]} (English {chosen.skill})")
    if smaller := size.less_than_whole(chosen):
        console.print(f"  smaller than the whole demo: {smaller}", soft_wrap=True)
    run = output / UNFINISHED
    # What a demo with other options has left there is not what this one measures.
    if compare(plan, run, options=Options(allow_code=allow_code), overwrite=True, console=console):
        raise typer.Exit(1)
    store = Store(run)
    results = [comparison.read_result(store, cell) for cell in cells]
    model = FusedModel.from_pretrained(store.learned_path(cells[-1].method, task, seed) / "fusion")
    _say_learned(store.read(cells[-1]), console)
    model.save_pretrained(output / "fusion", copy_adapters=True)
    comparison.write_task(chosen, output / "data")
    comparison.write_results(chosen, seed, results, output)
    shutil.rmtree(run, ignore_errors=True)
    console.print(_table(results, task))
    _show_trace(model, chosen, results[-1], console)
    console.print(f"\nfusion: {output}/fusion   data: {output}/data   every answer: {output}/answers", soft_wrap=True)
    console.print(f"try: loraflow trace {output}/fusion --prompt '...' --numbers", soft_wrap=True)


def _say_learned(record: Any, console: Console) -> None:
    learned, start = record.details, record.details["start"]
    console.print(
        f"fitted {record.learned_parameters:,} gate values on {record.examples} examples; base and adapters stay frozen"
    )
    console.print(
        f"  {record.fit_s:.0f} s; started at {max(start, key=start.get)}; "
        f"dev loss {learned['dev_loss']:.4f} at step {learned['kept_step']}"
    )


def _table(results: list[Result], task: str) -> Any:
    from rich.table import Table

    table = Table(
        "model", "right", "right and in the language", "problems", title=f"{task}, test problems, greedy", box=None
    )
    for result in results:
        s = result.summary()
        style = "bold" if result is results[-1] else ""
        table.add_row(
            s["method"],
            _percent(s["accuracy"], s["accuracy_interval"]),
            _percent(s["in_language_accuracy"], s["in_language_interval"]),
            str(s["problems"]),
            style=style,
        )
    table.caption = "percent, with 95 % intervals (Wilson)"
    return table


def _percent(share: float, interval: tuple[float, float]) -> str:
    return f"{100 * share:5.1f}  ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _show_trace(model: Any, task: Any, result: Result, console: Console) -> None:
    from loraflow.cli.trace import trace_answer
    from loraflow.demo.setting import LONGEST_ANSWER
    from loraflow.visual.terminal import render_trace

    shown = result.in_language.index(True) if any(result.in_language) else 0
    console.print("\nwhich adapter spoke, in one answer:")
    console.print(render_trace(trace_answer(model, task.test[shown].prompt, None, LONGEST_ANSWER)))

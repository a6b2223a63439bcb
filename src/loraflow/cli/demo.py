"""`loraflow demo`: the whole job on the built-in small world."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.sources import MethodOptions
from loraflow.cli.values import parse_method_options
from loraflow.errors import SandboxError

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.demo.run import Result


def demo(
    task: Annotated[str, typer.Option(help="zh-math, zh-code, es-math, es-code, ru-math or ru-code.")] = "zh-math",
    output: Annotated[Path, typer.Option(help="Directory for the fusion, the data and every answer.")] = Path(
        "loraflow-demo"
    ),
    method_option: MethodOptions = [],  # noqa: B006 (typer reads the default)
    seed: Annotated[int, typer.Option(help="Of the examples' order while fitting.")] = 0,
    problems: Annotated[int, typer.Option(min=1, max=500, help="How many of the 500 test problems to answer.")] = 500,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let code tasks run generated code, in a sandbox.")
    ] = False,
) -> None:
    """Try the whole job, offline, on a small world that comes with the package.

    Its base model reads four languages and half knows two skills; its adapters are chat in one language (zh, es, ru)
    and a skill in English (math, code). A task needs both at once: the demo fits LoRA-Flow on 200 examples, compares
    it on test problems with the base, each adapter alone and the average, and shows which adapter spoke in one answer.
    """  # noqa: DOC501 (it is the --help text)
    import dataclasses
    import json

    from loraflow.demo.tasks import load_task

    chosen = load_task(task)
    if chosen.skill == "code" and not allow_code:
        raise SandboxError(f"The task {task!r} runs generated code. Say --allow-code, or take a math task.")

    from rich.console import Console

    from loraflow import training
    from loraflow.demo import run
    from loraflow.evaluation.sandbox import check_available
    from loraflow.files import write_atomically
    from loraflow.methods import get_method

    if chosen.skill == "code":
        check_available()
    console = Console()
    run.write_task(chosen, output / "data")
    method = get_method("lora-flow", chosen.adapters, parse_method_options(method_option))
    model = run.load_task_model(chosen, method)
    console.print(f"[bold]{task}[/]: {chosen.skill} asked and answered in {chosen.language}, from two adapters:")
    console.print(f"  {chosen.adapters[0]} (chat, no {chosen.skill}) and {chosen.adapters[1]} (English {chosen.skill})")
    config = dataclasses.replace(run.RECIPE, seed=seed)
    learned = model.num_learned_parameters()
    console.print(f"fitting {learned:,} gate values on {len(chosen.train)} examples; base and adapters stay frozen")
    fitted = training.fit(
        model, run.as_records(chosen.train), dev=run.as_records(chosen.dev), config=config, console=console
    )
    console.print(
        f"  {fitted.seconds:.0f} s; started at {_best(fitted.start)}; "
        f"dev loss {fitted.dev_loss:.4f} at step {fitted.kept_step}"
    )
    model.save_pretrained(output / "fusion", copy_adapters=True)
    results = _compare(model, chosen, output, problems, console)
    summaries = [result.summary() for result in results]
    write_atomically(
        output / "results.json", json.dumps({"task": task, "seed": seed, "results": summaries}, indent=2).encode()
    )
    console.print(_table(results, task))
    _show_trace(model, chosen, results[-1], console)
    console.print(f"\nfusion: {output}/fusion   data: {output}/data   every answer: {output}/answers", soft_wrap=True)
    console.print(f"try: loraflow trace {output}/fusion --prompt '...' --numbers", soft_wrap=True)


def _best(start: Any) -> str:
    return max(start, key=start.get)


def _compare(model: Any, task: Any, output: Path, count: int, console: Console) -> list[Result]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from loraflow.demo import run

    names = [*run.contenders(task), "lora-flow"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("answering", total=count * len(names))
        for position, name in enumerate(names):
            progress.update(bar, description=f"answering: {name}")
            file = output / "answers" / f"{name}.jsonl"

            def advance(done: int, total: int, before: int = position * count) -> None:
                progress.update(bar, completed=before + done)

            with contextlib.nullcontext() if name == "lora-flow" else model.using(name):
                results.append(run.evaluate(model, task, name, count, file, advance))
    return results


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

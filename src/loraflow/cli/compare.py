"""`loraflow compare`: methods x tasks x seeds, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli import options as o
from loraflow.cli import training_options as t
from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from loraflow.evaluation.compare.plan import Plan
    from loraflow.saved.fusion import SavedFusion

_WHAT = "What is compared"
_ON = "On what"
_RUN = "The run"
LONGEST_ANSWER = 512


def compare(
    plan: Annotated[
        str | None, typer.Argument(help="A plan (YAML), or a study by name; --list shows those.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Directory of the run; what is finished there is kept.", show_default=False),
    ] = None,
    methods: Annotated[
        list[str],
        typer.Option(
            "--methods",
            help="Rows: methods or adapters, several after one flag; of a plan, these of its rows.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default)
    fusions: Annotated[
        list[str],
        typer.Option(
            "--fusions",
            help="Saved fusions as further rows; base and adapters are the first one's where nothing else is said.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default)
    seeds: Annotated[
        list[int],
        typer.Option(
            "--seeds",
            help="Several after one flag.  [default: the plan's, or 0]",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default)
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="The row that the others are tested against.  [default: the last]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    setting: Annotated[
        str | None,
        typer.Option("--setting", help="Base, adapters and tasks: small-world, or a YAML file.", rich_help_panel=_ON),
    ] = None,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            help="Tasks of the setting; without one, tasks of lm-evaluation-harness. Several after "
            "one flag, or with commas.",
            rich_help_panel=_ON,
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default)
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    quantization: o.Quantization = None,
    test: Annotated[
        Path | None, typer.Option("--test", help="A task of your own: questions as JSON lines.", rich_help_panel=_ON)
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            "--scorer", help="How --test is scored: last-number, exact-match or code-tests.", rich_help_panel=_ON
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Training examples, for methods that learn.", rich_help_panel=_ON)
    ] = None,
    dev: t.Dev = None,
    prompt_field: t.PromptField = None,
    completion_field: t.CompletionField = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer to --test.", rich_help_panel=_ON)
    ] = LONGEST_ANSWER,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put harness tasks into the base's chat format.", rich_help_panel=_ON),
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only the first so many problems of each task.", rich_help_panel=_RUN)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Problems answered together.  [default: the plan's, or 16]", rich_help_panel=_RUN)
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that measure at the same time; one for each GPU, or some on a CPU.", rich_help_panel=_RUN
        ),
    ] = 1,
    device: o.Device = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Let scorers run what the model wrote, in the sandbox.", rich_help_panel=_RUN
        ),
    ] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Record the mean fusion weights of the answers too.", rich_help_panel=_RUN)
    ] = False,
    rescore: Annotated[
        bool,
        typer.Option(
            "--rescore",
            help="Score the kept answers anew, without a model; the plan is the run's own.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Only write the report of what is finished; the plan is the run's own.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Measure anew what was measured otherwise.", rich_help_panel=_RUN)
    ] = False,
    list_studies: Annotated[bool, typer.Option("--list", help="Show the studies, and exit.")] = False,
) -> None:
    """Compare methods on tasks: scores with intervals, tests against a reference, cost, every answer kept.

    A run goes on where it was interrupted: give the same command again. In the output directory are the report
    (Markdown, CSV, JSON, HTML), a record and all answers of each cell, and what was learned, as fusions.

    Examples: `loraflow compare granularity --setting small-world --tasks zh-math --output runs/granularity`;
    `loraflow compare --fusions zh-math --methods base average --tasks mgsm_direct_zh --output runs/zh`;
    `loraflow compare plan.yaml --output runs/mine`
    """  # noqa: DOC501 (it is the --help text)
    if list_studies:
        _print_studies()
        return
    if output is None:
        raise LoraflowError("`--output` is missing. Say where the run's files go; a run there goes on.")
    names = [name for given in tasks for name in given.split(",") if name]
    changes = {
        "seeds": seeds or None,
        "reference": reference,
        "limit": limit,
        "batch_size": batch_size,
        "weights": weights or None,
    }
    if plan is None and (report or rescore):
        plan = _plan_of_run(output)
    if plan is None and setting is None:
        fields = _fields(prompt_field, completion_field)
        task = {"train": data, "dev": dev, "max_new_tokens": max_new_tokens, "fields": fields}
        own = {
            "base": base,
            "adapters": o.parse_adapters(lora_modules),
            "revision": revision,
            "dtype": dtype,
            "quantization": quantization,
        }
        described = _setting(own, fusions, names, task, test, scorer, chat)
        chosen = _plan({"setting": described, "methods": _rows(methods, fusions), **changes})
    else:
        of_setting = {
            "--base": base,
            "--lora-modules": lora_modules,
            "--revision": revision,
            "--dtype": dtype if dtype != "auto" else None,
            "--quantization": quantization,
            "--test": test,
            "--scorer": scorer,
            "--data": data,
            "--dev": dev,
            "--prompt-field": prompt_field,
            "--completion-field": completion_field,
            "--max-new-tokens": max_new_tokens if max_new_tokens != LONGEST_ANSWER else None,
            "--chat": chat,
        }
        _refuse_setting(of_setting)
        chosen = _read(plan, setting, methods, fusions, {**changes, "tasks": names or None})
    _run(chosen, output, workers, device, allow_code, rescore, report, overwrite)


def _plan_of_run(output: Path) -> str | None:
    from loraflow.evaluation.compare.comparison import PLAN_FILE

    path = output / PLAN_FILE
    return str(path) if path.is_file() else None


def _fields(prompt: str | None, completion: str | None) -> dict[str, str] | None:
    found = t.fields(prompt, completion)
    return None if found is None else {"prompt": found.prompt, "completion": found.completion}


def _print_studies() -> None:
    from rich.console import Console
    from rich.table import Table

    from loraflow.evaluation.compare.plan import STUDIES, read_yaml, study_names

    table = Table("study", "what it finds out", box=None)
    for name in study_names():
        table.add_row(name, " ".join(read_yaml(STUDIES / f"{name}.yaml")["description"].split()))
    Console().print(table)


def _refuse_setting(given: dict[str, Any]) -> None:
    for flag, value in given.items():
        if value:
            raise LoraflowError(f"`{flag}` describes a setting, and a plan or --setting names one. Leave it out.")


def _rows(methods: list[str], fusions: list[str]) -> dict[str, Any]:
    if not methods and not fusions:
        raise LoraflowError("There is nothing to compare. Give a plan or study, --methods, or --fusions.")
    rows: dict[str, Any] = {Path(fusion).name: {"fusion": fusion} for fusion in fusions}
    if len(rows) < len(fusions):
        raise LoraflowError("Two of --fusions end in the same name. Name them in a plan.")
    for method in methods:
        if method in rows:
            raise LoraflowError(f"`--methods` and --fusions both have a row {method!r}. Name them in a plan.")
    return {**{method: method for method in methods}, **rows}


def _setting(
    own: dict[str, Any],
    fusions: list[str],
    names: list[str],
    task: dict[str, Any],
    test: Path | None,
    scorer: str | None,
    chat: bool,
) -> dict[str, Any]:
    """The setting that single flags describe."""
    if fusions:
        from loraflow.saved.fusion import SavedFusion

        saved = [SavedFusion.open(fusion) for fusion in fusions]
        # All rows are asked in the format that the fusions were made for: else prompts would be compared, not methods.
        own = {**own, "prompt": _prompt_of(saved)}
        if own["base"] is None or not own["adapters"]:
            own = {**own, **_missing_of(saved[0], own)}
    for key, flag in (("base", "--base"), ("adapters", "--lora-modules")):
        if not own[key]:
            raise LoraflowError(f"`{flag}` is missing. Give --base and --lora-modules, --fusions, or a --setting.")
    if test is None and not names:
        raise LoraflowError("There is no task. Give --tasks of lm-evaluation-harness, or --test with a --scorer.")
    task = {key: str(value) if isinstance(value, Path) else value for key, value in task.items() if value is not None}
    tasks: dict[str, Any] = {name: {**task, "harness": name, "chat": chat} for name in names}
    if test is not None:
        tasks[test.stem] = {**task, "test": str(test), "scorer": scorer}
    return {**{key: value for key, value in own.items() if value is not None}, "tasks": tasks}


def _missing_of(saved: SavedFusion, own: dict[str, Any]) -> dict[str, Any]:
    """What a fusion says of a setting where no flag does."""
    found = {
        "base": own["base"] or saved.base,
        "revision": saved.config.base.revision,
        "quantization": saved.config.base.quantization,
        "adapters": {
            name: source.path + (f"@{source.revision}" if source.revision else "")
            for name, source in saved.recorded_sources.items()
        },
    }
    return {key: value for key, value in found.items() if not own[key]}


def _prompt_of(fusions: list[SavedFusion]) -> dict[str, Any]:
    """The prompt format of fusions.

    Raises:
        LoraflowError: if they have several.
    """
    first, *others = fusions
    for other in others:
        if other.config.prompt != first.config.prompt:
            raise LoraflowError(
                f"The fusions {first.name} and {other.name} were made with different prompt formats. Compare them in a "
                "plan that says which one is used."
            )
    return first.config.prompt.model_dump(exclude_none=True)


def _plan(content: dict[str, Any]) -> Plan:
    from loraflow.evaluation.compare.plan import make_plan

    return make_plan({key: value for key, value in content.items() if value is not None}, Path.cwd() / "command line")


def _read(
    plan: str | None, setting: str | None, methods: list[str], fusions: list[str], changes: dict[str, Any]
) -> Plan:
    from loraflow.errors import did_you_mean
    from loraflow.evaluation.compare.plan import read_plan

    if plan is None:
        return _plan({"setting": setting, "methods": _rows(methods, fusions), **changes})
    read = read_plan(plan, setting=setting, **changes)
    rows = dict(read.methods)
    for name in methods:
        if name not in rows:
            raise LoraflowError(f"The plan {plan!r} has no row {name!r}. {did_you_mean(name, rows)}")
    # In the order in which they were asked for: the last is the reference where nothing else is.
    kept = {name: rows[name] for name in methods} if methods else rows
    if fusions:
        raise LoraflowError("`--fusions` are rows, and a plan names its own. Add them there.")
    if changes["reference"] is not None and read.reference not in kept:
        raise LoraflowError(f"`--reference` (={read.reference!r}) is not among --methods. Name it there too.")
    reference = read.reference if read.reference in kept else None
    return read.model_copy(update={"methods": kept, "reference": reference})


def _run(
    plan: Plan,
    output: Path,
    workers: int,
    device: str | None,
    allow_code: bool,
    rescore: bool,
    report: bool,
    overwrite: bool,
) -> None:
    from rich.console import Console

    from loraflow.evaluation.compare.comparison import Options, identities, open_comparison
    from loraflow.evaluation.compare.comparison import compare as measure
    from loraflow.evaluation.compare.comparison import rescore as score_anew
    from loraflow.evaluation.compare.report import write_report
    from loraflow.evaluation.compare.store import Store

    console = Console(stderr=True)
    failed = 0
    if rescore:
        console.print(f"scores changed in {score_anew(plan, output, allow_code=allow_code)} cells")
    elif not report:
        options = Options(device=device, workers=workers, allow_code=allow_code)
        try:
            failed = measure(plan, output, options=options, overwrite=overwrite, console=console)
        except KeyboardInterrupt:
            console.print("What is finished is kept. The same command goes on.")
            raise
    # A report runs no code, whatever its tasks would.
    comparison, store = open_comparison(plan, allow_code=True), Store(output)
    if failed and not any(store.read(cell) for cell in comparison.cells):
        console.print(f"[bold red]All {failed} cells failed.[/] There is nothing to report.")
        raise typer.Exit(1)
    table = write_report(comparison, store, identities(comparison))
    _print_table(table)
    console.print(f"report: {output}/report.html, .md, .csv, .json; answers: {output}/cells", soft_wrap=True)
    if failed:
        console.print(f"[bold red]{failed} cells failed.[/] Give the same command again to try those once more.")
        raise typer.Exit(1)


def _print_table(table: Any) -> None:
    """Show the scores; on a terminal that is too narrow for all tasks, their average or else the last."""
    from rich.console import Console

    from loraflow.evaluation.compare.table import AVERAGE

    console = Console()
    columns = [*table.tasks, *([AVERAGE] if any(row.task == AVERAGE for row in table.rows) else [])]
    caption = f"per cent, with 95 % intervals; * differs from {table.reference}"
    shown = _score_table(table, columns, caption)
    width = Console(width=10_000).measure(shown).maximum
    if not console.is_terminal:
        # In a log no column is wrapped.
        console = Console(width=max(width, console.width))
    elif width > console.width and len(columns) > 1:
        shown = _score_table(table, columns[-1:], f"{caption}; the report has every task")
    console.print(shown)


def _score_table(table: Any, columns: list[str], caption: str) -> Any:
    from rich.table import Table

    from loraflow.evaluation.compare.report import p_text, score

    shown = Table("method", *columns, "p, corrected", title=table.title, box=None, caption=caption)
    for name in table.contenders:
        rows = [table.row(name, column) for column in columns]
        cells = ["" if row is None else score(row) + "*" * row.significant for row in rows]
        shown.add_row(name, *cells, "" if rows[-1] is None else p_text(rows[-1].p_corrected))
    return shown

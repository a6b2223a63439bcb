"""`loraflow compare`: methods x tasks x seeds, in one table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.groups import Given, options_of, panel, with_groups
from loraflow.cli.sources import Sources
from loraflow.cli.texts import Dev, FieldNames, Stop, stop_strings
from loraflow.errors import LoraflowError, did_you_mean

if TYPE_CHECKING:
    from loraflow.evaluation.compare.options import Cluster
    from loraflow.evaluation.compare.plan import Plan
    from loraflow.saved.fusion import SavedFusion

_row = panel("What is compared")
_task = panel("On what")
_run_option = panel("The run")
_cluster_option = panel("On a cluster")


@dataclass(frozen=True)
class Rows:
    """What is compared."""

    methods: Annotated[
        list[str],
        _row(
            "--methods",
            help="Rows: methods or adapters, several after one flag; of a plan, these of its rows or curves.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    fusions: Annotated[
        list[str],
        _row(
            "--fusions",
            help="Saved fusions as further rows; base and adapters are the first one's where nothing else is said.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    seeds: Annotated[
        list[int], _row("--seeds", help="Several after one flag.  [default: the plan's, or 0]", show_default=False)
    ] = field(default_factory=list)
    reference: Annotated[
        str | None, _row("--reference", help="The row that the others are tested against.  [default: the last]")
    ] = None

    def described(self) -> dict[str, Any]:
        """The rows as a plan has them.

        Raises:
            LoraflowError: if there are none, or two have one name.
        """
        if not self.methods and not self.fusions:
            raise LoraflowError("There is nothing to compare. Give a plan or study, --methods, or --fusions.")
        rows: dict[str, Any] = {Path(fusion).name: {"fusion": fusion} for fusion in self.fusions}
        if len(rows) < len(self.fusions):
            raise LoraflowError("Two of --fusions end in the same name. Name them in a plan.")
        for method in self.methods:
            if method in rows:
                raise LoraflowError(f"`--methods` and --fusions both have a row {method!r}. Name them in a plan.")
        return {**{method: method for method in self.methods}, **rows}

    def chosen(self, plan: Plan, origin: str) -> Plan:
        """A plan with these of its rows, in the order in which they were asked for.

        Raises:
            LoraflowError: if it has not got one of them.
        """
        curves = {spec.curve for spec in plan.methods.values() if spec.curve is not None}
        kept = {} if self.methods else dict(plan.methods)
        for name in self.methods:
            rows = {row: spec for row, spec in plan.methods.items() if name in (row, spec.curve)}
            if not rows:
                known = [*plan.methods, *curves]
                raise LoraflowError(f"The plan {origin!r} has no row {name!r}. {did_you_mean(name, known)}")
            kept.update(rows)
        if self.fusions:
            raise LoraflowError("`--fusions` are rows, and a plan names its own. Add them there.")
        if self.reference is not None and plan.reference not in kept:
            raise LoraflowError(f"`--reference` (={plan.reference!r}) is not among --methods. Name it there too.")
        # Without one, the last row is the reference.
        reference = plan.reference if plan.reference in kept else None
        return plan.model_copy(update={"methods": kept, "reference": reference})


@dataclass(frozen=True)
class OwnTasks:
    """Tasks that no setting names."""

    test: Annotated[str | None, _task("--test", help="A task of your own: questions, given as `fit`'s data.")] = None
    scorer: Annotated[
        str | None, _task("--scorer", help="How --test is scored: last-number, exact-match or code-tests.")
    ] = None
    data: Annotated[str | None, _task("--data", help="Training examples, for methods that learn.")] = None
    dev: Dev = None
    names: FieldNames = field(default_factory=FieldNames)
    max_new_tokens: Annotated[int, _task(help="Longest answer to --test.")] = 512
    stop: Stop = field(default_factory=list)
    chat: Annotated[bool, _task("--chat", help="Put harness tasks into the base's chat format.")] = False

    def described(self, harness: list[str]) -> dict[str, Any]:
        """The tasks as a setting has them.

        Raises:
            LoraflowError: if there is none.
        """
        from loraflow.examples import Source

        fields = self.names.fields()
        if self.test is None and not harness:
            raise LoraflowError("There is no task. Give --tasks of lm-evaluation-harness, or --test with a --scorer.")
        task = _known(
            train=self.data,
            dev=self.dev,
            max_new_tokens=self.max_new_tokens,
            stop=stop_strings(self.stop) or None,
            fields=None if fields is None else {"prompt": fields.prompt, "completion": fields.completion},
        )
        tasks: dict[str, Any] = {name: {**task, "harness": name, "chat": self.chat} for name in harness}
        if self.test is not None:
            name = Path(Source.parse(self.test).path).stem
            tasks[name] = {**task, "test": self.test, "scorer": self.scorer}
        return tasks


@dataclass(frozen=True)
class Measuring:
    """How much is measured, by what, and what becomes of it."""

    limit: Annotated[int | None, _run_option("--limit", help="Only the first so many problems of each task.")] = None
    problems: Annotated[
        str | None,
        _run_option(
            "--problems", help="Which are answered: test, or dev, to choose recipes by.  [default: the plan's, or test]"
        ),
    ] = None
    batch_size: Annotated[int | None, _run_option(help="Problems answered together.  [default: the plan's, or 16]")] = (
        None
    )
    workers: Annotated[
        int, _run_option(help="Processes that measure at the same time; one for each GPU, or some on a CPU.")
    ] = 1
    allow_code: Annotated[
        bool, _run_option("--allow-code", help="Let scorers run what the model wrote, in the sandbox.")
    ] = False
    weights: Annotated[bool, _run_option("--weights", help="Record the mean fusion weights of the answers too.")] = (
        False
    )
    rescore: Annotated[
        bool, _run_option("--rescore", help="Score the kept answers anew, without a model; the plan is the run's own.")
    ] = False
    report: Annotated[
        bool, _run_option("--report", help="Only write the report of what is finished; the plan is the run's own.")
    ] = False
    overwrite: Annotated[bool, _run_option("--overwrite", help="Measure anew what was measured otherwise.")] = False


@dataclass(frozen=True)
class OnCluster:
    """Where cells are measured, if not on this machine."""

    ray: Annotated[
        str | None,
        _cluster_option(
            "--ray",
            help="Measure on a cluster of Ray: `host:port` of its head, auto (the one that this machine is a part of), "
            "or local. Needs `pip install 'loraflow[ray]'`.",
            show_default=False,
        ),
    ] = None
    cell_cpus: Annotated[float, _cluster_option("--cell-cpus", help="Processors of each cell.")] = 1
    cell_gpus: Annotated[
        float | None,
        _cluster_option(
            "--cell-gpus", help="GPUs of each cell, or a part of one.  [default: 1 if the cluster has any]"
        ),
    ] = None
    cell_memory_gib: Annotated[
        float | None, _cluster_option("--cell-memory", help="Memory that is set aside for each cell, in GiB.")
    ] = None
    retries: Annotated[int, _cluster_option(help="How often a cell is tried again whose worker was lost.")] = 2

    def options(self, given: Given) -> Cluster | None:
        """The cluster that is asked for.

        Raises:
            LoraflowError: if something else is said of it, and it is not.
        """
        if self.ray is None:
            for flag in given.flags(options_of(OnCluster)):
                raise LoraflowError(f"`{flag}` is for cells on a cluster. Give --ray too, or leave it out.")
            return None
        from loraflow.evaluation.compare import Cluster

        return Cluster(self.ray, self.cell_cpus, self.cell_gpus, self.cell_memory_gib, self.retries)


@with_groups
def compare(
    *,
    given: Given,
    plan: Annotated[
        str | None, typer.Argument(help="A plan (YAML), or a study by name; --list shows those.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Directory of the run; what is finished there is kept.", show_default=False),
    ] = None,
    rows: Rows,
    setting: Annotated[
        str | None, _task("--setting", help="Base, adapters and tasks: small-world, many-world, or a YAML file.")
    ] = None,
    tasks: Annotated[
        list[str],
        _task(
            "--tasks",
            help="Tasks of the setting; without one, tasks of lm-evaluation-harness. Several after "
            "one flag, or with commas.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default)
    sources: Sources,
    own: OwnTasks,
    measuring: Measuring,
    on_cluster: OnCluster,
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
    if plan is None and (measuring.report or measuring.rescore):
        from loraflow.evaluation.compare.store import PLAN_FILE

        plan = str(output / PLAN_FILE) if (output / PLAN_FILE).is_file() else None
    if plan is not None or setting is not None:
        for flag in given.flags({*options_of(Sources), *options_of(OwnTasks)} - {"device"}):
            raise LoraflowError(f"`{flag}` describes a setting, and a plan or --setting names one. Leave it out.")
    names = [name for several in tasks for name in several.split(",") if name]
    changes = _known(
        seeds=rows.seeds or None,
        reference=rows.reference,
        limit=measuring.limit,
        problems=measuring.problems,
        batch_size=measuring.batch_size,
        weights=measuring.weights or None,
    )
    if plan is not None:
        from loraflow.evaluation.compare.plan import read_plan

        chosen = rows.chosen(read_plan(plan, setting=setting, **changes, tasks=names or None), plan)
    elif setting is not None:
        chosen = _made({"setting": setting, "methods": rows.described(), **changes, **_known(tasks=names or None)})
    else:
        described = {**_base(sources, rows.fusions), "tasks": own.described(names)}
        chosen = _made({"setting": described, "methods": rows.described(), **changes})
    _run(chosen, output, sources.placement.device, measuring, on_cluster.options(given))


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _print_studies() -> None:
    from rich.console import Console
    from rich.table import Table

    from loraflow.evaluation.compare.plan import STUDIES, study_names
    from loraflow.training.recipes import read_yaml

    table = Table("study", "what it finds out", box=None)
    for name in study_names():
        table.add_row(name, " ".join(read_yaml(STUDIES / f"{name}.yaml")["description"].split()))
    Console().print(table)


def _base(sources: Sources, fusions: list[str]) -> dict[str, Any]:
    """The base and the adapters as a setting has them; the first fusion's where nothing else is said.

    Raises:
        LoraflowError: if there are none.
    """
    placement = sources.placement
    own: dict[str, Any] = {
        "base": sources.base,
        "adapters": sources.paths(),
        "revision": placement.revision,
        "dtype": placement.dtype,
        "quantization": placement.quantization,
    }
    if fusions:
        from loraflow.saved.fusion import SavedFusion

        saved = [SavedFusion.open(fusion) for fusion in fusions]
        # All rows are asked in the format that the fusions were made for: else prompts would be compared, not methods.
        prompt, stop = _manner_of(saved)
        own = {**own, "prompt": prompt, "stop": stop or None}
        if own["base"] is None or not own["adapters"]:
            own = {**own, **_missing_of(saved[0], own)}
    for key, flag in (("base", "--base"), ("adapters", "--lora-modules")):
        if not own[key]:
            raise LoraflowError(f"`{flag}` is missing. Give --base and --lora-modules, --fusions, or a --setting.")
    return _known(**own)


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


def _manner_of(fusions: list[SavedFusion]) -> tuple[dict[str, Any], list[str]]:
    """The prompt format of fusions, and the texts that end their answers because somebody asked for it.

    Raises:
        LoraflowError: if they have several.
    """
    first, *others = fusions
    stops = [fusion.config.endings.stop if fusion.config.endings else () for fusion in fusions]
    for other, stop in zip(others, stops[1:], strict=True):
        same = {"prompt formats": other.config.prompt == first.config.prompt, "stop strings": stop == stops[0]}
        for what, is_same in same.items():
            if not is_same:
                raise LoraflowError(
                    f"The fusions {first.name} and {other.name} were made with different {what}. Compare them in a "
                    "plan that says which one is used."
                )
    return first.config.prompt.model_dump(exclude_none=True), list(stops[0])


def _made(content: dict[str, Any]) -> Plan:
    from loraflow.evaluation.compare.plan import make_plan

    return make_plan(content, Path.cwd() / "command line")


def _run(plan: Plan, output: Path, device: str | None, measuring: Measuring, cluster: Cluster | None) -> None:
    from rich.console import Console

    from loraflow.evaluation.compare import Options, Store, identities, open_comparison, write_report
    from loraflow.evaluation.compare import compare as measure
    from loraflow.evaluation.compare import rescore as score_anew

    console = Console(stderr=True)
    failed = 0
    allow_code = measuring.allow_code
    if measuring.rescore:
        console.print(f"scores changed in {score_anew(plan, output, allow_code=allow_code)} cells")
    elif not measuring.report:
        options = Options(device=device, workers=measuring.workers, allow_code=allow_code, cluster=cluster)
        try:
            failed = measure(plan, output, options=options, overwrite=measuring.overwrite, console=console)
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
    console.print(f"report: {output}/report.html, .md, .tex, .csv, .json; answers: {output}/cells", soft_wrap=True)
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

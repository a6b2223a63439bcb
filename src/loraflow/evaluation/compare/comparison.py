"""What a comparison has to do: a plan's rows on its tasks, what makes each cell what it is, and which are missing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraflow.errors import DataError, LoraflowError, SandboxError
from loraflow.evaluation.compare.plan import EVERY_TASK, Plan, RowSpec
from loraflow.evaluation.compare.rows import PlannedRow
from loraflow.evaluation.compare.store import Cell, Store
from loraflow.evaluation.compare.tasks import Setting, Task, load_setting
from loraflow.evaluation.harness.evaluate import check_task
from loraflow.evaluation.sandbox import check_available
from loraflow.saved.fusion import SavedFusion

_ABSENT = object()


@dataclass(frozen=True)
class Comparison:
    """A plan with all that it names.

    Attributes:
        rows: the rows, by name; those that are to learn on every task are one for each.
        left_out: why rows are missing in some tasks where they cannot be.
    """

    plan: Plan
    setting: Setting
    rows: Mapping[str, PlannedRow]
    cells: Sequence[Cell]
    left_out: Sequence[str] = ()

    @property
    def reference(self) -> str:
        """The row that the others are tested against."""
        named = self.plan.reference
        return named if named is not None and named in self.rows else list(self.rows)[-1]

    def learned_on(self, cell: Cell) -> str:
        """The task under whose name a cell's row keeps what it learned."""
        row = self.rows[cell.method]
        source = self.setting.tasks[row.spec.fitted_on or cell.task]
        if row.reads_adapters(source):
            # What is learned from adapters' own data is the same for all tasks that fuse the same ones, asked alike.
            others = (self.setting.tasks[other.task] for other in self.cells if other.method == cell.method)
            source = next((task for task in others if _fuse_alike(row, task, source)), source)
        return source.learns_as


def _fuse_alike(row: PlannedRow, task: Task, other: Task) -> bool:
    prompts = [one.train_prompt or one.prompt for one in (task, other)]
    return prompts[0] == prompts[1] and task.stop == other.stop and row.adapters(task) == row.adapters(other)


def open_comparison(plan: Plan, *, allow_code: bool = False) -> Comparison:
    """Read all that a plan names, and find out what is wrong with it before anything is measured.

    Raises:
        DataError: if a row cannot be measured on one of the tasks.
        LoraflowError: if something else in the plan is wrong.
    """
    # Rows may learn on tasks that are not answered.
    sources = {s.fitted_on for s in plan.methods.values() if s.fitted_on not in (None, EVERY_TASK)}
    names = None if plan.tasks is None else [*plan.tasks, *sorted(sources - set(plan.tasks))]
    setting = load_setting(plan.setting, tasks=names, allow_code=allow_code)
    tasks = plan.tasks or list(setting.tasks)
    if plan.problems == "dev":
        setting = dataclasses.replace(setting, tasks={**setting.tasks, **{t: setting.tasks[t].on_dev() for t in tasks}})
    rows = {row.name: row for name, spec in plan.methods.items() for row in _rows(name, spec, setting, tasks)}
    cells: list[Cell] = []
    left_out: list[str] = []
    for task in tasks:
        for row in rows.values():
            try:
                row.check(setting.tasks[task])
            except DataError as error:
                if not row.spec.if_possible:
                    raise
                left_out.append(f"{row.name} on {task}: {error}")
                continue
            seeds = plan.seeds if row.seeded(setting.tasks[task]) else [None]
            cells.extend(Cell(task, row.name, seed) for seed in seeds)
    return Comparison(plan, setting, rows, cells, left_out)


def _rows(name: str, spec: RowSpec, setting: Setting, tasks: Sequence[str]) -> Iterator[PlannedRow]:
    if spec.fitted_on != EVERY_TASK:
        yield PlannedRow(name, spec, setting)
        return
    for task in tasks:
        yield PlannedRow(f"{name} of {task}", spec.model_copy(update={"fitted_on": task}), setting)


def check_tasks(comparison: Comparison, allow_code: bool) -> None:
    """Refuse tasks that there are not, and those that run code unless that is allowed and can be done safely.

    Raises:
        SandboxError: if one runs code and may not.
    """
    runs_code = False
    for name in dict.fromkeys(cell.task for cell in comparison.cells):
        task = comparison.setting.tasks[name]
        if task.runs_code and not allow_code:
            raise SandboxError(f"The task {name!r} runs generated code. Say `allow_code=True`, or leave it out.")
        runs_code |= task.runs_code
        if task.harness is not None:
            runs_code |= check_task(task.harness.name, allow_code=allow_code, include_path=task.harness.folder)
    if runs_code:
        check_available()


def identities(comparison: Comparison) -> dict[Cell, dict[str, Any]]:
    """What makes each cell the measurement that it is, as JSON values."""
    setting, plan = comparison.setting, comparison.plan
    tests = {name: task.test_digest(plan.limit) for name, task in setting.tasks.items()}
    base = setting.base_identity()
    found = {}
    for cell in comparison.cells:
        row, task = comparison.rows[cell.method], setting.tasks[cell.task]
        fusion = row.spec.fusion
        fused, fitted = ([], []) if fusion is not None else (row.adapters(task), row.adapters(row.fit_task(task)))
        found[cell] = {
            "method": row.spec.short(),
            "base": base,
            "adapters": [[name, setting.weights_digest(name)] for name in fused],
            "fusion": None if fusion is None else _fusion_identity(fusion),
            "learned": row.fit_identity(task, cell.seed),
            # Before the problems, of which it decides how many there are: people know it.
            "limit": plan.limit,
            "problems": tests[cell.task],
        }
        if own := row.uses_own(task):
            found[cell]["own"] = own
        if others := [name for name in fitted if name not in fused]:
            # What it learned with, and does not answer with; where there is none, nothing is to be told apart.
            found[cell]["fitted_adapters"] = [[name, setting.weights_digest(name)] for name in others]
    return found


def _fusion_identity(fusion: str) -> dict[str, Any]:
    config = SavedFusion.open(fusion).config
    return {
        "adapters": [[adapter.name, adapter.digest] for adapter in config.adapters],
        "method": config.method.model_dump(mode="json"),
        "prompt": config.prompt.model_dump(mode="json"),
        "learned": config.weights_digest,
        # Where there are none, as before the fusion had any, nothing is to be told apart.
        **({"endings": config.endings.model_dump(mode="json")} if config.endings else {}),
        **({"added_tokens": sorted(config.added_tokens)} if config.added_tokens else {}),
    }


def unfinished(comparison: Comparison, store: Store, *, overwrite: bool) -> dict[Cell, dict[str, Any]]:
    """The cells that are to be measured, or whose weights are to be recorded, each with its identity.

    Raises:
        LoraflowError: if a finished one was measured otherwise, and may not be replaced.
    """
    missing = {}
    for cell, identity in identities(comparison).items():
        record = store.read(cell)
        if record is not None and record.identity != identity:
            if not overwrite:
                raise LoraflowError(
                    f"{store.record_path(cell)} was measured with another {difference(record.identity, identity)}. "
                    "Give another directory, or replace such cells with `overwrite=True`."
                )
            store.remove(cell)
            record = None
        # Runs of before had weights without who was chosen by them.
        weighed = record is not None and record.weights is not None and (not record.weights or bool(record.chosen))
        if record is None or (comparison.plan.weights and not weighed):
            missing[cell] = identity
    return missing


def difference(identity: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In what a cell that is not the wanted one differs from it."""
    # A key that one side lacks is another than one whose value is None.
    key = next(key for key in {**wanted, **identity} if identity.get(key, _ABSENT) != wanted.get(key, _ABSENT))
    return f"`{key}`: {_shown(identity.get(key, _ABSENT))}, not {_shown(wanted.get(key, _ABSENT))}"


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."

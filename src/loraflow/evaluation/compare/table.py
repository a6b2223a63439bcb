"""From finished cells to a table: means, intervals, tests against the reference, and what each row cost."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loraflow.errors import LoraflowError
from loraflow.evaluation.compare.comparison import Comparison
from loraflow.evaluation.compare.store import Cell, Record, Store
from loraflow.evaluation.statistics import (
    bootstrap_means,
    bootstrap_p,
    holm,
    mcnemar_p,
    percentile_interval,
    wilson_interval,
)

AVERAGE = "average"
SIGNIFICANT = 0.05

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One method on one task, or on average over all tasks.

    Attributes:
        contender: the method's name in the table.
        task: the task, or "average".
        seeds: how many runs.
        seeded: whether another seed could give something else.
        problems: how many problems each run answered.
        mean: mean score over runs and problems.
        interval: its 95 % interval: Wilson's for one run of scores 0 or 1 and where all scores are 0 or all are 1, else
            by bootstrap over problems and runs.
        difference: to the reference, on the same problems; None for the reference itself and where it is missing.
        difference_interval: its paired 95 % bootstrap interval.
        test: "McNemar" (one run each, scores 0 or 1) or "bootstrap" (paired).
        p: two-sided p-value of that test.
        p_corrected: the same, by Holm's method over all comparisons of the table.
        tokens_per_s: generated tokens a second, where they were counted.
        fitted_on: the task that it learned on, where that is another one's choice.
        curve: the curve that it is a point of.
        weights: mean fusion weight of each adapter, and its standard deviation between answers.
        own_chosen: in how many of the answers whose weights were recorded the adapter made for the problem has the
            largest mean weight, as a share; None where it is not among those fused, or nothing says which it is.
        share: whether scores are shares, between 0 and 1, which are shown in per cent.
        notice: what a reader of the scores has to know.
    """

    contender: str
    task: str
    metric: str
    seeds: int
    seeded: bool
    problems: int
    mean: float
    interval: Interval
    difference: float | None = None
    difference_interval: Interval | None = None
    test: str | None = None
    p: float | None = None
    p_corrected: float | None = None
    learned_parameters: int = 0
    examples: int | None = None
    fit_s: float = 0.0
    tokens_per_s: float | None = None
    memory_mib: float | None = None
    fitted_on: str | None = None
    curve: str | None = None
    weights: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    own_chosen: float | None = None
    share: bool = True
    higher_is_better: bool = True
    notice: str | None = None

    @property
    def significant(self) -> bool:
        """Whether it differs from the reference at 5 %, corrected for the number of comparisons."""
        return self.p_corrected is not None and self.p_corrected < SIGNIFICANT


@dataclass(frozen=True)
class Table:
    """A comparison's result.

    Attributes:
        rows: by task, then row; the averages last.
        missing: cells that are not finished.
    """

    title: str
    description: str
    reference: str
    contenders: Sequence[str]
    tasks: Sequence[str]
    rows: Sequence[Row]
    missing: Sequence[str]
    seeds: Sequence[int]
    limit: int | None

    def row(self, contender: str, task: str) -> Row | None:
        """One entry; None where it is missing."""
        return next((row for row in self.rows if (row.contender, row.task) == (contender, task)), None)


@dataclass(frozen=True)
class _Entry:
    """The scores of one method on one task, `[runs, problems]`, and resampled means of them."""

    outcomes: np.ndarray
    resampled: np.ndarray
    records: Sequence[Record]


def make_table(comparison: Comparison, store: Store, wanted: Mapping[Cell, Mapping[str, Any]] | None = None) -> Table:
    """Work out the table of a run, finished or not; cells that are not what is `wanted` (`identities`) are missing.

    Raises:
        LoraflowError: if no cell is finished, or two have not answered as many problems of a task.
    """
    records: dict[tuple[str, str], list[Record]] = {}
    missing = []
    for cell in comparison.cells:
        record = store.read(cell)
        if record is None:
            missing.append(str(cell))
        elif wanted is not None and record.identity != wanted[cell]:
            missing.append(f"{cell} (measured otherwise)")
        else:
            records.setdefault((cell.method, cell.task), []).append(record)
    if not records:
        raise LoraflowError(f"{store.root} has no finished cells of this plan. Run it first.")
    tasks = list(dict.fromkeys(cell.task for cell in comparison.cells))
    # The smallest p-value that they can show, 2 of them, must stay below the level after the correction.
    resamples = max(10_000, 100 * len(records))
    entries = {key: _entry(comparison, *key, found, resamples) for key, found in records.items()}

    def rows_on(name: str, over: Sequence[str]) -> list[Row]:
        """The rows of one task, or of the mean over several: of methods that have them all."""
        found = {row: [entries[row, task] for task in over if (row, task) in entries] for row in comparison.rows}
        whole = {row: several for row, several in found.items() if len(several) == len(over)}
        return [_row(comparison, row, name, mine, whole.get(comparison.reference)) for row, mine in whole.items()]

    rows = [row for task in tasks for row in rows_on(task, [task])]
    shares = {task: all(_is_share(entry) for (_, of), entry in entries.items() if of == task) for task in tasks}
    rows = [dataclasses.replace(row, share=shares[row.task]) for row in rows]
    # Shares and perplexities, say, have no mean that says anything.
    if len(tasks) > 1 and all(shares.values()) and all(row.higher_is_better for row in rows):
        rows += rows_on(AVERAGE, tasks)
    return Table(
        title=comparison.plan.title,
        description=comparison.plan.description,
        reference=comparison.reference,
        contenders=[name for name in comparison.rows if any(row.contender == name for row in rows)],
        tasks=tasks,
        rows=_corrected(rows),
        missing=missing,
        seeds=comparison.plan.seeds,
        limit=comparison.plan.limit,
    )


def _entry(comparison: Comparison, method: str, task: str, records: Sequence[Record], resamples: int) -> _Entry:
    counts = {len(record.scores) for record in records}
    if len(counts) > 1:
        raise LoraflowError(
            f"The runs of {method!r} on {task!r} answered {' and '.join(map(str, sorted(counts)))} problems. "
            "Remove the run's cells, and measure them anew."
        )
    outcomes = np.array([record.scores for record in records], dtype=float)
    # Tasks that are translations of one another are resampled alike.
    resampled = bootstrap_means(
        outcomes,
        problems_seed=_number(comparison.setting.tasks[task].problems or task),
        # One fit that answers several tasks is drawn alike in all of them.
        runs_seed=_number(f"{records[0].fitted_on or task} {method}"),
        resamples=resamples,
    )
    return _Entry(outcomes, resampled, records)


def _number(text: str) -> int:
    return zlib.crc32(text.encode())


def _row(
    comparison: Comparison, contender: str, task: str, mine: Sequence[_Entry], theirs: Sequence[_Entry] | None
) -> Row:
    """A row of one task, or of the mean over several, with its difference to the reference where that has them all."""
    first, records = mine[0].records[0], [record for entry in mine for record in entry.records]
    resampled = np.mean([entry.resampled for entry in mine], axis=0)
    row = Row(
        contender=contender,
        task=task,
        metric=first.metric,
        seeds=min(len(entry.records) for entry in mine),
        seeded=any(record.cell.seed is not None for record in records),
        problems=sum(entry.outcomes.shape[1] for entry in mine),
        mean=_mean(mine),
        interval=_interval(mine, resampled),
        learned_parameters=max(record.learned_parameters for record in records),
        examples=max(record.examples or 0 for record in records) or None,
        fit_s=float(np.mean([record.fit_s for record in records])),
        tokens_per_s=_speed(records),
        memory_mib=max(record.memory_mib for record in records),
        fitted_on=first.fitted_on,
        own_chosen=_own_chosen(comparison, records),
        curve=comparison.rows[contender].spec.curve,
    )
    if task != AVERAGE:
        weights = _mean_weights([record.weights for record in records if record.weights])
        row = dataclasses.replace(row, weights=weights, higher_is_better=first.higher_is_better, notice=first.notice)
    if contender == comparison.reference or theirs is None:
        return row
    for entry, reference in zip(mine, theirs, strict=True):
        if reference.outcomes.shape[1] != entry.outcomes.shape[1]:
            raise LoraflowError(
                f"{contender!r} and {comparison.reference!r} answered {entry.outcomes.shape[1]} and "
                f"{reference.outcomes.shape[1]} problems of {task!r}. Measure one of them anew with the other's limit."
            )
    differences = resampled - np.mean([entry.resampled for entry in theirs], axis=0)
    if len(mine) == 1 and all(len(e.outcomes) == 1 and _right_or_wrong(e) for e in (*mine, *theirs)):
        test, p = "McNemar", mcnemar_p(*(entry.outcomes[0].astype(int) for entry in (*mine, *theirs)))
    else:
        test, p = "bootstrap", bootstrap_p(differences)
    interval = percentile_interval(differences)
    return dataclasses.replace(row, difference=row.mean - _mean(theirs), difference_interval=interval, test=test, p=p)


def _mean(entries: Sequence[_Entry]) -> float:
    return float(np.mean([entry.outcomes.mean() for entry in entries]))


def _mean_weights(recorded: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Means and standard deviations of the adapters' weights, over the runs that have them."""
    if not recorded:
        return {}
    means = {name: np.mean([of_run[name] for of_run in recorded], axis=0).tolist() for name in recorded[0]}
    return {name: (mean, spread) for name, (mean, spread) in means.items()}


def _own_chosen(comparison: Comparison, records: Sequence[Record]) -> float | None:
    """The share of answers that chose the adapter made for their problem, each record counting the same."""
    shares = []
    for record in records:
        own = comparison.setting.tasks[record.cell.task].own
        if not own or not record.weights or not record.chosen or not set(own) <= record.weights.keys():
            return None
        chosen = [name == own[at % len(own)] for at, name in enumerate(record.chosen)]
        shares.append(sum(chosen) / len(chosen))
    return float(np.mean(shares))


def _interval(entries: Sequence[_Entry], resampled: np.ndarray) -> Interval:
    """The interval of the resampled means of one entry, or of several ones' average."""
    if len(entries) == len(entries[0].outcomes) == 1 and _right_or_wrong(entries[0]):
        return wilson_interval(int(entries[0].outcomes.sum()), entries[0].outcomes.shape[1])
    always = {float(value) for entry in entries for value in np.unique(entry.outcomes)}
    if always in ({0.0}, {1.0}):
        # A bootstrap of nothing but zeros knows no uncertainty. Translations of problems are no further problems.
        problems = min(entry.outcomes.shape[1] for entry in entries)
        return wilson_interval(problems if always == {1.0} else 0, problems)
    return percentile_interval(resampled)


def _is_share(entry: _Entry) -> bool:
    return bool(((entry.outcomes >= 0) & (entry.outcomes <= 1)).all())


def _right_or_wrong(entry: _Entry) -> bool:
    return bool(np.isin(entry.outcomes, (0, 1)).all())


def _speed(records: Sequence[Record]) -> float | None:
    if any(record.tokens is None for record in records):
        return None
    return sum(record.tokens or 0 for record in records) / sum(record.answer_s for record in records)


def _corrected(rows: Sequence[Row]) -> list[Row]:
    corrected = iter(holm([row.p for row in rows if row.p is not None]))
    return [row if row.p is None else dataclasses.replace(row, p_corrected=next(corrected)) for row in rows]


def table_json(table: Table) -> dict[str, Any]:
    """A table as JSON values."""
    return {"format_version": 1, **dataclasses.asdict(table)}

"""Finished runs without a model: any scores of any rows, tasks and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraflow.evaluation.compare.comparison import Comparison, open_comparison
from loraflow.evaluation.compare.plan import make_plan
from loraflow.evaluation.compare.store import Cell, Item, Record, Store

Scores = Mapping[tuple[str, str], Sequence[Sequence[float] | None]]


def synthetic_run(
    root: Path, scores: Scores, *, problems: Mapping[str, str] | None = None, record: Any = None, **plan: Any
) -> tuple[Comparison, Store]:
    """A run of gates that were never fitted, unless the plan has other `methods` of these names.

    Args:
        root: where its files go.
        scores: by row and task, the scores of every seed's problems; None for a cell that is not finished.
        problems: which tasks are translations of one another.
        record: changes to the records, by row.
        plan: further fields of the plan.

    Returns:
        What was compared, and its cells.
    """
    tasks = list(dict.fromkeys(task for _, task in scores))
    methods = list(dict.fromkeys(method for method, _ in scores))
    seeds = max(map(len, scores.values()))
    test = root / "test.jsonl"
    test.write_text(json.dumps({"prompt": "?", "completion": "1"}) + "\n")
    task = {"test": str(test), "train": str(test), "scorer": "last-number"}
    setting = {
        "base": "org/base",
        "adapters": {"a": "org/a", "b": "org/b"},
        "tasks": {name: {**task, "problems": (problems or {}).get(name)} for name in tasks},
    }
    rows = {name: {"method": "lora-flow"} for name in methods}
    content = {"setting": setting, "methods": rows, "seeds": list(range(seeds)), **plan}
    comparison, store = open_comparison(make_plan(content, root / "plan.yaml")), Store(root / "run")
    for (method, name), of_seeds in scores.items():
        cells = [cell for cell in comparison.cells if (cell.method, cell.task) == (method, name)]
        for cell, values in zip(cells, of_seeds, strict=False):
            if values is not None:
                store.write(_record(cell, values, (record or {}).get(method, {})), _items(cell, values))
    return comparison, store


def _record(cell: Cell, scores: Sequence[float], changes: Mapping[str, Any]) -> Record:
    fields = {
        "cell": cell,
        "identity": {},
        "metric": "last-number",
        "scores": list(scores),
        "learned_parameters": 1234,
        "examples": 200,
        "fit_s": 3.0,
        "answer_s": 2.0,
        "tokens": 100,
        "memory_mib": 512.0,
    }
    return Record(**{**fields, **changes})


def _items(cell: Cell, scores: Sequence[float]) -> list[Item]:
    return [
        Item(f"test.jsonl:{i}", f"question {i} of {cell.task}", f"{cell.method} says {i}", {"last-number": score})
        for i, score in enumerate(scores)
    ]

"""Rows that are merges: measured as the one adapter that they are, once for each seed where they draw."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loraflow.adapters import load_adapter, match_adapter
from loraflow.bases import BaseOptions, load_base
from loraflow.demo.world import adapter_paths, base_path
from loraflow.errors import MethodError
from loraflow.evaluation.compare import Options, compare, open_comparison
from loraflow.evaluation.compare.store import Store
from loraflow.merging import make_merge, merge_adapters
from tests.evaluation.compare.small import small_plan, write_setting


def test_merges_are_measured_as_one_adapter(tmp_path: Path) -> None:
    setting = write_setting(tmp_path)
    halves = {"zh-chat": 0.5, "math": 0.5}
    methods: dict[str, Any] = {
        "average": None,
        "half of each": {"merge": "sum", "options": {"weights": halves}},
        "knots": {"merge": "knots-ties", "options": {"scale": 0.8}, "rank": 8},
        "dare": {"merge": "knots-dare-ties"},
        "one dare": {"merge": "knots-dare-ties", "options": {"seed": 3}},
    }
    plan = small_plan(setting, methods, tasks=["zh"], limit=2, seeds=[0, 1])
    said = io.StringIO()
    console = Console(file=said, width=300)
    assert not compare(plan, tmp_path / "run", options=Options(device="cpu"), console=console), said.getvalue()
    cells = open_comparison(plan).cells
    assert [(cell.method, cell.seed) for cell in cells] == [
        *((name, None) for name in ("average", "half of each", "knots")),
        *(("dare", 0), ("dare", 1), ("one dare", None)),
    ]
    store = Store(tmp_path / "run")
    average, half = ([item.answer for item in store.read_items(cell)] for cell in cells[:2])
    assert half == average
    losses = [None if (r := store.read(cell)) is None else r.details.get("from_sum") for cell in cells]
    assert losses[0] is None
    assert losses[1] < 1e-12
    base = load_base(base_path(), BaseOptions())
    adapters = [match_adapter(load_adapter(name, adapter_paths()[name]), base) for name in halves]
    expected = merge_adapters(adapters, make_merge("knots-ties", {"scale": 0.8}), rank=8)
    assert losses[2] == pytest.approx(expected.from_sum.error, rel=1e-6)
    assert losses[3] != losses[4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"merge": "knots"}, "Unknown merge 'knots'."),
        ({"merge": "ties", "options": {"densty": 1}}, "no option 'densty'. Known: .*Did you mean 'density'?"),
        ({"merge": "ties", "fit": {"epochs": 1}}, "The row 'a' learns nothing here. Leave `fit` out."),
        ({"merge": "sum", "adapters": ["math"]}, "The merge 'sum' is of two adapters or more"),
    ],
)
def test_a_merge_that_cannot_be_is_told_before_anything_is_loaded(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(MethodError, match=message):
        open_comparison(small_plan(write_setting(tmp_path), {"a": row}, tasks=["zh"]))

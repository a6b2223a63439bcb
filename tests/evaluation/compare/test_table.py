"""Tables of made-up scores: what is estimated, what is tested, and against what."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loraflow.errors import LoraflowError
from loraflow.evaluation.compare.report import markdown
from loraflow.evaluation.compare.table import AVERAGE, Table, make_table, table_json
from loraflow.evaluation.statistics import mcnemar_p, wilson_interval
from tests.evaluation.compare.synthetic import Scores, synthetic_run


def draws(share: float, count: int = 60, runs: int = 1, seed: int = 0) -> list[list[float]]:
    """Right or wrong answers of some runs."""
    return (np.random.default_rng(seed).random((runs, count)) < share).astype(float).tolist()


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Two tasks that are translations, three rows, three seeds."""
    scores = {
        (method, task): draws(share, runs=3, seed=10 * i + j)
        for i, (method, share) in enumerate({"low": 0.2, "middle": 0.5, "high": 0.8}.items())
        for j, task in enumerate(("zh", "es"))
    }
    return make_table(*synthetic_run(tmp_path, scores, problems={"es": "zh"}, reference="middle"))


def test_every_row_has_its_mean_inside_its_interval(table: Table) -> None:
    assert [(row.task, row.contender) for row in table.rows] == [
        (task, method) for task in ("zh", "es", AVERAGE) for method in ("low", "middle", "high")
    ]
    for row in table.rows:
        assert row.interval[0] < row.mean < row.interval[1]
        if row.difference is not None and row.difference_interval is not None:
            assert row.difference_interval[0] < row.difference < row.difference_interval[1]
    found = table.row("low", "zh")
    assert found is not None
    assert found.mean == pytest.approx(np.mean(draws(0.2, runs=3, seed=0)))
    assert (found.seeds, found.problems, found.fit_s, found.tokens_per_s) == (3, 60, 3.0, 50.0)
    assert table.row("low", "no such task") is None


def test_the_reference_is_compared_with_nothing(table: Table) -> None:
    assert table.reference == "middle"
    for row in table.rows:
        compared = (row.difference, row.difference_interval, row.test, row.p, row.p_corrected)
        assert (compared == (None,) * 5) == (row.contender == "middle")
    high = table.row("high", AVERAGE)
    assert high is not None
    assert high.significant
    assert high.difference is not None
    assert high.difference > 0.2


def test_the_average_is_over_tasks(table: Table) -> None:
    for method in table.contenders:
        rows = {row.task: row for row in table.rows if row.contender == method}
        assert rows[AVERAGE].mean == pytest.approx((rows["zh"].mean + rows["es"].mean) / 2)
        assert rows[AVERAGE].problems == 120
        assert rows[AVERAGE].seeds == 3


def test_holm_corrects_over_the_whole_table(table: Table) -> None:
    tested = [row for row in table.rows if row.p is not None and row.p_corrected is not None]
    assert len(tested) == 6
    assert all(row.p <= row.p_corrected <= 1 for row in tested if row.p is not None and row.p_corrected is not None)
    least = min(tested, key=lambda row: row.p or 0)
    assert least.p_corrected == pytest.approx(min(1.0, 6 * (least.p or 0)))


def test_one_run_of_right_and_wrong_has_wilsons_interval_and_mcnemars_test(tmp_path: Path) -> None:
    first, second = draws(0.7, seed=1), draws(0.4, seed=2)
    found = make_table(*synthetic_run(tmp_path, {("new", "zh"): first, ("old", "zh"): second})).row("new", "zh")
    assert found is not None
    assert found.interval == wilson_interval(int(sum(first[0])), 60)
    assert (found.test, found.p) == ("McNemar", mcnemar_p(np.array(first[0], int), np.array(second[0], int)))
    assert found.difference == pytest.approx(np.mean(first) - np.mean(second))


@pytest.mark.parametrize(
    "scores",
    [
        {("new", "zh"): draws(0.7, runs=2), ("old", "zh"): draws(0.4, runs=2)},
        {("new", "zh"): draws(0.7), ("old", "zh"): [*draws(0.4, runs=2)]},
        {("new", "zh"): [[0.5, 1.0, 0.0, 0.25]], ("old", "zh"): [[0.0, 1.0, 1.0, 0.0]]},
        {("new", "zh"): [[0.0, 1.0, 1.0, 0.0]], ("old", "zh"): [[0.5, 1.0, 0.0, 0.25]]},
    ],
    ids=["runs", "runs of the reference", "shares", "shares of the reference"],
)
def test_anything_else_is_tested_by_bootstrap(tmp_path: Path, scores: Scores) -> None:
    found = make_table(*synthetic_run(tmp_path, scores)).row("new", "zh")
    assert found is not None
    assert found.test == "bootstrap"
    assert 0 < (found.p or 0) <= 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_but_wrong_answers_is_not_certain(tmp_path: Path, value: float) -> None:
    scores = {("a", task): [[value] * 60] * 2 for task in ("zh", "es")}
    table = make_table(*synthetic_run(tmp_path, scores))
    assert [row.interval for row in table.rows] == [wilson_interval(int(60 * value), 60)] * 3


def test_the_last_row_is_the_reference_by_default(tmp_path: Path) -> None:
    scores = {(name, "zh"): draws(0.5) for name in ("a", "b", "c")}
    assert make_table(*synthetic_run(tmp_path, scores)).reference == "c"


def test_problems_are_drawn_alike_for_all_rows_and_translations(tmp_path: Path) -> None:
    first, second = draws(0.5, seed=1), draws(0.5, seed=2)
    # Each is the other's in the other task: their averages are the same whichever problems are drawn, if both tasks'
    # are drawn alike, and only then.
    scores = {("a", "zh"): first, ("b", "zh"): second, ("a", "es"): second, ("b", "es"): first}
    (tmp_path / "alike").mkdir()
    (tmp_path / "apart").mkdir()
    alike = make_table(*synthetic_run(tmp_path / "alike", scores, problems={"es": "sums", "zh": "sums"}))
    apart = make_table(*synthetic_run(tmp_path / "apart", scores)).row("a", AVERAGE)
    found = alike.row("a", AVERAGE)
    assert found is not None
    assert apart is not None
    assert found.difference == pytest.approx(0)
    assert found.difference_interval == pytest.approx((0, 0), abs=1e-12)
    assert found.p == 1.0
    assert apart.difference_interval is not None
    assert apart.difference_interval[0] < -0.01 < 0.01 < apart.difference_interval[1]


def test_the_same_answers_differ_by_nothing(tmp_path: Path) -> None:
    found = make_table(*synthetic_run(tmp_path, {("a", "zh"): draws(0.5), ("b", "zh"): draws(0.5)})).row("a", "zh")
    assert found is not None
    assert (found.difference, found.difference_interval, found.p) == (0.0, (0.0, 0.0), 1.0)
    assert not found.significant


def test_what_is_not_finished_is_told_and_left_out(tmp_path: Path) -> None:
    scores: Scores = {
        ("a", "zh"): [*draws(0.5), None],
        ("a", "es"): [None, None],
        ("b", "zh"): draws(0.4, runs=2),
        ("b", "es"): draws(0.4, runs=2),
    }
    table = make_table(*synthetic_run(tmp_path, scores))
    assert table.missing == ["a, zh, seed 1", "a, es, seed 0", "a, es, seed 1"]
    assert table.row("a", "es") is None
    assert table.row("a", AVERAGE) is None
    assert table.row("b", AVERAGE) is not None
    partly = table.row("a", "zh")
    assert partly is not None
    assert partly.seeds == 1
    assert partly.difference is not None


def test_without_the_reference_nothing_is_tested(tmp_path: Path) -> None:
    table = make_table(*synthetic_run(tmp_path, {("a", "zh"): draws(0.5), ("b", "zh"): [None]}))
    assert [(row.contender, row.p) for row in table.rows] == [("a", None)]
    assert (table.reference, table.contenders) == ("b", ["a"])


def test_runs_of_unequal_problems_are_an_error(tmp_path: Path) -> None:
    runs = synthetic_run(tmp_path, {("a", "zh"): [[1.0, 0.0], [1.0]]})
    with pytest.raises(
        LoraflowError, match=r"The runs of 'a' on 'zh' answered 1 and 2 problems. Remove the run's cells"
    ):
        make_table(*runs)
    (tmp_path / "rows").mkdir()
    rows = synthetic_run(tmp_path / "rows", {("a", "zh"): [[1.0, 0.0]], ("b", "zh"): [[1.0]]})
    with pytest.raises(LoraflowError, match=r"'a' and 'b' answered 2 and 1 problems of 'zh'. Measure one of them anew"):
        make_table(*rows)


def test_a_run_without_cells_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoraflowError, match=r"run has no finished cells of this plan\. Run it first"):
        make_table(*synthetic_run(tmp_path, {("a", "zh"): [None]}))


def test_weights_and_costs_are_means_over_runs(tmp_path: Path) -> None:
    changes = {"a": {"weights": {"zh": (0.25, 0.1), "math": (0.75, 0.3)}, "tokens": None, "fitted_on": "ru"}}
    run = synthetic_run(tmp_path, {("a", "zh"): draws(0.5, runs=2)}, record=changes)
    row = make_table(*run).rows[0]
    assert dict(row.weights) == {"zh": pytest.approx((0.25, 0.1)), "math": pytest.approx((0.75, 0.3))}
    assert (row.tokens_per_s, row.fitted_on, row.memory_mib, row.learned_parameters) == (None, "ru", 512.0, 1234)


def test_a_table_is_json(table: Table) -> None:
    content = json.loads(json.dumps(table_json(table)))
    assert (content["reference"], content["tasks"], content["seeds"]) == ("middle", ["zh", "es"], [0, 1, 2])
    assert len(content["rows"]) == len(table.rows)
    for row, found in zip(content["rows"], table.rows, strict=True):
        assert (row["contender"], row["task"], row["fitted_on"]) == (found.contender, found.task, None)
        assert row["mean"] == found.mean
        assert tuple(row["interval"]) == found.interval
        assert (row["difference"] is None) == (row["difference_interval"] is None) == (found.contender == "middle")


def test_scores_that_are_no_shares_are_neither_averaged_nor_shown_in_per_cent(tmp_path: Path) -> None:
    scores = {
        ("a", "zh"): [[12.0, 30.0]],
        ("b", "zh"): [[15.0, 20.0]],
        ("a", "es"): draws(0.5),
        ("b", "es"): draws(0.4),
    }
    changes = {"higher_is_better": False, "notice": "Perplexities of a tokenizer of its own."}
    table = make_table(*synthetic_run(tmp_path, scores, record={"a": changes, "b": changes}))
    row = table.row("a", "zh")
    assert row is not None
    assert (row.share, row.higher_is_better) == (False, False)
    assert table.row("a", AVERAGE) is None
    text = markdown(table, {})
    assert "| 21 [12, 30] |" in text
    assert "Lower is better: es, zh." in text
    assert text.count("Perplexities of a tokenizer of its own.") == 1

"""Reports: a table as Markdown, CSV, JSON, and as a page that a real browser opens without a network."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from loraflow.evaluation.compare.comparison import Comparison
from loraflow.evaluation.compare.report import SHOWN_PROBLEMS, p_text, run_settings, write_report
from loraflow.evaluation.compare.store import Store
from tests.evaluation.compare.synthetic import Scores, synthetic_run

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    '<img src=x onerror="window.hacked=1">',
    "\u2028'\"]]>&lt;b&gt; {{ 7 * 7 }}",
)
SCORES: Scores = {
    ("a|b <b>low</b>", "zh"): [[0.0, 0.0, 1.0, 0.0]],
    ("a|b <b>low</b>", "es"): [[1.0, 1.0, 0.0, 1.0]],
    ("high", "zh"): [[1.0, 1.0, 1.0, 1.0]],
    ("high", "es"): [[0.0, 0.0, 0.0, 0.0]],
    ("middle", "zh"): [[1.0, 1.0, 0.0, 0.0]],
    ("middle", "es"): [[1.0, 0.0, 1.0, 0.0]],
}
WEIGHTS = {"high": {"weights": {"a": (0.25, 0.125), "b": (0.75, 0.5)}}}


@pytest.fixture
def run(tmp_path: Path) -> tuple[Comparison, Store]:
    return synthetic_run(
        tmp_path, SCORES, record=WEIGHTS, title="Titles & <i>marks</i>", description="What for.", limit=4
    )


def files(run: tuple[Comparison, Store]) -> dict[str, str]:
    write_report(*run)
    return {ending: (run[1].root / f"report.{ending}").read_text() for ending in ("md", "csv", "json", "html")}


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]


def test_markdown_has_scores_differences_costs_and_weights(run: tuple[Comparison, Store]) -> None:
    text = files(run)["md"]
    assert text.startswith("# Titles & <i>marks</i>\n\nWhat for.\n")
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    scores, costs, weights = ([cells_of(line) for line in block] for block in blocks)
    for block in (scores, costs, weights):
        assert len({len(line) for line in block}) == 1
        assert set(block[1]) == {"---"}
    assert scores[0] == ["method", "seeds", "zh", "es", "average"]
    assert [line[0] for line in scores[2:]] == ["a/b <b>low</b>", "high", "middle"]
    assert scores[3][2].startswith("100.0 [")
    assert costs[0][:4] == ["method", "difference to middle, average", "p", "p, corrected"]
    assert [bool(line[1]) for line in costs[2:]] == [True, True, False]
    assert costs[2][4:] == ["1,234", "200", "3", "50", "512"]
    assert weights[2] == ["high", "zh", "0.250 ± 0.125", "0.750 ± 0.500"]
    assert "- problems: the first 4 of each task" in text
    assert "corrected by Holm's method for 6 comparisons" in text
    assert "not finished" not in text


def test_one_task_is_one_table(tmp_path: Path) -> None:
    text = files(synthetic_run(tmp_path, {key: scores for key, scores in SCORES.items() if key[1] == "zh"}))["md"]
    (table,) = (block.split("\n") for block in text.split("\n\n") if block.startswith("|"))
    head, _, *lines = (cells_of(line) for line in table)
    assert head[:5] == ["method", "seeds", "zh", "difference to middle", "p"]
    assert head[-1] == "memory, MiB"
    assert {len(line) for line in lines} == {len(head)}
    assert [line[0] for line in lines] == ["a/b <b>low</b>", "high", "middle"]


def test_nothing_is_said_of_a_reference_where_nothing_is_compared(tmp_path: Path) -> None:
    text = files(synthetic_run(tmp_path, {("a", "zh"): [[1.0, 0.0]]}))["md"]
    head = next(cells_of(line) for line in text.split("\n") if line.startswith("|"))
    assert head == ["method", "seeds", "zh", "values learned", "examples", "fit, s", "tokens/s", "memory, MiB"]


def test_csv_is_read_back(run: tuple[Comparison, Store]) -> None:
    table = write_report(*run)
    rows = list(csv.DictReader(io.StringIO((run[1].root / "report.csv").read_text())))
    assert [(row["contender"], row["task"]) for row in rows] == [(row.contender, row.task) for row in table.rows]
    for row, found in zip(rows, table.rows, strict=True):
        assert float(row["mean"]) == found.mean
        assert (float(row["low"]), float(row["high"])) == found.interval
        assert row["p_corrected"] == ("" if found.p_corrected is None else repr(found.p_corrected))
        assert (row["fitted_on"], row["problems"]) == ("", str(found.problems))


def test_json_is_the_table_with_its_settings(run: tuple[Comparison, Store]) -> None:
    content = json.loads(files(run)["json"])
    assert content["format_version"] == 1
    assert content["settings"] == run_settings(run[0])
    assert len(content["rows"]) == 9


def test_p_values_are_told_as_far_as_they_mean_anything() -> None:
    assert [p_text(p) for p in (None, 0.0001, 0.04567, 1.0)] == ["", "< 0.001", "0.046", "1.000"]


def test_a_run_that_is_not_finished_says_so(tmp_path: Path, offline_page) -> None:
    run = synthetic_run(tmp_path, {("a", "zh"): [[1.0]], ("b", "zh"): [None]})
    assert "**1 cells are not finished**; run the same command again" in files(run)["md"]
    offline_page.goto((run[1].root / "report.html").as_uri())
    assert offline_page.inner_text(".warn").startswith("1 cells are not finished;")


def test_rows_of_one_task_have_no_average(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path, {("a", "zh"): [[1.0, 0.0], [0.0, 0.0]], ("b", "zh"): [[1.0, 1.0], None]})
    lines = [cells_of(line) for line in files(run)["md"].split("\n") if line.startswith("|")]
    assert lines[0][:4] == ["method", "seeds", "zh", "difference to b"]
    assert [line[1] for line in lines[2:4]] == ["2", "1"]


def test_rows_that_another_seed_could_change_are_told(tmp_path: Path) -> None:
    scores = {("made", "zh"): [[1.0, 0.0]], ("learned", "zh"): [[1.0, 1.0]]}
    methods = {"made": {"method": "average"}, "learned": {"method": "lora-flow"}}
    (told,) = (
        line for line in files(synthetic_run(tmp_path, scores, methods=methods))["md"].split("\n") if "one seed" in line
    )
    assert "comparisons). learned: learned with one seed only;" in told


# ---- The page ------------------------------------------------------------------------------------------------------


def order(page) -> list[str]:
    return page.locator("#scores tbody td:first-child").all_inner_texts()


def test_the_page_sorts_by_a_column(run: tuple[Comparison, Store], offline_page) -> None:
    files(run)
    offline_page.goto((run[1].root / "report.html").as_uri())
    assert offline_page.title() == offline_page.inner_text("h1") == "Titles & <i>marks</i>"
    assert order(offline_page) == ["a|b <b>low</b>", "high", "middle"]
    heading = offline_page.get_by_role("button", name="zh")
    heading.click()
    assert order(offline_page) == ["high", "middle", "a|b <b>low</b>"]
    assert offline_page.locator("th[aria-sort=descending]").inner_text() == "zh"
    heading.click()
    assert order(offline_page) == ["a|b <b>low</b>", "middle", "high"]
    offline_page.get_by_role("button", name="es").click()
    assert order(offline_page) == ["a|b <b>low</b>", "middle", "high"]
    assert offline_page.locator("th[aria-sort=descending]").inner_text() == "es"


def test_the_page_shows_answers_of_a_task_and_problem(run: tuple[Comparison, Store], offline_page) -> None:
    files(run)
    offline_page.goto((run[1].root / "report.html").as_uri())
    offline_page.select_option("#task", label="es")
    offline_page.select_option("#problem", label="test.jsonl:1: 1 of 3 right")
    assert offline_page.inner_text("#answers > pre") == "question 1 of es"
    assert offline_page.locator(".answer pre").all_inner_texts() == [
        "a|b <b>low</b> says 1",
        "high says 1",
        "middle says 1",
    ]
    assert offline_page.locator(".answer.right strong").all_inner_texts() == ["✓ a|b <b>low</b>"]


def test_hostile_answers_are_only_text(run: tuple[Comparison, Store], offline_page) -> None:
    comparison, store = run
    for cell in comparison.cells:
        record = store.read(cell)
        items = [
            dataclasses.replace(i, answer=h, prompt=h) for i, h in zip(store.read_items(cell), HOSTILE, strict=False)
        ]
        assert record is not None
        store.write(dataclasses.replace(record, scores=record.scores[:3]), items)
    files(run)
    offline_page.goto((store.root / "report.html").as_uri())
    for position, hostile in enumerate(HOSTILE):
        offline_page.select_option("#problem", str(position))
        texts = offline_page.locator("#answers pre").all_text_contents()
        assert texts == [hostile] * 4
    assert offline_page.evaluate("window.hacked") is None
    assert offline_page.locator("img, #scores b").count() == 0


def test_the_page_prefers_problems_on_which_rows_differ(tmp_path: Path, offline_page) -> None:
    same, differs = [1.0] * 60, [1.0] * 50 + [0.0] * 10
    run = synthetic_run(tmp_path, {("a", "zh"): [same], ("b", "zh"): [differs]})
    files(run)
    offline_page.goto((run[1].root / "report.html").as_uri())
    shown = offline_page.locator("#problem option").all_text_contents()
    assert len(shown) == SHOWN_PROBLEMS
    assert shown[-10:] == [f"test.jsonl:{i}: 1 of 2 right" for i in range(50, 60)]

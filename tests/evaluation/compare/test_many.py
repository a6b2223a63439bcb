"""Choosing among many: the task's own adapter as a row, left out, and found; several tasks in one batch."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraflow.demo.world import adapter_paths
from loraflow.errors import DataError
from loraflow.evaluation.compare import Store, open_comparison, write_report
from loraflow.evaluation.compare.comparison import identities
from loraflow.evaluation.compare.plan import make_plan, read_plan
from loraflow.evaluation.compare.report import MOST_WEIGHTS
from loraflow.evaluation.compare.running import compare, rescore
from loraflow.evaluation.compare.table import make_table
from loraflow.evaluation.compare.tasks import Task, join_tasks
from loraflow.evaluation.scoring import get_scorer
from loraflow.examples import parse_examples
from loraflow.prompts import PromptFormat
from tests.evaluation.compare.small import small_plan, write_setting
from tests.evaluation.compare.synthetic import synthetic_run

ALL = ["zh-chat", "es-chat", "math"]
NAMES = list("abcdefgh")


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, Any]:
    """Two tasks whose bank is all three adapters, each with one of its own, and both in one."""
    written = write_setting(tmp_path)
    for name, own in (("zh", "zh-chat"), ("es", "math")):
        written["tasks"][name] |= {"adapters": ALL, "own": own, "max_new_tokens": 6}
    written["tasks"]["both"] = {"together": ["zh", "es"]}
    return written


def planned(setting: dict[str, Any], row: Any, task: str = "zh") -> Any:
    comparison = open_comparison(small_plan(setting, {"row": row}, tasks=[task]))
    return comparison.rows["row"], comparison.setting.tasks[task]


# ---- Rows ----------------------------------------------------------------------------------------------------------


def test_own_is_the_adapter_of_each_task(setting: dict[str, Any]) -> None:
    for task, own in (("zh", "zh-chat"), ("es", "math")):
        row, found = planned(setting, {"adapter": "own"}, task)
        assert row.method(found).weights == {own: 1.0}
        assert row.adapters(found) == ALL
        row, found = planned(setting, {"method": "average", "without": "own"}, task)
        assert row.adapters(found) == [name for name in ALL if name != own]
        row, found = planned(setting, {"finetune": "own"}, task)
        assert row.tuned_from(found) == setting["adapters"][own]
        row, found = planned(setting, {"finetune": "new", "on_top_of": "own"}, task)
        assert row.below(found).method(found).weights == {own: 1.0}
        assert row.uses_own(found) == own
        # What is left out is not below either.
        row, found = planned(setting, {"finetune": "new", "on_top_of": "average", "without": "own"}, task)
        assert row.below(found).adapters(found) == [name for name in ALL if name != own]


@given(st.data())
def test_what_is_left_out_is_left_out_of_whatever_is_fused(data: st.DataObject) -> None:
    fused = data.draw(st.lists(st.sampled_from(NAMES), min_size=2, unique=True))
    absent = data.draw(st.lists(st.sampled_from(fused), max_size=len(fused) - 1, unique=True))
    own = data.draw(st.sampled_from(fused))
    setting = {
        "base": "org/base",
        "adapters": {name: f"org/{name}" for name in NAMES},
        "tasks": {"t": {"harness": "mgsm", "adapters": fused, "own": own}},
    }
    for adapters in ("task", fused):
        row, task = planned(setting, {"method": "average", "adapters": adapters, "without": absent}, "t")
        assert row.adapters(task) == [name for name in fused if name not in absent]
    row, task = planned(setting, {"method": "average", "adapters": "all", "without": "own"}, "t")
    assert row.adapters(task) == [name for name in NAMES if name != own]


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"method": "average", "without": "maths"}, "zh", r"'row' is `without` 'maths'. .*Did you mean 'math'"),
        (
            {"method": "average", "adapters": ["math"], "without": "own"},
            "zh",
            r"'row' is `without` 'zh-chat'. Known: 'm",
        ),
        ({"method": "average", "without": ALL}, "zh", r"'row' leaves out all adapters of 'zh'\. Keep one of them"),
        (
            {"adapter": "own", "without": "own"},
            "zh",
            r"'row' wants the adapter 'zh-chat', and 'zh' has 'es-chat', 'math'",
        ),
        (
            {"adapter": "own"},
            "both",
            r"'row' wants the task's own adapter, and 'both' has problems with adapters of their",
        ),
        (
            {"adapter": "own"},
            "none",
            r"'none' does not say which adapter is its own\. Say `own` in the setting's task, or",
        ),
    ],
)
def test_rows_that_cannot_be(setting: dict[str, Any], row: Any, task: str, message: str) -> None:
    setting["tasks"]["none"] = {key: value for key, value in setting["tasks"]["zh"].items() if key != "own"}
    with pytest.raises(DataError, match=message):
        planned(setting, row, task)
    left_out = open_comparison(small_plan(setting, {"row": {**row, "if_possible": True}, "base": "base"}, tasks=[task]))
    assert [cell.method for cell in left_out.cells] == ["base"]


def test_no_adapter_may_be_called_own_where_rows_say_it(setting: dict[str, Any]) -> None:
    setting["adapters"]["own"] = setting["adapters"]["math"]
    assert planned(setting, {"method": "average"})
    with pytest.raises(DataError, match=r"says 'own', which is a task's own adapter, and one adapter has that name"):
        planned(setting, {"adapter": "own"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own": "code"}, r"tasks.zh`: `own` \(='code'\) is not among the task's `adapters`; name it there too"),
        ({"together": ["zh", "es"]}, r"give exactly one of `test`, `harness`, `mixed` and `together`"),
        ({"own": "code", "adapters": None}, r"The task 'zh' wants the adapter 'code'"),
    ],
)
def test_tasks_that_cannot_be(setting: dict[str, Any], change: dict[str, Any], message: str) -> None:
    setting["tasks"]["zh"] |= change
    with pytest.raises(DataError, match=message):
        planned(setting, {"method": "average"})


def test_a_fusion_has_its_own_adapters(setting: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="a `fusion` has its own adapters; leave `without` out"):
        planned(setting, {"fusion": "x", "without": "own"})


def test_another_own_adapter_makes_another_measurement(setting: dict[str, Any]) -> None:
    rows = {"average": "average", "oracle": {"adapter": "own"}, "left out": {"method": "average", "without": "own"}}
    before = list(identities(open_comparison(small_plan(setting, rows, tasks=["zh"]))).values())
    setting["tasks"]["zh"]["own"] = "es-chat"
    after = list(identities(open_comparison(small_plan(setting, rows, tasks=["zh"]))).values())
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, False]
    assert (before[1]["own"], after[1]["own"]) == ("zh-chat", "es-chat")


def test_what_adapters_data_teach_is_learned_once_for_tasks_that_fuse_the_same(setting: dict[str, Any]) -> None:
    def learned(**rows: Any) -> dict[str, set[str]]:
        comparison = open_comparison(small_plan(setting, rows, tasks=["es", "zh"]))
        return {
            name: {comparison.learned_on(cell) for cell in comparison.cells if cell.method == name} for name in rows
        }

    found = learned(centroid=None, without={"method": "centroid", "without": "own"}, **{"lora-flow": None})
    assert found == {"centroid": {"es"}, "without": {"es", "zh"}, "lora-flow": {"es", "zh"}}
    setting["tasks"]["zh"]["train_prompt"] = {"system_prompt": "Think."}
    assert learned(centroid=None) == {"centroid": {"es", "zh"}}
    setting["tasks"]["zh"] |= {"train_prompt": None, "adapters": ["zh-chat", "math"], "own": "math"}
    assert learned(centroid=None) == {"centroid": {"es", "zh"}}


# ---- Several tasks in one ------------------------------------------------------------------------------------------


def task_of(name: str, answers: list[str], **changes: Any) -> Task:
    drawn = [{"prompt": f"{name} {i}", "completion": answer} for i, answer in enumerate(answers)]
    examples = parse_examples(drawn) if drawn else []
    scorer = changes.pop("scorer", "exact-match")
    return Task(name, ("a", "b"), tuple(examples), {"score": get_scorer(scorer)}, **changes)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_problems_come_in_turns_and_are_scored_as_at_home(counts: list[int]) -> None:
    tasks = [task_of(f"t{i}", [f"{i}-{n}" for n in range(count)], own=(f"own {i}",)) for i, count in enumerate(counts)]
    joined = join_tasks("all", tasks)
    expected = []
    for at in range(max(counts)):
        for task in tasks:
            if at < len(task.test):
                expected.append((task.test[at], task.own[0]))
    assert [example.messages for example in joined.test] == [example.messages for example, _ in expected]
    assert joined.own == tuple(own for _, own in expected)
    right = [example.completion for example in joined.test]
    assert joined.score(right) == [{"score": 1.0}] * sum(counts)
    assert joined.score(["x"] * len(right)) == [{"score": 0.0}] * sum(counts)


def test_each_problem_has_the_scorer_of_its_task() -> None:
    joined = join_tasks("all", [task_of("exact", ["It is 5."]), task_of("number", ["It is 5."], scorer="last-number")])
    assert joined.score(["5", "5"]) == [{"score": 0.0}, {"score": 1.0}]
    assert joined.own == ()
    assert joined.max_new_tokens == 512


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (task_of("other", []), r"The task 'all' needs problems in memory, and 'other' has none\. Leave it out"),
        (
            task_of("other", ["1"], stop=("#",)),
            r"'one' and 'other' together, which differ in `stop`: \(\) and \('#',\)",
        ),
        (task_of("other", ["1"], prompt=PromptFormat(system_prompt="Be brief.")), r"which differ in `prompt`"),
    ],
)
def test_tasks_that_do_not_go_together(other: Task, message: str) -> None:
    with pytest.raises(DataError, match=message):
        join_tasks("all", [task_of("one", ["1"]), other])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"together": ["zh", "eso"]}, r"The task 'both' puts 'eso' together with others\. .*Did you mean 'es'"),
        ({"together": ["zh", "both"]}, r"The task 'both' puts 'both' together with others"),
        ({"together": ["zh"]}, r"`setting.tasks.both.together`: .*at least 2"),
        ({"together": ["zh", "es"], "own": "math"}, r"tasks that are `together` stay as they are; leave `own` out"),
    ],
)
def test_written_tasks_that_do_not_go_together(setting: dict[str, Any], spec: Any, message: str) -> None:
    setting["tasks"]["both"] = spec
    with pytest.raises(DataError, match=message):
        planned(setting, {"method": "average"}, "both")


def test_tasks_together_are_answered_only_where_they_are_named(setting: dict[str, Any]) -> None:
    assert {cell.task for cell in open_comparison(small_plan(setting, ["average"])).cells} == {"zh", "es"}


# ---- Which adapter was chosen --------------------------------------------------------------------------------------


def test_a_run_says_who_was_chosen(setting: dict[str, Any], tmp_path: Path) -> None:
    rows = {
        "base": None,
        "average": None,
        "oracle": {"adapter": "own", "if_possible": True},
        "math": {"adapter": "math"},
        "left out": {"method": {"math": 0.5, "es-chat": 0.25}, "without": "own", "if_possible": True},
    }
    rows["left out"] = {"method": "average", "without": "own", "if_possible": True}
    plan = small_plan(setting, rows, tasks=["zh", "es", "both"], limit=2, weights=True)
    assert compare(plan, tmp_path / "run") == 0
    comparison, store = open_comparison(plan), Store(tmp_path / "run")
    records = {(cell.method, cell.task): store.read(cell) for cell in comparison.cells}
    assert [list(records["math", task].chosen) for task in ("zh", "es", "both")] == [["math", "math"]] * 3
    assert records["average", "zh"].chosen == (None, None)
    assert records["base", "zh"].chosen == ()
    table = make_table(comparison, store)

    def found(row: str) -> list[float | None]:
        return [row and row.own_chosen for row in (table.row(row, task) for task in ("zh", "es", "both"))]

    assert found("base") == [None, None, None]
    assert found("average") == [0.0, 0.0, 0.0]
    assert found("oracle") == [1.0, 1.0, None]
    assert found("math") == [0.0, 1.0, 0.5]
    assert found("left out") == [None, None, None]
    assert rescore(plan, tmp_path / "run") == 0
    write_report(comparison, store)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| method | own adapter chosen |" in text
    assert "own adapter chosen, %" in (tmp_path / "run" / "report.html").read_text()
    lines = list(csv.DictReader(io.StringIO((tmp_path / "run" / "report.csv").read_text())))
    assert {(line["contender"], line["own_chosen"]) for line in lines if line["task"] == "both"} >= {("math", "0.5")}


def test_runs_without_own_adapters_have_no_such_column(tmp_path: Path) -> None:
    comparison, store = synthetic_run(tmp_path, {("a", "zh"): [[1.0, 0.0]], ("b", "zh"): [[1.0, 1.0]]})
    write_report(comparison, store)
    assert "own adapter chosen" not in (store.root / "report.md").read_text()
    assert "own adapter chosen" not in (store.root / "report.html").read_text()
    assert "own_chosen" in (store.root / "report.json").read_text()


@pytest.mark.parametrize("count", [MOST_WEIGHTS, MOST_WEIGHTS + 1])
def test_mean_weights_of_many_adapters_are_in_the_json(tmp_path: Path, count: int) -> None:
    weights = {f"adapter {i}": (1 / count, 0.0) for i in range(count)}
    comparison, store = synthetic_run(tmp_path, {("a", "zh"): [[1.0]]}, record={"a": {"weights": weights}})
    write_report(comparison, store)
    said = (
        f"The mean fusion weights of {count} adapters are in `report.json`." in (store.root / "report.md").read_text()
    )
    assert said == (count > MOST_WEIGHTS)
    assert json.loads((store.root / "report.json").read_text())["rows"][0]["weights"].keys() == weights.keys()


# ---- The study -----------------------------------------------------------------------------------------------------


def test_the_study_asks_for_one_and_many_tasks() -> None:
    comparison = open_comparison(read_plan("many"))
    assert comparison.left_out == []
    assert {
        row: len(spec.adapters(comparison.setting.tasks["add-en-said"])) for row, spec in comparison.rows.items()
    } == {row: 47 if "left out" in row else 48 for row in comparison.rows}
    together = open_comparison(read_plan("many", tasks=["together"]))
    assert {reason.partition(" on ")[0] for reason in together.left_out} == {
        row for row, spec in together.rows.items() if spec.spec.without or spec.spec.adapter
    }


def test_the_study_can_be_run_on_a_setting_of_ones_own(setting: dict[str, Any]) -> None:
    # One more, so that three are left without a task's own.
    setting["adapters"]["ru-chat"] = str(adapter_paths()["ru-chat"])
    setting["adapter_data"]["ru-chat"] = setting["adapter_data"]["math"]
    for name in ("zh", "es"):
        setting["tasks"][name]["adapters"] = [*ALL, "ru-chat"]
    content = {**read_plan("many").model_dump(exclude_defaults=True), "setting": setting, "tasks": ["zh", "es"]}
    assert open_comparison(make_plan(content, Path("x.yaml"))).left_out == []

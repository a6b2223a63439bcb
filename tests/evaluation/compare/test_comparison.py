"""Whole comparisons on the small world: what is measured, kept, gone on with, and refused."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from filelock import FileLock
from rich.console import Console

from loraflow import FusedModel
from loraflow.answers import generate_answers
from loraflow.demo.world import adapter_paths, base_path
from loraflow.errors import DataError, LoraflowError, MethodError, SandboxError
from loraflow.evaluation.compare import (
    Comparison,
    Options,
    compare,
    identities,
    open_comparison,
    prepare,
    rescore,
    running,
    workers,
)
from loraflow.evaluation.compare.comparison import difference
from loraflow.evaluation.compare.plan import Plan, read_plan
from loraflow.evaluation.compare.store import Cell, Record, Store, file_name
from loraflow.evaluation.compare.tasks import HarnessTask, Task
from loraflow.methods import Static
from loraflow.saved.fusion import SavedFusion
from loraflow.training import fit
from tests.evaluation.compare.small import FLOW, QUICK, small_plan, write_setting
from tests.tiny import edit_tensors

CHEAP = {"base": "base", "average": "average"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_setting(tmp_path_factory.mktemp("setting"))


@pytest.fixture
def shorter(setting: dict[str, Any]) -> dict[str, Any]:
    """The same, with answers of a few tokens."""
    changed = copy.deepcopy(setting)
    for task in changed["tasks"].values():
        task["max_new_tokens"] = 4
    return changed


def run(plan: Plan, output: Path, **options: Any) -> tuple[int, str]:
    """Measure a plan on the CPU; gives how many cells failed, and what was said."""
    overwrite = options.pop("overwrite", False)
    said = io.StringIO()
    failed = compare(
        plan,
        output,
        options=Options(**{"device": "cpu", **options}),
        overwrite=overwrite,
        console=Console(file=said, width=300),
    )
    return failed, said.getvalue()


def records(plan: Plan, output: Path) -> dict[Cell, Record]:
    store = Store(output)
    found = {cell: store.read(cell) for cell in open_comparison(plan, allow_code=True).cells}
    return {cell: record for cell, record in found.items() if record is not None}


def cell_files(output: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted((output / "cells").rglob("*.json*"))
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# ---- Every kind of row ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fusion on disk."""
    path = tmp_path_factory.mktemp("fusions") / "saved"
    adapters = {name: adapter_paths()[name] for name in ("zh-chat", "math")}
    FusedModel.from_adapters(base_path(), adapters, {"math": 1.0}).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def everything(setting: dict[str, Any], saved: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, str]:
    """A finished run of one row of every kind."""
    methods = {
        "base": None,
        "average": None,
        "math": None,
        "by position": {"adapter": 1},
        "by name": {"adapter": "zh-chat"},
        "saved": {"fusion": saved},
        "all three": {"method": "average", "adapters": "all"},
        "other way round": {"method": "average", "adapters": ["math", "zh-chat"]},
        "lora-flow": FLOW,
        "of es": {**FLOW, "fitted_on": "es"},
        "two examples": {**FLOW, "examples": 2},
        "searched": {"method": "lora-flow", "search": True, "fit": {"max_steps": 1}},
        "lorahub": {"method": "lorahub", "options": {"budget": 3}},
        "phatgoose": {"method": "phatgoose", "fit": {"max_steps": 2}},
        "centroid": None,
        "new": {"finetune": "new", "fit": {**QUICK, "r": 2, "alpha": 4}},
        "tuned": {"finetune": "math", "fit": QUICK},
    }
    plan = small_plan(setting, methods, tasks=["zh"], limit=2, weights=True)
    output = tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as patch:
        grid = [{"learning_rate": 1e-3, "batch_size": 2}, {"learning_rate": 1e-2, "batch_size": 4}]
        patch.setattr(sys.modules[fit.__module__], "search_grid", lambda method: grid)
        failed, said = run(plan, output)
    assert not failed, said
    return plan, output, said


Everything = tuple[Plan, Path, str]


def of_row(everything: Everything, method: str) -> tuple[Record, list[str]]:
    plan, output, _ = everything
    cell, record = next((c, r) for c, r in records(plan, output).items() if c.method == method)
    return record, [item.answer for item in Store(output).read_items(cell)]


def test_every_kind_of_row_is_measured_once_for_each_seed(everything: Everything) -> None:
    plan, output, said = everything
    found = records(plan, output)
    assert [cell.method for cell in found] == list(plan.methods)
    learning = ("lora-flow", "of es", "two examples", "searched", "lorahub", "phatgoose", "new", "tuned")
    assert [cell.method for cell in found if cell.seed == 0] == list(learning)
    assert {cell.seed for cell in found} == {None, 0}
    assert "17 cells, 0 of them finished before" in said
    for record in found.values():
        assert len(record.scores) == 2
        assert (record.metric, record.tokens is None) == ("last-number", False)
        assert record.memory_mib > 100


def test_learning_is_accounted_for(everything: Everything) -> None:
    examples = {method: of_row(everything, method)[0].examples for method in everything[0].methods}
    own = {"phatgoose": 8, "centroid": 8}
    task = dict.fromkeys(("lora-flow", "of es", "searched", "lorahub", "new", "tuned"), 6)
    assert {name: count for name, count in examples.items() if count is not None} == {**own, **task, "two examples": 2}
    for method in ("base", "math", "saved", "lora-flow", "lorahub", "new", "tuned"):
        record, _ = of_row(everything, method)
        assert (record.learned_parameters > 0) == (record.fit_s > 0) == (record.examples is not None)
    new, tuned = (of_row(everything, name)[0].learned_parameters for name in ("new", "tuned"))
    assert new < tuned
    assert of_row(everything, "of es")[0].fitted_on == "es"
    assert len(of_row(everything, "searched")[0].details["search"]) == 2
    assert of_row(everything, "lora-flow")[0].details["steps"] == 2


def test_one_adapter_is_the_same_however_it_is_named(everything: Everything) -> None:
    answers = of_row(everything, "math")[1]
    assert of_row(everything, "by position")[1] == answers
    assert of_row(everything, "saved")[1] == answers
    assert of_row(everything, "by name")[1] != answers
    assert of_row(everything, "average")[1] == of_row(everything, "other way round")[1]


def direct(setting: dict[str, Any], model: FusedModel) -> tuple[list[str], list[float]]:
    """Answers and scores of the first two problems, without any of the code that is tested here."""
    lines = Path(setting["tasks"]["zh"]["test"]).read_text(encoding="utf-8").splitlines()[:2]
    problems = [json.loads(line) for line in lines]
    turns = [[{"role": "user", "content": problem["prompt"]}] for problem in problems]
    texts = [
        answer.text
        for turn in turns
        for answer in generate_answers(model, [turn], tokenizer=model.tokenizer, prompt=model.prompt, max_new_tokens=40)
    ]
    numbers = ["".join(c if c.isdigit() else " " for c in text).split() for text in texts]
    scores = [float(bool(n) and float(n[-1]) == float(p["answer"])) for n, p in zip(numbers, problems, strict=True)]
    return texts, scores


@pytest.mark.parametrize("method", ["average", "lora-flow", "phatgoose", "new", "tuned"])
def test_answers_are_those_of_the_model_itself(setting: dict[str, Any], everything: Everything, method: str) -> None:
    output, adapters = everything[1], {name: adapter_paths()[name] for name in ("zh-chat", "math")}
    learned = output / "learned" / method / "zh" / "seed-0"
    if method == "average":
        model = FusedModel.from_adapters(base_path(), adapters, "average")
    elif (learned / "fusion").is_dir():
        model = FusedModel.from_pretrained(learned / "fusion")
    else:
        model = FusedModel.from_adapters(base_path(), {"it": learned / "adapter"}, "it")
    record, answers = of_row(everything, method)
    texts, scores = direct(setting, model)
    assert answers == texts
    assert list(record.scores) == scores


def test_mean_weights_are_the_methods_own(everything: Everything) -> None:
    def weights(method: str) -> Any:
        return dict(of_row(everything, method)[0].weights)

    assert weights("average") == {"zh-chat": pytest.approx((0.5, 0.0)), "math": pytest.approx((0.5, 0.0))}
    assert weights("by name") == {"zh-chat": pytest.approx((1.0, 0.0)), "math": pytest.approx((0.0, 0.0))}
    third = pytest.approx((1 / 3, 0.0), abs=1e-6)
    assert weights("all three") == {"zh-chat": third, "es-chat": third, "math": third}
    flow = weights("lora-flow")
    assert flow["zh-chat"][1] > 0
    assert weights("base") == weights("tuned") == {}


def test_what_was_learned_elsewhere_is_used_here(everything: Everything) -> None:
    output = everything[1]
    elsewhere = SavedFusion.open(output / "learned" / file_name("of es") / "es" / "seed-0" / "fusion")
    assert elsewhere.adapter_names == ["es-chat", "math"]
    here = SavedFusion.open(output / "learned" / "lora-flow" / "zh" / "seed-0" / "fusion").tensors
    assert not all(torch.equal(here[name], value) for name, value in elsewhere.tensors.items())
    # The gates of the other task answer with this task's adapters.
    prompt = Store(output).read_items(Cell("zh", "of es", 0))[0].prompt
    assert prompt == Store(output).read_items(Cell("zh", "base", None))[0].prompt


# ---- Going on ------------------------------------------------------------------------------------------------------


def test_finished_cells_are_left_alone(everything: Everything, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, output, _ = everything

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished cell was measured")

    monkeypatch.setattr(workers, "answer_task", fail)
    monkeypatch.setattr(prepare, "load_base", fail)
    before = cell_files(output)
    failed, said = run(plan, output)
    assert failed == 0
    assert "17 cells, 17 of them finished before" in said
    assert cell_files(output) == before


def test_the_kept_plan_says_the_same(everything: Everything) -> None:
    plan, output, _ = everything
    again = read_plan(output / "plan.yaml")
    assert again == plan
    assert identities(open_comparison(again)) == identities(open_comparison(plan))


def test_scoring_anew_changes_only_what_is_wrong(everything: Everything, tmp_path: Path) -> None:
    plan, output, _ = everything
    before = {name: content for name, (content, _) in cell_files(output).items()}
    assert rescore(plan, output) == 0
    assert {name: content for name, (content, _) in cell_files(output).items()} == before
    cell = next(cell for cell in records(plan, output) if cell.method == "math")
    store = Store(output)
    record, items = store.read(cell), store.read_items(cell)
    assert record is not None
    wrong = [dataclasses.replace(items[0], scores={"last-number": 1 - record.scores[0]}), *items[1:]]
    store.write(dataclasses.replace(record, scores=[1 - record.scores[0], *record.scores[1:]]), wrong)
    assert rescore(plan, output) == 1
    assert {name: content for name, (content, _) in cell_files(output).items()} == before
    said = r"math.*once\.jsonl holds answers to other problems than the plan's. Give the plan and the limit"
    with pytest.raises(LoraflowError, match=said):
        rescore(plan.model_copy(update={"limit": 1, "methods": {"math": plan.methods["math"]}}), output)
    with pytest.raises(LoraflowError, match=r"has no finished cells of this plan. Run it first"):
        rescore(plan, tmp_path / "nowhere")


def test_a_plan_may_grow(shorter: dict[str, Any], tmp_path: Path) -> None:
    assert run(small_plan(shorter, ["base"], tasks=["zh"], limit=1), tmp_path)[0] == 0
    before = cell_files(tmp_path)
    failed, said = run(small_plan(shorter, ["base", "average"], limit=1), tmp_path)
    assert failed == 0
    assert "4 cells, 1 of them finished before" in said
    assert before.items() <= cell_files(tmp_path).items()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"limit": 3}, "limit"),
        ({"methods": {"row": {"method": "average", "adapters": "all"}}}, "method"),
        ({"setting": {"dtype": "float64"}}, "base"),
        ({"setting": {"adapters": {"math": str(adapter_paths()["code"])}}}, "adapters"),
    ],
    ids=["limit", "method", "base", "adapters"],
)
def test_cells_that_were_measured_otherwise_are_told(
    shorter: dict[str, Any], tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    content: dict[str, Any] = {"methods": {"row": "average"}, "tasks": ["zh"], "limit": 2}
    assert run(small_plan(shorter, **content), tmp_path)[0] == 0
    before = cell_files(tmp_path)
    changed = copy.deepcopy(shorter)
    for name, value in change.pop("setting", {}).items():
        changed[name] = {**changed[name], **value} if isinstance(value, dict) else value
    other = small_plan(changed, **{**content, **change})
    said = rf"row.once\.json was measured with another `{key}`: .*, not .*\. Give another directory, or replace"
    with pytest.raises(LoraflowError, match=said):
        run(other, tmp_path)
    assert cell_files(tmp_path) == before
    assert run(other, tmp_path, overwrite=True)[0] == 0
    record = next(iter(records(other, tmp_path).values()))
    assert len(record.scores) == other.limit
    assert run(other, tmp_path)[1].startswith("1 cells, 1 of them finished before")


def test_weights_of_finished_cells_are_recorded_when_they_are_asked_for(
    shorter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(shorter, ["average", "base"], tasks=["zh"], limit=1)
    assert run(plan, tmp_path)[0] == 0
    before = records(plan, tmp_path)
    assert [record.weights for record in before.values()] == [None, None]
    asking = plan.model_copy(update={"weights": True})
    with monkeypatch.context() as patched:
        patched.setattr(workers, "answer_task", None)
        assert "2 cells, 0 of them finished before" in run(asking, tmp_path)[1]
    halves = {"zh-chat": (0.5, 0.0), "math": (0.5, 0.0)}
    found = list(records(asking, tmp_path).values())
    assert [record.weights for record in found] == [halves, {}]
    assert [dataclasses.replace(record, weights=None, chosen=()) for record in found] == list(before.values())
    assert "2 cells, 2 of them finished before" in run(asking, tmp_path)[1]


def test_bases_of_the_same_name_are_told_apart(shorter: dict[str, Any], tmp_path: Path) -> None:
    places = [tmp_path / place / "base" for place in ("one", "two", "moved")]
    for place in places:
        shutil.copytree(base_path(), place)
    edit_tensors(places[1], lambda tensors: next(iter(tensors.values())).mul_(1.5), "model.safetensors")
    one, two, moved = (
        open_comparison(small_plan({**shorter, "base": str(place)}, ["base"], tasks=["zh"])) for place in places
    )
    assert identities(one) == identities(moved)
    assert identities(one) != identities(two)


def test_a_fusion_saved_anew_is_measured_anew(shorter: dict[str, Any], tmp_path: Path) -> None:
    adapters = {name: shorter["adapters"][name] for name in ("zh-chat", "math")}
    plan = small_plan(shorter, {"row": {"fusion": str(tmp_path / "fusion")}}, tasks=["zh"])
    seen = []
    for weights in ({"math": 1.0}, {"math": 0.5}, {"math": 1.0}):
        FusedModel.from_adapters(shorter["base"], adapters, Static(weights)).save_pretrained(tmp_path / "fusion")
        seen.append(identities(open_comparison(plan)))
    assert seen[0] == seen[2] != seen[1]


def test_the_adapters_own_data_is_a_part_of_what_was_learned(shorter: dict[str, Any], tmp_path: Path) -> None:
    def found(lines: int) -> Any:
        path = tmp_path / "own.jsonl"
        path.write_text("".join('{"prompt": "a", "completion": "b"}\n' for _ in range(lines)))
        changed = {**shorter, "adapter_data": {**shorter["adapter_data"], "math": str(path)}}
        return identities(open_comparison(small_plan(changed, ["phatgoose", "centroid"], tasks=["zh"])))

    assert found(3) == found(3) != found(4)


def test_task_files_are_a_part_of_the_problems(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    task = Task("t", (), (), {}, harness=HarnessTask("mine", include_path=str(tmp_path)))
    before = task.test_digest(None)
    (tmp_path / "mine.yaml").write_text("task: mine\nnum_fewshot: 3\n")
    assert task.test_digest(None) != before


def test_what_was_learned_is_kept_for_new_problems_only(shorter: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(shorter)
    plans = [small_plan(shorter, {"row": FLOW}, tasks=["zh"], limit=limit) for limit in (1, 2)]
    fitted = tmp_path / "run" / "learned" / "row" / "zh" / "seed-0" / "fit.json"
    assert run(plans[0], tmp_path / "run")[0] == 0
    first = fitted.read_bytes()
    assert run(plans[1], tmp_path / "run", overwrite=True)[0] == 0
    assert fitted.read_bytes() == first
    # Another adapter under the same name makes another fit.
    changed["adapters"]["math"] = str(adapter_paths()["code"])
    assert run(small_plan(changed, {"row": FLOW}, tasks=["zh"], limit=2), tmp_path / "run", overwrite=True)[0] == 0
    assert fitted.read_bytes() != first


def test_a_source_with_a_changed_adapter_is_fitted_and_measured_anew(shorter: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(shorter["adapters"]["es-chat"], tmp_path / "es-chat")
    shorter["adapters"]["es-chat"] = str(tmp_path / "es-chat")
    plan = small_plan(shorter, {"moved": {**FLOW, "fitted_on": "es"}, "own": FLOW}, tasks=["zh"], limit=1)
    output = tmp_path / "run"
    assert run(plan, output)[0] == 0
    before, fitted = records(plan, output), output / "learned" / "moved" / "es" / "seed-0" / "fit.json"
    first = fitted.read_bytes()
    edit_tensors(tmp_path / "es-chat", lambda tensors: next(iter(tensors.values())).mul_(1.5))
    with pytest.raises(
        LoraflowError, match=r"moved.seed-0\.json was measured with another `fitted_adapters`: .*es-chat"
    ):
        run(plan, output)
    assert "2 cells, 1 of them finished before" in run(plan, output, overwrite=True)[1]
    after = records(plan, output)
    assert [after[cell] == record for cell, record in before.items()] == [False, True]
    assert fitted.read_bytes() != first


def test_a_fit_is_shared_by_all_tasks_that_it_answers(
    shorter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[str] = []
    real = prepare.fit

    def counted(model: FusedModel, *rest: Any, **options: Any) -> Any:
        fitted.append(model.adapter_names[0])
        return real(model, *rest, **options)

    monkeypatch.setattr(prepare, "fit", counted)
    plan = small_plan(shorter, {"gates": {**FLOW, "fitted_on": "every"}, "base": None}, limit=1)
    assert open_comparison(plan).reference == "base"
    assert run(plan, tmp_path)[0] == 0
    assert sorted(fitted) == ["es-chat", "zh-chat"]
    found = records(plan, tmp_path)
    assert [(c.task, c.method) for c in found] == [
        (task, method) for task in ("zh", "es") for method in ("gates of zh", "gates of es", "base")
    ]
    assert {r.fitted_on for c, r in found.items() if c.method == "gates of es"} == {"es"}


def test_a_mixed_task_uses_the_fit_of_the_task_that_it_mixes(
    shorter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter["tasks"]["mix"] = {"mixed": {"task": "zh", "other": "es"}}
    plan = small_plan(shorter, {"row": FLOW}, tasks=["mix", "zh"], limit=1)
    assert run(plan, tmp_path)[0] == 0
    assert [path.name for path in (tmp_path / "learned" / "row").iterdir()] == ["zh"]


# ---- Failures ------------------------------------------------------------------------------------------------------


def test_a_cell_that_fails_stops_no_other(
    shorter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(shorter, {"[red]base": "base", "average": "average"}, limit=1)
    real = workers.answer_task

    def unlucky(model: FusedModel, task: Any, **options: Any) -> Any:
        if task.name == "zh" and not model.gates:
            raise RuntimeError("no luck [today]")
        return real(model, task, **options)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "answer_task", unlucky)
        failed, said = run(plan, tmp_path)
    assert failed == 1
    assert "[1/4] [red]base, zh: FAILED" in said
    assert "RuntimeError: no luck [today]" in said
    assert Cell("zh", "[red]base", None) not in records(plan, tmp_path)
    assert len(records(plan, tmp_path)) == 3
    failed, said = run(plan, tmp_path)
    assert failed == 0
    assert "4 cells, 3 of them finished before" in said
    assert len(records(plan, tmp_path)) == 4


def test_two_workers_measure_what_one_does(shorter: dict[str, Any], tmp_path: Path) -> None:
    plan = small_plan(shorter, {"average": "average", "row": FLOW}, tasks=["zh"], seeds=[0, 1], limit=2)
    found = []
    for number in (1, 2):
        failed, said = run(plan, tmp_path / str(number), workers=number)
        assert failed == 0, said
        assert said.count("last-number") == 3
        cells = records(plan, tmp_path / str(number))
        answers = [[i.answer for i in Store(tmp_path / str(number)).read_items(cell)] for cell in cells]
        found.append(([(record.scores, record.identity) for record in cells.values()], answers))
    assert found[0] == found[1]


class _DeadPool:
    """A pool whose processes were killed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, *_: Any) -> concurrent.futures.Future[None]:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        future.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
        return future

    def shutdown(self, **_: Any) -> None:
        pass


def test_a_worker_that_dies_is_told(shorter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", _DeadPool)
    with pytest.raises(LoraflowError, match=r"A worker ended without a word: .* with fewer workers; what is finished"):
        run(small_plan(shorter, CHEAP, tasks=["zh"], limit=1), tmp_path, workers=2)


def test_one_comparison_runs_in_a_place(shorter: dict[str, Any], tmp_path: Path) -> None:
    plan = small_plan(shorter, CHEAP, tasks=["zh"], limit=1)
    with FileLock(tmp_path / ".lock"):
        for start in (run, rescore):
            with pytest.raises(
                LoraflowError, match=r"Another comparison is running in .* Wait for it, or give another"
            ):
                start(plan, tmp_path)
    assert not (tmp_path / "plan.yaml").exists()
    with pytest.raises(LoraflowError, match=r"`workers` \(=0\) must be at least 1"):
        Options(workers=0)


# ---- What is refused before anything is loaded ---------------------------------------------------------------------

MISTAKES: dict[str, tuple[Any, type[LoraflowError], str]] = {
    "method": ("averag", MethodError, "Unknown method 'averag'. .*Did you mean 'average'?"),
    "option": ({"method": "lora-flow", "options": {"granularty": "step"}}, MethodError, "granular"),
    "position": ({"adapter": 2}, DataError, r"wants the adapter 2, and 'zh' has 'zh-chat', 'math'. .* from 0 to 1"),
    "adapter": ({"adapter": "es-chat"}, DataError, "The row 'row' wants the adapter 'es-chat', and 'zh' has"),
    "adapters": ({"method": "average", "adapters": ["maths"]}, DataError, "wants the adapter 'maths'.*mean 'math'"),
    "on top of": ({"finetune": "new", "on_top_of": 2}, DataError, "'row' wants the adapter 2, and 'zh' has 'zh-chat'"),
    "on no method": ({"finetune": "new", "on_top_of": "code"}, MethodError, "Unknown method 'code'"),
    "on a query": ({"finetune": "new", "on_top_of": "qa-flora"}, MethodError, "'qa-flora' reads whole prompts before"),
    "tuned": ({"finetune": "code"}, DataError, "The row 'row' wants the adapter 'code', and 'zh' has"),
    "fit": ({**FLOW, "fit": {"max_step": 3}}, DataError, "unknown setting 'max_step' of its fit.*mean 'max_steps'"),
    "LoRA of gates": ({**FLOW, "fit": {"alpha": 3}}, DataError, "unknown setting 'alpha' of its fit"),
    "value": ({**FLOW, "fit": {"epochs": 0}}, LoraflowError, r"`epochs` \(=0\) must be greater than 0"),
    "fit of nothing": ({"method": "base", "fit": QUICK}, MethodError, "'row' learns nothing here. Leave `fit` out"),
    "search of nothing": ({"adapter": 0, "search": True}, MethodError, "learns nothing here. Leave `search` out"),
    "examples of nothing": ({"method": "base", "examples": 2}, MethodError, "learns nothing here. Leave `examples`"),
    "place of nothing": ({"method": "base", "fitted_on": "es"}, MethodError, "nothing here. Leave `fitted_on` out"),
    "search": ({"method": "lorahub", "search": True}, MethodError, "does not learn by gradient on a task. Leave `sear"),
    "fitted_on": ({"finetune": "new", "fitted_on": "es"}, MethodError, "'row' is fine-tuned. `fitted_on` is for gates"),
    "own data": ({"method": "centroid", "examples": 2}, MethodError, "learns from its adapters' own data. Leave `exa"),
    "examples": ({**FLOW, "examples": 7}, DataError, "wants 7 examples, and 'zh' has 6. Name further ones as `more_t"),
    "task": ({**FLOW, "fitted_on": "ru"}, DataError, "The setting has no task 'ru'"),
    "other adapters": ({**FLOW, "fitted_on": "three"}, DataError, "on 'three' with 3 adapters, and 'zh' has 2"),
    "no train": ({**FLOW, "fitted_on": "bare"}, DataError, "learns on the task 'bare', which has no `train` examples"),
    "no dev": ({**FLOW, "search": True, "fitted_on": "few"}, DataError, "searches a grid, and 'few' has no `dev`"),
    "fusion": ({"fusion": "./no-such-fusion"}, LoraflowError, "no-such-fusion"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_row_that_cannot_be_is_told_before_anything_is_loaded(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    row, error, said = MISTAKES[case]
    monkeypatch.setattr(prepare, "load_base", lambda *_: pytest.fail("the base was loaded"))
    changed = copy.deepcopy(setting)
    zh = changed["tasks"]["zh"]
    changed["tasks"]["three"] = {**zh, "adapters": ["zh-chat", "es-chat", "math"]}
    changed["tasks"]["bare"] = {key: value for key, value in zh.items() if key not in ("train", "dev")}
    changed["tasks"]["few"] = {key: value for key, value in zh.items() if key != "dev"}
    plan = small_plan(changed, {"base": "base", "row": row}, tasks=["zh"])
    with pytest.raises(error, match=said):
        run(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lora_is_trained_on_an_adapter_or_on_gates_that_are_fitted_first(
    shorter: dict[str, Any], tmp_path: Path
) -> None:
    lora = {"finetune": "new", "fit": {**QUICK, "r": 2, "alpha": 4}}
    rows = {"on math": {**lora, "on_top_of": 1}, "on gates": {**lora, "on_top_of": "lora-flow", "examples": 2}}
    gates = {"lora-flow": {"max_steps": 2}}
    plan = small_plan({**shorter, "recipes": gates}, rows, tasks=["zh"], limit=1, weights=True)
    failed, said = run(plan, tmp_path)
    assert not failed, said
    first, second = records(plan, tmp_path).values()
    assert (first.examples, second.examples, first.details["steps"]) == (6, 2, 2)
    assert second.learned_parameters > first.learned_parameters
    assert {name: mean for name, (mean, _) in dict(first.weights or {}).items()} == {
        "zh-chat": 0.0,
        "math": 1.0,
        "tuned": 1.0,
    }
    # What is finished is kept.
    _, said = run(plan, tmp_path)
    assert "2 cells, 2 of them finished before" in said


def test_data_of_adapters_may_be_missing(setting: dict[str, Any]) -> None:
    plan = small_plan({**setting, "adapter_data": {}}, ["centroid"])
    with pytest.raises(DataError, match="the data of the adapter 'zh-chat', and the setting's `adapter_data` has none"):
        open_comparison(plan)


def test_rows_that_may_be_missing_are_left_out_and_told(shorter: dict[str, Any], tmp_path: Path) -> None:
    rows = {"base": None, "many": {**FLOW, "examples": 7, "if_possible": True}}
    plan = small_plan(shorter, rows, tasks=["zh"], limit=1)
    failed, said = run(plan, tmp_path)
    assert failed == 0
    assert "left out: many on zh: The row 'many' wants 7 examples, and 'zh' has 6." in said
    assert "1 cells, 0 of them finished before" in said
    # A mistake is no lack of data.
    with pytest.raises(MethodError, match="learns nothing here"):
        open_comparison(small_plan(shorter, {"x": {"method": "base", "examples": 7, "if_possible": True}}))


def test_code_runs_only_with_permission(
    shorter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter["tasks"]["zh"]["scorer"] = "code-tests"
    plan = small_plan(shorter, CHEAP, tasks=["zh", "es"], limit=1)
    with pytest.raises(SandboxError, match="allow"):
        run(plan, tmp_path)
    # A task whose scorers ask for no permission, as those of a setting's own may, is refused all the same.
    monkeypatch.setattr(running, "open_comparison", lambda plan, **_: open_comparison(plan, allow_code=True))
    with pytest.raises(
        SandboxError, match=r"The task 'zh' runs generated code. Say `allow_code=True`, or leave it out"
    ):
        run(plan, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert run(plan.model_copy(update={"tasks": ["es"]}), tmp_path)[0] == 0


def test_the_reference_is_the_one_named_or_the_last(shorter: dict[str, Any]) -> None:
    def reference(**content: Any) -> str:
        found: Comparison = open_comparison(small_plan(shorter, CHEAP, **content))
        return found.reference

    assert (reference(), reference(reference="base")) == ("average", "base")


# ---- What is answered ----------------------------------------------------------------------------------------------


def test_only_so_many_problems_are_answered_and_answers_end_before_a_stop(
    setting: dict[str, Any], tmp_path: Path
) -> None:
    changed = copy.deepcopy(setting)
    plans = [small_plan(changed, ["math"], tasks=["zh"], limit=limit, batch_size=2) for limit in (1, 3)]
    for plan in plans:
        assert run(plan, tmp_path / str(plan.limit))[0] == 0
    one, three = (Store(tmp_path / str(limit)).read_items(Cell("zh", "math", None)) for limit in (1, 3))
    assert len(three) == 3
    assert three[0] == one[0]
    assert [item.id for item in three] == [f"zh-test.jsonl:{n}" for n in (1, 2, 3)]
    cut = three[0].answer[3:5]
    changed["tasks"]["zh"]["stop"] = [cut]
    stopped = small_plan(changed, ["math"], tasks=["zh"], limit=1)
    assert run(stopped, tmp_path / "stopped")[0] == 0
    item = Store(tmp_path / "stopped").read_items(Cell("zh", "math", None))[0]
    assert item.answer == three[0].answer[: three[0].answer.index(cut)]
    assert (item.tokens or 0) < (three[0].tokens or 0)


# ---- kill -9 -------------------------------------------------------------------------------------------------------

PATIENCE_S = 240


def wait_for(what: Callable[[], Any], why: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def kill_when() -> Iterator[Callable[..., None]]:
    """Start a command, kill it once something is so, and see its workers end by themselves."""
    started: list[psutil.Process] = []

    def kill(command: list[str], ready: Callable[[], Any], output: Path) -> None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        parent = psutil.Process(process.pid)
        started.append(parent)
        wait_for(lambda: ready() or process.poll() is not None, "nothing was measured")
        assert process.poll() is None, "it ended before it could be killed"
        workers = parent.children(recursive=True)
        started.extend(workers)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: all(gone(worker) for worker in workers), "a worker outlived its parent")
        with FileLock(output / ".lock", timeout=0):
            pass

    yield kill
    for process in started:
        if not gone(process):
            process.kill()


def command_of(plan: Plan, root: Path, output: Path, workers: int) -> list[str]:
    path = root / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json", exclude_defaults=True), sort_keys=False))
    program = (sys.executable, "-c", "from loraflow.cli import app; app()")
    place = ("--output", str(output), "--device", "cpu", "--workers", str(workers))
    return [*program, "compare", str(path), *place]


def test_a_killed_comparison_goes_on(shorter: dict[str, Any], tmp_path: Path, kill_when: Callable[..., None]) -> None:
    rows = {"average": "average", "row": {**FLOW, "fit": {"max_steps": 4, "batch_size": 2}}, "base": "base"}
    plan, output = small_plan(shorter, rows, seeds=[0, 1], limit=1), tmp_path / "run"
    command = command_of(plan, tmp_path, output, 2)
    kill_when(command, lambda: list(output.glob("cells/*/*/*.json")), output)
    before = cell_files(output)
    finished = {name: kept for name, kept in before.items() if name.endswith(".json")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert f"8 cells, {len(finished)} of them finished before" in done.stderr
    after = cell_files(output)
    assert len([name for name in after if name.endswith(".json")]) == 8
    for name in finished:
        assert after[name] == before[name]
        assert after[f"{name}l"] == before[f"{name}l"]


def test_a_killed_fit_goes_on(shorter: dict[str, Any], tmp_path: Path, kill_when: Callable[..., None]) -> None:
    row = {**FLOW, "fit": {"max_steps": 40, "checkpoint_steps": 2, "batch_size": 2}}
    plan, killed = small_plan(shorter, {"row": row}, tasks=["zh"], limit=1), tmp_path / "killed"
    learned = killed / "learned" / "row" / "zh" / "seed-0"
    command = command_of(plan, tmp_path, killed, 1)
    kill_when(command, lambda: list(learned.glob("checkpoints/checkpoint-*/COMPLETE")), killed)
    assert not (learned / "fit.json").exists()
    begun = os.stat(learned / "identity.json").st_ino
    assert 0 < float((learned / "seconds.txt").read_text()) < PATIENCE_S
    (learned / "seconds.txt").write_text("1e6")
    assert run(plan, killed)[0] == run(plan, tmp_path / "whole")[0] == 0
    assert os.stat(learned / "identity.json").st_ino == begun, "the interrupted fit was forgotten"
    fusions = [
        SavedFusion.open(root / "learned" / "row" / "zh" / "seed-0" / "fusion").tensors
        for root in (killed, tmp_path / "whole")
    ]
    assert all(torch.equal(fusions[0][name], value) for name, value in fusions[1].items())
    assert not (learned / "checkpoints").exists()
    (record,) = records(plan, killed).values()
    assert 1e6 < record.fit_s < 1e6 + PATIENCE_S
    assert not (learned / "seconds.txt").exists()


def test_a_wrong_base_is_found_before_anything_is_written(setting: dict[str, Any], tmp_path: Path) -> None:
    plan = small_plan({**setting, "base": "./no-such-base"}, ["average"])
    with pytest.raises(LoraflowError, match=r"The base model '.*no-such-base' cannot be read"):
        run(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_setting_that_one_cell_lacks_differs_from_none():
    assert difference({}, {"seed": None}) == "`seed`: nothing, not null"
    assert difference({"seed": None}, {}) == "`seed`: null, not nothing"

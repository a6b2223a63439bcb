"""Plans: what may be written short, where paths lead, and what every mistake says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraflow.errors import DataError
from loraflow.evaluation.compare.comparison import open_comparison
from loraflow.evaluation.compare.plan import (
    STUDIES,
    FieldNames,
    Plan,
    RowSpec,
    SettingSpec,
    make_plan,
    read_plan,
    study_names,
)
from loraflow.training.recipes import read_yaml

ORIGIN = Path("plans/mine.yaml")
TASK = {"test": "test.jsonl", "scorer": "last-number"}
SETTING = {"base": "org/base", "adapters": {"zh": "org/zh"}, "tasks": {"math": TASK}}


def plan_of(**content: Any) -> Plan:
    return make_plan({"setting": "small-world", "methods": ["base"], **content}, ORIGIN)


def setting_of(**content: Any) -> SettingSpec:
    setting = plan_of(setting={**SETTING, **content}).setting
    assert isinstance(setting, SettingSpec)
    return setting


# ---- What is written ------------------------------------------------------------------------------------------------


def test_a_row_may_be_a_name_alone_or_have_one() -> None:
    methods = plan_of(methods={"base": None, "mean": "average", "gates": {"method": "lora-flow"}, 25: None}).methods
    assert methods == {
        "base": RowSpec(method="base"),
        "mean": RowSpec(method="average"),
        "gates": RowSpec(method="lora-flow"),
        "25": RowSpec(method="25"),
    }
    assert list(plan_of(methods=["qa-flora", "base"]).methods.items()) == [
        ("qa-flora", RowSpec(method="qa-flora")),
        ("base", RowSpec(method="base")),
    ]


def test_a_row_with_several_numbers_of_examples_is_a_row_for_each() -> None:
    methods = {"gates": {"method": "lora-flow", "examples": [20, 200]}, "one": {"method": "average"}}
    plan = plan_of(methods=methods, reference="gates, 200")
    assert plan.methods == {
        "gates, 20": RowSpec(method="lora-flow", examples=20, curve="gates"),
        "gates, 200": RowSpec(method="lora-flow", examples=200, curve="gates"),
        "one": RowSpec(method="average"),
    }
    # Written out, it is the same measurement.
    assert plan.methods["gates, 20"].short() == RowSpec(method="lora-flow", examples=20).short()


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"gates": {"method": "lora-flow", "examples": []}}, r"`methods.gates.examples` \(=\[\]\) must list different"),
        ({"gates": {"method": "lora-flow", "examples": [5, 5]}}, r"\(=\[5, 5\]\) must list different numbers"),
        ({"gates": {"method": "lora-flow", "examples": [0]}}, r"methods.gates, 0.examples`: Input should be greater"),
        ({"a": {"method": "lora-flow", "examples": [5]}, "a, 5": "base"}, r"two rows have the name 'a, 5'"),
    ],
)
def test_numbers_of_examples_that_cannot_be(methods: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        plan_of(methods=methods)


def test_the_dev_examples_may_be_answered() -> None:
    plan = plan_of(tasks=["zh-math", "es-math"], methods=["base", "lora-flow"], problems="dev", limit=7)
    task = open_comparison(plan).setting.tasks["zh-math"]
    tested = open_comparison(plan.model_copy(update={"problems": "test"})).setting.tasks["zh-math"]
    assert task.test == task.dev == tested.dev
    assert task.test_digest(None) != tested.test_digest(None)
    # Tasks with the same problems still have the same, but not those of the test.
    assert task.problems == open_comparison(plan).setting.tasks["es-math"].problems != tested.problems
    answer = tested.dev[0].completion
    assert next(iter(task.score([answer])[0].values())) == 1.0


def test_a_task_without_dev_examples_cannot_answer_them(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "1", "completion": "1"}\n')
    content = {"setting": SETTING, "methods": ["base"], "problems": "dev"}
    with pytest.raises(DataError, match=r"The task 'math' has no dev examples to answer. Leave it out, or give it"):
        open_comparison(make_plan(content, tmp_path / "p.yaml"))


def test_what_a_plan_does_not_say() -> None:
    plan = plan_of()
    assert (plan.seeds, plan.tasks, plan.limit, plan.reference, plan.weights) == ([0], None, None, None, False)
    assert plan.title == "Comparison"
    task = setting_of().tasks["math"]
    assert (task.max_new_tokens, task.stop, task.adapters, task.problems) == (512, [], None, None)


def test_a_row_tells_only_what_was_said() -> None:
    spec = RowSpec(method="lora-flow", fit={"max_steps": 2}, if_possible=True)
    assert spec.short() == {"method": "lora-flow", "fit": {"max_steps": 2}}


# ---- Where paths lead -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "zh", "fused"):
        (tmp_path / "things" / name).mkdir(parents=True)
    for name in ("test", "train", "dev", "more", "own"):
        (tmp_path / "things" / f"{name}.jsonl").touch()
    return tmp_path


WRITTEN_OUT = {
    "base": "things/base",
    "adapters": {"zh": "things/zh", "hub": "org/adapter"},
    "adapter_data": {"zh": "things/own.jsonl[:9]", "hub": "org/data:main@v1[train[:9]]"},
    "tasks": {
        "math": {
            "test": "things/test.jsonl",
            "train": "things/train.jsonl",
            "dev": "things/dev.jsonl",
            "more_train": "things/more.jsonl",
            "scorer": "last-number",
            "fields": {"prompt": "q", "completion": "a"},
        }
    },
}


def check_places(setting: str | SettingSpec, things: Path) -> None:
    assert isinstance(setting, SettingSpec)
    assert setting.base == str(things / "base")
    assert setting.adapters == {"zh": str(things / "zh"), "hub": "org/adapter"}
    assert setting.adapter_data == {"zh": f"{things / 'own.jsonl'}[:9]", "hub": "org/data:main@v1[train[:9]]"}
    task = setting.tasks["math"]
    names = ("test", "train", "dev", "more")
    assert (task.test, task.train, task.dev, task.more_train) == tuple(str(things / f"{n}.jsonl") for n in names)
    assert task.fields == FieldNames(prompt="q", completion="a")


def test_paths_are_relative_to_the_file_that_names_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    content = {"setting": WRITTEN_OUT, "methods": {"saved": {"fusion": "things/fused"}, "hub": {"fusion": "org/f"}}}
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    plan = read_plan(folder / "plan.yaml")
    check_places(plan.setting, folder / "things")
    assert plan.methods["saved"].fusion == str(folder / "things" / "fused")
    assert plan.methods["hub"].fusion == "org/f"


@pytest.mark.parametrize("named", ["beside the plan", "where the command runs"])
def test_a_setting_can_be_a_file_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    (folder / "setting.yaml").write_text(yaml.safe_dump(WRITTEN_OUT))
    (folder / "plans").mkdir()
    monkeypatch.chdir(folder / "things")
    place = "../setting.yaml"
    (folder / "plans" / "plan.yaml").write_text(yaml.safe_dump({"setting": place, "methods": ["base"]}))
    plan = read_plan(folder / "plans" / "plan.yaml")
    if named == "where the command runs":
        plan = read_plan("granularity", setting=place)
    check_places(plan.setting, folder / "things")


def test_paths_may_name_variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(folder / "things"))
    monkeypatch.delenv("NOWHERE", raising=False)
    setting = setting_of(base="$MODELS/base", adapters={"zh": "${MODELS}/zh"})
    assert (setting.base, setting.adapters["zh"]) == (str(folder / "things" / "base"), str(folder / "things" / "zh"))
    said = r"mine\.yaml: '\$\{NOWHERE\}/base' needs the environment variable NOWHERE, which is not set"
    with pytest.raises(DataError, match=said):
        setting_of(base="${NOWHERE}/base")


def test_hub_ids_stay_and_dots_are_paths(folder: Path) -> None:
    assert setting_of(base="org/base").base == "org/base"
    assert setting_of(base="./missing").base == str(Path("plans/missing").resolve())


# ---- Changes from the command line ----------------------------------------------------------------------------------


def test_changes_come_before_what_is_written() -> None:
    plan = read_plan("granularity", setting="small-world", seeds=[7], limit=None, tasks=["zh-math"])
    assert (plan.seeds, plan.limit, plan.tasks, plan.reference) == ([7], None, ["zh-math"], "layer")


# ---- Mistakes -------------------------------------------------------------------------------------------------------

NEW = {"mixed": {"task": "math", "other": "b"}}
MISTAKES = {
    "unknown key": ({"limits": 3}, "`limits`: Extra inputs are not permitted. Known: .*Did you mean 'limit'?"),
    "unknown key of a row": (
        {"methods": {"a": {"method": "base", "option": {}}}},
        "`methods.a.option`: .*Did you mean 'options'?",
    ),
    "unknown key of a setting": (
        {"setting": {**SETTING, "adapter": {}}},
        "`setting.adapter`: Extra inputs are not permitted. .*Did you mean 'adapters'?",
    ),
    "unknown key of a task": (
        {"setting": {**SETTING, "tasks": {"math": {**TASK, "scorers": "x"}}}},
        "`setting.tasks.math.scorers`: .*Did you mean 'scorer'?",
    ),
    "two kinds": (
        {"methods": {"a": {"method": "base", "adapter": 0}}},
        "`methods.a`: give exactly one of `method`, `adapter`, `fusion`, `merge` and `finetune`.",
    ),
    "on top of a method": (
        {"methods": {"a": {"method": "average", "on_top_of": 1}}},
        "`methods.a`: `on_top_of` is what a new LoRA is trained on; say `finetune: new`.",
    ),
    "options of an adapter": (
        {"methods": {"a": {"adapter": 0, "options": {"x": 1}}}},
        "`methods.a`: `options` are parameters of a `method` or a `merge`.",
    ),
    "a rank of a method": (
        {"methods": {"a": {"method": "average", "rank": 2}}},
        "`methods.a`: `rank` is what a `merge` is compressed to; leave it out.",
    ),
    "adapters of a fusion": (
        {"methods": {"a": {"fusion": "org/f", "adapters": "all"}}},
        "`methods.a`: a `fusion` has its own adapters; leave `adapters` out.",
    ),
    "a row that is no name": ({"methods": ["base", {"a": "b"}]}, "`methods`: a list of methods holds names only"),
    "a row twice": ({"methods": ["base", "base"]}, "`methods` names one twice: \\['base', 'base'\\]"),
    "no rows": ({"methods": {}}, "`methods`: Dictionary should have at least 1 item"),
    "methods of another kind": ({"methods": 3}, "`methods`: Input should be a valid dictionary"),
    "unknown reference": (
        {"methods": ["average"], "reference": "averag"},
        "`plan`: `reference`: there is no row 'averag'. Known: 'average'. Did you mean 'average'?",
    ),
    "a reference of many rows": (
        {"methods": {"a": {"method": "lora-flow", "fitted_on": "every"}, "b": "base"}, "reference": "a"},
        "`reference`: 'a' is a row for every task; name one that is one row",
    ),
    "doubled seeds": ({"seeds": [0, 1, 0]}, "`seeds` names one twice: \\[0, 1, 0\\]"),
    "doubled tasks": ({"tasks": ["a", "a"]}, "`tasks` names one twice: \\['a', 'a'\\]"),
    "no seeds": ({"seeds": []}, "`seeds`: List should have at least 1 item"),
    "limit": ({"limit": 0}, "`limit`: Input should be greater than or equal to 1"),
    "setting of another kind": ({"setting": 3}, "`setting`: Input should be a valid string"),
    "no adapters": ({"setting": {**SETTING, "adapters": {}}}, "`setting.adapters`: Dictionary should have at least 1"),
    "no source": (
        {"setting": {**SETTING, "tasks": {"math": {}}}},
        "`setting.tasks.math`: give exactly one of `test`, `harness`, `mixed` and `together`.",
    ),
    "two sources": (
        {"setting": {**SETTING, "tasks": {"math": {**TASK, "harness": "gsm8k"}}}},
        "`setting.tasks.math`: give exactly one of",
    ),
    "no scorer": (
        {"setting": {**SETTING, "tasks": {"math": {"test": "x"}}}},
        "`setting.tasks.math`: `test` needs a `scorer`.",
    ),
    "a mixed task of its own": (
        {"setting": {**SETTING, "tasks": {"math": TASK, "mix": {**NEW, "stop": ["x"]}}}},
        "`setting.tasks.mix`: a `mixed` task is as the task that it mixes; leave `stop` out.",
    ),
    "a harness task's key": (
        {"setting": {**SETTING, "tasks": {"math": {**TASK, "chat": True}}}},
        "`setting.tasks.math`: `chat` is of a `harness` task; leave it out.",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_says_where_it_is(case: str) -> None:
    changes, said = MISTAKES[case]
    with pytest.raises(DataError, match=f"^{re.escape(str(ORIGIN))}: .*{said}"):
        plan_of(**changes)


def test_a_plan_needs_a_setting() -> None:
    with pytest.raises(DataError, match=r"there is no `setting`. Name one there or with `setting='small-world'`"):
        read_plan("granularity")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", r"p\.yaml cannot be read as YAML"),
        (b"\xff\xfe\x00", r"p\.yaml cannot be read as YAML"),
        (b"- base\n", r"p\.yaml holds list, and should hold fields, as `name: value`"),
        (b"", r"p\.yaml holds NoneType, and should hold"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_plan(tmp_path / "p.yaml")


def test_an_unknown_plan_lists_the_studies() -> None:
    with pytest.raises(
        DataError, match=r"no plan 'granularty': neither a file nor a study. .*Did you mean 'granularity'"
    ):
        read_plan("granularty")
    with pytest.raises(DataError, match=r"missing\.yaml cannot be read as YAML"):
        read_plan("granularity", setting="missing.yaml")


# ---- Studies --------------------------------------------------------------------------------------------------------


# A study of a setting of its own is tested with that (test_many.py).
@pytest.mark.parametrize("name", sorted({path.stem for path in STUDIES.glob("*.yaml")} - {"many"}))
def test_a_study_can_be_run_on_the_small_world(name: str) -> None:
    assert name in study_names()
    content = read_yaml(STUDIES / f"{name}.yaml")
    assert content["title"]
    assert content["description"]
    plan = read_plan(name, setting="small-world", tasks=None if "tasks" in content else ["zh-math", "es-math"])
    comparison = open_comparison(plan, allow_code=True)
    assert comparison.reference == plan.reference
    seeded = [cell for cell in comparison.cells if cell.seed is not None]
    assert {cell.seed for cell in seeded} == {0, 1, 2}
    assert not [reason for reason in comparison.left_out if "examples" not in reason]


def test_numbers_may_have_an_exponent(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("setting: small-world\nmethods:\n  lora-flow: {fit: {learning_rate: 1e-3, weight_decay: 5E-1}}\n")
    plan = read_plan(file)
    # A row that does not say what it is, is the method of its name.
    assert plan.methods["lora-flow"].method == "lora-flow"
    assert plan.methods["lora-flow"].fit == {"learning_rate": 0.001, "weight_decay": 0.5}


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ({"learning_rate": "fast"}, r"The row 'lora-flow', `fit`: `learning_rate` \(='fast'\) must be a number"),
        ({"schedule": "sine"}, r"The row 'lora-flow', `fit`: `schedule` is unknown: 'sine'"),
        ({"report_to": "wandb"}, r"The row 'lora-flow': `fit.report_to` \(='wandb'\) is for one fit"),
    ],
)
def test_settings_of_a_fit_that_are_none(fit: dict[str, object], message: str) -> None:
    plan = plan_of(methods={"lora-flow": {"fit": fit}}, tasks=["zh-math"])
    with pytest.raises(DataError, match=message):
        open_comparison(plan)


def test_settings_of_a_fit_may_be_words() -> None:
    fit = {"batch_size": "auto", "schedule": "linear", "train_on": "all"}
    assert open_comparison(plan_of(methods={"lora-flow": {"fit": fit}}, tasks=["zh-math"])).cells


def test_a_misspelt_key_explains_the_missing_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`method`: Extra inputs are not permitted.*Did you mean 'methods'"):
        make_plan({"setting": "small-world", "method": {"base": None}}, tmp_path / "plan.yaml")


def test_a_missing_file_names_its_task(tmp_path: Path) -> None:
    task = {"test": "nope.jsonl", "scorer": "last-number"}
    setting = {"base": "org/base", "adapters": {"a": "org/a"}, "tasks": {"mine": task}}
    plan = make_plan({"setting": setting, "methods": ["average"]}, tmp_path / "plan.yaml")
    with pytest.raises(DataError, match="The task 'mine', `test`: There is no file"):
        open_comparison(plan)

"""The many world: what its adapters are for, their data, and the file that they come in."""

from __future__ import annotations

import os
import random
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from loraflow.adapters import AdapterBank
from loraflow.answers import generate_answers, require_tokenizer
from loraflow.demo import world
from loraflow.demo.language import LANGUAGES
from loraflow.demo.many import FORMS, SKILLS, SPECIALITIES, TASKS, draw, in_form, meaning_of, problems, speciality_of
from loraflow.demo.many_setting import METRIC, OWN_EXAMPLES, TEST, TOGETHER, many_world
from loraflow.demo.samples import draw_story
from loraflow.demo.world import many_adapter_paths
from loraflow.errors import DataError, StorageError
from loraflow.model import FusedModel


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return many_adapter_paths()


# ---- Tasks ---------------------------------------------------------------------------------------------------------


def test_there_is_one_of_each_kind_and_a_third_are_tasks() -> None:
    assert len(SPECIALITIES) == len(SKILLS) * len(LANGUAGES) * len(FORMS) == 48
    assert all(speciality_of(name).name == name for name in SPECIALITIES)
    parts = [Counter(getattr(SPECIALITIES[name], part) for name in TASKS) for part in ("skill", "language", "form")]
    assert [set(part) for part in parts] == [set(SKILLS), set(LANGUAGES), set(FORMS)]
    assert sorted(map(len, (TASKS, parts[0], parts[1], parts[2]))) == [2, 4, 6, 16]
    assert set(parts[1].values()) == {4}
    assert set(parts[2].values()) == {8}


@pytest.mark.parametrize("name", SPECIALITIES)
def test_problems_are_the_same_every_time_and_no_adapter_has_seen_them(name: str) -> None:
    test, own = problems(name, 40, "test"), problems(name, 100, "own")
    assert test == problems(name, 40, "test")
    assert test[:10] == problems(name, 10, "test")
    assert len({problem["prompt"] for problem in test}) == 40
    rng = random.Random(0)
    read = [draw(speciality_of(name), rng) for _ in range(300)]
    assert not {problem["prompt"] for problem in test} & {problem["prompt"] for problem in (*own, *read)}


def test_tasks_of_one_skill_are_the_same_problems() -> None:
    for name in ("take-zh-code", "take-ru-code", "take-en-code"):
        assert [one["completion"] for one in problems(name, 20, "test")] == [
            one["completion"] for one in problems("take-es-code", 20, "test")
        ]


def test_what_is_asked_and_answered() -> None:
    told = {name: problems(name, 1, "test")[0] for name in SPECIALITIES}
    for name, problem in told.items():
        one = SPECIALITIES[name]
        assert problem["prompt"].startswith(FORMS[one.form][one.language] + " ")
        assert problem["completion"].startswith("x =") == (one.form == "code")
    assert told["where-es-said"]["completion"].removeprefix("La respuesta es ") in told["where-es-said"]["prompt"] + "."
    # Numbers keep their space, Chinese words have none.
    assert in_form("3 + 4", "zh", "said") == "答案是 3 + 4。"
    assert in_form("在学校里", "zh", "code") == "x =在学校里"
    assert in_form("x = -x", "ru", "said") == "Ответ: x = -x."
    assert in_form("x = -x", "ru", "code") == "x = -x"


@pytest.mark.parametrize(("skill", "sign"), [("add", "+"), ("take", "-")])
def test_expressions_come_to_the_answer_of_the_problem(skill: str, sign: str) -> None:
    rng = random.Random(1)
    for _ in range(100):
        completion = draw(speciality_of(f"{skill}-en-code"), rng)["completion"].removeprefix("x = ")
        numbers = completion.split(f" {sign} ")
        assert 2 <= len(numbers) <= 3
        assert all(number.isdigit() for number in numbers)
        assert 0 <= eval(completion) <= 60


def test_programs_do_what_is_asked() -> None:
    rng = random.Random(2)
    for _ in range(100):
        program = draw(speciality_of("code-en-code"), rng)["completion"]
        assert 1 <= len(program.split(", x = ")) <= 2
        compile(program.replace(", x = ", "; x = "), "program", "exec")


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(DataError, match=r"The many world has no 'add-en-sad'\. .*Did you mean 'add-en-said'"):
        problems("add-en-sad", 1, "test")
    with pytest.raises(DataError, match=r"The many world has no task 'togethr'\. .*Did you mean 'together'"):
        many_world(["togethr"])


# ---- The adapters --------------------------------------------------------------------------------------------------


def test_the_file_is_small_and_holds_what_there_is(paths: dict[str, Path]) -> None:
    packed = Path(world.__file__).parent / "data" / "many.zip"
    assert packed.stat().st_size < 20 * 2**20
    assert list(paths) == list(SPECIALITIES)
    bank = AdapterBank(next(iter(paths.values())).parent)
    assert set(bank) == set(SPECIALITIES)
    assert {rank for entry in bank.values() for rank in entry.ranks} == {2, 4, 8}


def test_it_is_unpacked_once_by_whoever_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rename = os.rename

    def beaten(source: str, target: str) -> None:
        rename(source, target)
        raise OSError("there already")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", beaten)
        first = many_adapter_paths()
    assert all((path / "adapter_config.json").is_file() for path in first.values())
    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extractall", None)
        assert many_adapter_paths() == first
    assert [path.name for path in (tmp_path / "loraflow").iterdir()] == [next(iter(first.values())).parent.name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"many-world-\w+ cannot be written: .*file is a file"):
        many_adapter_paths()


def test_own_adapters_answer_what_the_base_cannot(paths: dict[str, Path]) -> None:
    names = ("code-es-said", "where-zh-said", "add-ru-said")
    model = FusedModel.from_adapters(world.base_path(), {name: paths[name] for name in names}, "base")
    right = {"base": 0, "own": 0}
    for name in names:
        asked = problems(name, 4, "test")
        for who, weights in (("base", dict.fromkeys(names, 0.0)), ("own", {name: 1.0})):
            model.set_method(weights)
            answers = generate_answers(
                model,
                [[{"role": "user", "content": problem["prompt"]}] for problem in asked],
                tokenizer=require_tokenizer(model.tokenizer),
                prompt=model.prompt,
                max_new_tokens=48,
            )
            right[who] += sum(a.text.strip() == p["completion"] for a, p in zip(answers, asked, strict=True))
    assert right["base"] == 0
    assert right["own"] >= 8


# ---- The setting ---------------------------------------------------------------------------------------------------


def test_each_task_has_all_adapters_and_one_of_its_own(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(next(iter(paths.values())).parents[2]))
    setting = many_world()
    assert list(setting.tasks) == list(TASKS)
    for name, task in setting.tasks.items():
        assert (task.own, task.adapters, task.metric) == ((name,), tuple(SPECIALITIES), METRIC)
        assert len(task.test) == TEST
        right = [example.completion for example in task.test[:3]]
        assert task.score([*right[:2], right[2] + "?"]) == [{METRIC: 1.0}, {METRIC: 1.0}, {METRIC: 0.0}]
        texts = [{e.messages[-1]["content"] for e in part} for part in (task.train, task.test)]
        assert not texts[0] & texts[1]
    assert [one["prompt"] for one in setting.adapter_examples("add-zh-code")] == [
        one["prompt"] for one in problems("add-zh-code", OWN_EXAMPLES, "own")
    ]
    joined = many_world([TOGETHER]).tasks[TOGETHER]
    assert joined.own == tuple(TASKS) * TEST
    assert len(joined.test) == TEST * len(TASKS)
    assert set(many_world(["words-en-said"]).tasks) == {"words-en-said"}


def test_stories_mean_the_same_whoever_else_is_there() -> None:
    frame = draw_story(random.Random(3))
    assert meaning_of(frame) == (frame.person, frame.noun, frame.colour, frame.place)

"""Settings: problems from files, digests that tell them apart, questions in two languages, the small world."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraflow.adapters import load_adapter
from loraflow.demo import tasks as demo_tasks
from loraflow.demo.setting import METRIC, MIXED, small_world
from loraflow.demo.tasks import TASKS, load_task, meaning_of, more_training, problem
from loraflow.errors import DataError, SandboxError
from loraflow.evaluation.compare import tasks as settings
from loraflow.evaluation.compare.plan import MixSpec, SettingSpec
from loraflow.evaluation.compare.tasks import Setting, load_setting, mix_sentences
from loraflow.prompts import PromptFormat
from tests.tiny import save_adapter, tiny_model


def lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    """A setting of two tasks, written out."""
    sums = [{"q": f"{n} + 1?", "a": str(n + 1), "note": n} for n in range(6)]
    plain = [{"prompt": f"{n} - 1?", "completion": str(n - 1)} for n in range(4)]
    sumas = [{"prompt": f"¿{n} + 1?", "completion": str(n + 1)} for n in range(6)]
    train = lines(tmp_path / "train.jsonl", sums[:2])
    return {
        "base": "org/base",
        "adapters": {"zh": "org/zh", "math": "org/math", "code": "org/code"},
        "adapter_data": {"zh": lines(tmp_path / "zh.jsonl", plain)},
        "tasks": {
            "sums": {
                "test": lines(tmp_path / "sums.jsonl", sums),
                "train": train,
                "more_train": lines(tmp_path / "more.jsonl", sums[2:5]),
                "dev": lines(tmp_path / "dev.jsonl", plain),
                "fields": {"prompt": "q", "completion": "a"},
                "dev_fields": {"prompt": "prompt", "completion": "completion"},
                "scorer": "last-number",
                "adapters": ["math", "zh"],
                "stop": ["\n"],
            },
            "sumas": {"test": lines(tmp_path / "sumas.jsonl", sumas), "scorer": "exact-match", "problems": "sums"},
            "short": {"test": lines(tmp_path / "short.jsonl", plain), "scorer": "exact-match"},
        },
    }


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another package, with settings good and bad."""
    info = tmp_path / "worlds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: worlds\nVersion: 1.0\n")
    places = {"flat": "worlds:flat", "empty": "worlds:empty", "absent": "worlds:absent", "small-world": "worlds:empty"}
    points = "".join(f"{name} = {place}\n" for name, place in places.items())
    (info / "entry_points.txt").write_text(f"[loraflow.settings]\n{points}")
    (tmp_path / "worlds.py").write_text(
        "from loraflow.evaluation.compare.tasks import Setting\n"
        "def flat(tasks, allow_code): return Setting(f'{tasks} {allow_code}', {}, {})\n"
        "def empty(tasks, allow_code): return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("worlds", None)


def load(spec: dict[str, Any], **options: Any) -> Setting:
    return load_setting(SettingSpec.model_validate(spec), **options)


# ---- From files ----------------------------------------------------------------------------------------------------


def test_a_setting_reads_its_files_by_its_fields(spec: dict[str, Any]) -> None:
    setting = load(spec)
    sums, sumas = setting.tasks["sums"], setting.tasks["sumas"]
    assert [e.messages[-1]["content"] for e in sums.test] == [f"{n} + 1?" for n in range(6)]
    assert [e.completion for e in sums.dev] == ["-1", "0", "1", "2"]
    assert (sums.adapters, sumas.adapters) == (("math", "zh"), ("zh", "math", "code"))
    assert (sums.metric, sumas.metric) == ("last-number", "exact-match")
    assert (sums.problems, sumas.problems, sums.learns_as, sumas.train) == ("sums", "sums", "sums", ())
    assert sums.score(["so 1", "5"]) == [{"last-number": 1.0}, {"last-number": 0.0}]
    assert setting.adapter_examples is not None
    assert len(setting.adapter_examples("zh")) == 4


def test_more_examples_come_after_the_first_ones(spec: dict[str, Any]) -> None:
    task = load(spec).tasks["sums"]
    completions = [[e.completion for e in task.training(count)] for count in (None, 1, 2, 3, 9)]
    assert completions == [["1", "2"], ["1"], ["1", "2"], ["1", "2", "3"], ["1", "2", "3", "4", "5"]]
    assert [e.completion for e in load(spec).tasks["sumas"].training(3)] == []


def test_only_wanted_tasks_are_read(spec: dict[str, Any]) -> None:
    spec["tasks"]["broken"] = {"test": "no such file", "scorer": "last-number"}
    assert list(load(spec, tasks=["short", "sums"]).tasks) == ["short", "sums"]
    with pytest.raises(DataError, match="There is no file no such file"):
        load(spec)


@pytest.mark.usefixtures("outside")
def test_another_package_brings_settings_by_name() -> None:
    assert load_setting("flat", tasks=["a"], allow_code=True).base == "['a'] True"
    with pytest.raises(
        DataError, match=r"Known: 'absent', 'empty', 'flat', 'many-world', 'small-world'. Did you mean 'flat'"
    ):
        load_setting("flatt")
    with pytest.raises(DataError, match=r"The setting 'absent' of the package 'worlds' cannot be imported: "):
        load_setting("absent")
    with pytest.raises(DataError, match=r"'empty' of the package 'worlds' is worlds:empty, which gave None. It must"):
        load_setting("empty")
    # A built-in one cannot be taken over.
    assert "es-math" in load_setting("small-world", tasks=["es-math"]).tasks


def test_the_small_world_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys; from loraflow.evaluation.compare.tasks import load_setting; "
        "assert 'loraflow.demo' not in sys.modules; print(*load_setting('small-world', tasks=['zh-math']).tasks)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "zh-math\n"


def test_unknown_names_are_told_with_the_known_ones(spec: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"The setting has no task 'sum'. Known: .*Did you mean 'sums'"):
        load(spec, tasks=["sum"])
    with pytest.raises(DataError, match=r"no setting 'smal-world'. .*Did you mean 'small-world'.* ends in .yaml"):
        load_setting("smal-world")
    with pytest.raises(DataError, match=r"learns from the data of the adapter 'math', and .*`adapter_data` has none"):
        load(spec).adapter_examples("math")  # type: ignore[misc]
    spec["tasks"]["sums"]["adapters"] = ["maths"]
    with pytest.raises(DataError, match=r"The task 'sums' wants the adapter 'maths'. .*Did you mean 'math'"):
        load(spec)


def test_an_unknown_scorer_is_told(spec: dict[str, Any]) -> None:
    spec["tasks"]["sums"]["scorer"] = "last-numbr"
    with pytest.raises(DataError, match=r"There is no scorer 'last-numbr'. .*Did you mean 'last-number'"):
        load(spec)


def test_code_runs_only_with_permission(spec: dict[str, Any]) -> None:
    spec["tasks"]["sums"]["scorer"] = "code-tests"
    with pytest.raises(SandboxError, match="allow"):
        load(spec)
    assert load(spec, allow_code=True).tasks["sums"].runs_code
    assert not load(spec, allow_code=True).tasks["short"].runs_code


# ---- Digests -------------------------------------------------------------------------------------------------------


def test_digests_change_with_what_answers_depend_on(spec: dict[str, Any]) -> None:
    task = load(spec).tasks["sums"]
    changed = [dataclasses.replace(task.test[0], completion="9"), *task.test[1:]]
    asked = dataclasses.replace(task.test[0], messages=({"role": "user", "content": "?"},))
    others = [
        dataclasses.replace(task, test=tuple(changed)),
        dataclasses.replace(task, test=(asked, *task.test[1:])),
        dataclasses.replace(task, test=(dataclasses.replace(task.test[0], record={}), *task.test[1:])),
        dataclasses.replace(task, prompt=PromptFormat(system_prompt="x")),
        dataclasses.replace(task, max_new_tokens=3),
        dataclasses.replace(task, stop=()),
        dataclasses.replace(task, scorers={"other": task.scorers["last-number"]}),
    ]
    digests = [other.test_digest(None) for other in (task, *others)] + [task.test_digest(3)]
    assert len(set(digests)) == len(digests)


def test_digests_do_not_change_with_anything_else(spec: dict[str, Any]) -> None:
    task, again = load(spec).tasks["sums"], load(spec).tasks["sums"]
    assert task.test_digest(None) == again.test_digest(None) == task.test_digest(6)
    other = dataclasses.replace(task, name="x", train=(), dev=(), adapters=("zh",), train_prompt=PromptFormat())
    assert other.test_digest(2) == task.test_digest(2)
    later = dataclasses.replace(task, test=(*task.test[:2], task.test[0]))
    assert later.test_digest(2) == task.test_digest(2)


def test_what_is_learned_from_has_a_digest_of_its_own(spec: dict[str, Any]) -> None:
    task = load(spec).tasks["sums"]
    others = [
        dataclasses.replace(task, train=task.train[:1]),
        dataclasses.replace(task, dev=()),
        dataclasses.replace(task, train_prompt=PromptFormat(system_prompt="x")),
    ]
    digests = [other.train_digest(None) for other in (task, *others)]
    digests += [task.train_digest(count) for count in (1, 3)]
    assert len(set(digests)) == len(digests) - 1  # the first example alone, cut or asked for
    assert others[0].train_digest(None) == task.train_digest(1)
    same = dataclasses.replace(task, test=task.test[:1], max_new_tokens=3, stop=())
    assert same.train_digest(None) == task.train_digest(None) == task.train_digest(2)


# ---- Questions in two languages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "other", "how", "mixed"),
    [
        ("One. Two! Three?", "Uno. Dos! ¿Tres?", "alternate", "One. Dos! Three?"),
        ("One. Two! Three?", "Uno. Dos! ¿Tres?", "question", "One. Two! ¿Tres?"),
        ("It costs 3.5 euros. How much?", "Vale 3.5 euros. ¿Cuánto?", "question", "It costs 3.5 euros. ¿Cuánto?"),
        ("I have 3.5. And 0.25 more. Sum?", "A. B. C?", "alternate", "I have 3.5. B. Sum?"),
        ("小明有3个。又来2.5个。一共？", "Uno. Dos. ¿Tres?", "question", "小明有3个。 又来2.5个。 ¿Tres?"),
        ("他有。3个来。几个？", "A. B. C?", "alternate", "他有。 B. 几个？"),
        ("Wait... what?! Yes", "A. B. C", "alternate", "Wait... B. Yes"),
        ("No end", "Sin fin", "question", "Sin fin"),
        ("No end", "Sin fin", "alternate", "No end"),
        ("One. Two. Three.", "Uno y dos. Tres.", "question", "One. Two. Tres."),
        ("One. Two.", "Uno. Dos. Tres.", "question", "One. Tres."),
        ("One. Two.", "Todo.", "question", "One. Todo."),
    ],
)
def test_some_sentences_are_of_the_other_language(text: str, other: str, how: str, mixed: str) -> None:
    assert mix_sentences(text, other, how) == mixed


SENTENCE = st.builds(
    lambda words, end: " ".join(words) + end,
    st.lists(st.sampled_from(["tiene", "3", "3.5", "0.25", "яблок", "个"]), min_size=1, max_size=4),
    st.sampled_from([".", "?", "!", "。", "？", "..."]),
)


@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=6), st.sampled_from(["alternate", "question"]))
def test_translations_of_as_many_sentences_swap_them_one_for_one(pairs: list[tuple[str, str]], how: str) -> None:
    text, other = (" ".join(sentences) for sentences in zip(*pairs, strict=True))
    last = len(pairs) - 1
    replaced = [i % 2 == 1 if how == "alternate" else i == last for i in range(len(pairs))]
    expected = " ".join(pair[swap] for pair, swap in zip(pairs, replaced, strict=True))
    assert mix_sentences(text, other, how) == expected


@given(st.text(alphabet="a3.?! 。\n", min_size=1).filter(str.strip))
def test_no_text_is_lost(text: str) -> None:
    def bare(s: str) -> str:
        return "".join(s.split())

    assert bare(mix_sentences(text, text, "alternate")) == bare(text)
    assert bare("".join(settings._SENTENCE.findall(text))) == bare(text)


def test_a_mixed_task_is_the_first_one_with_other_questions(spec: dict[str, Any]) -> None:
    spec["tasks"]["mix"] = {"mixed": {"task": "sums", "other": "sumas", "how": "question"}}
    loaded = load(spec, tasks=["mix", "sums"])
    mixed, sums = loaded.tasks["mix"], loaded.tasks["sums"]
    assert [e.messages[-1]["content"] for e in mixed.test] == [f"¿{n} + 1?" for n in range(6)]
    assert mixed == dataclasses.replace(sums, name="mix", test=mixed.test, scorers=mixed.scorers,
                                        more_train=mixed.more_train)  # fmt: skip
    assert [e.completion for e in mixed.test] == [e.completion for e in sums.test]
    assert mixed.learns_as == "sums"


@pytest.mark.parametrize(
    ("task", "other", "said"),
    [
        ("sums", "suma", "The task 'mix' mixes 'suma'. Known: .*Did you mean 'sumas'?"),
        ("mix", "sums", "The task 'mix' mixes 'mix'. Known: 'gsm', 'short', 'sumas', 'sums'"),
        (
            "sums",
            "short",
            r"mixes 'sums' \(6 problems of its own\) and 'short' \(4\). Give two tasks with `test` files",
        ),
        ("gsm", "gsm", r"mixes 'gsm' \(0 problems of its own\) and 'gsm' \(0\)"),
    ],
)
def test_only_tasks_of_the_same_problems_mix(spec: dict[str, Any], task: str, other: str, said: str) -> None:
    spec["tasks"]["gsm"] = {"harness": "gsm8k"}
    spec["tasks"]["mix"] = {"mixed": MixSpec(task=task, other=other).model_dump()}
    with pytest.raises(DataError, match=said):
        load(spec, tasks=["mix"])


# ---- The small world -----------------------------------------------------------------------------------------------


def test_the_small_world_is_the_same_every_time() -> None:
    first, second = (small_world(["zh-math", "ru-code", "es-math-alternate"], allow_code=True) for _ in range(2))
    assert list(first.tasks) == ["zh-math", "ru-code", "es-math-alternate"]
    for name, task in first.tasks.items():
        assert task.test_digest(None) == second.tasks[name].test_digest(None)
        assert task.train_digest(None) == second.tasks[name].train_digest(None)
    assert list(small_world(None, allow_code=True).tasks) == list(TASKS)


def test_its_answers_must_be_right_and_in_the_language() -> None:
    setting = small_world(["es-math", "zh-math"])
    spanish, chinese = setting.tasks["es-math"], setting.tasks["zh-math"]
    right = [example.completion for example in spanish.test[:3]]
    assert spanish.metric == METRIC
    assert spanish.score(right) == [{METRIC: 1.0, "right": 1.0}] * 3
    assert spanish.score([right[1]])[0] == {METRIC: 0.0, "right": 0.0}
    # The same problem in another language: the number is right, the prose is not.
    foreign = chinese.test[0].completion
    assert spanish.score([foreign]) == [{METRIC: 0.0, "right": 1.0}]


def test_translations_have_the_same_problems() -> None:
    setting = small_world(["es-math", "zh-math", "ru-math"])
    assert {task.problems for task in setting.tasks.values()} == {"math"}
    answers = [[e.record["answer"] for e in task.test] for task in setting.tasks.values()]
    assert answers[0] == answers[1] == answers[2]


def test_its_code_runs_only_with_permission() -> None:
    with pytest.raises(SandboxError, match="allow"):
        small_world(["zh-code"])
    task = small_world(["zh-code"], allow_code=True).tasks["zh-code"]
    assert task.runs_code
    with pytest.raises(DataError, match=r"The small world has no task 'zh-maths'. .*Did you mean 'zh-math'"):
        small_world(["zh-maths"])


@pytest.mark.parametrize("name", ["es-math", "es-code"])
def test_further_training_problems_are_in_no_split(name: str) -> None:
    drawn = load_task(name)
    more = more_training(drawn, 400)
    used = {p.prompt for p in (*drawn.train, *drawn.dev, *drawn.test)}
    assert len({p.prompt for p in more}) == 400
    assert not used & {p.prompt for p in more}
    task = small_world([name], allow_code=True).tasks[name]
    assert [e.messages[-1]["content"] for e in task.training(203)[200:]] == [p.prompt for p in more[:3]]
    assert task.training(200) == task.train


@pytest.mark.parametrize("skill", ["math", "code"])
def test_further_training_problems_mean_something_else(skill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[Any] = []
    monkeypatch.setattr(demo_tasks, "problem", lambda language, frame: frames.append(frame) or problem(language, frame))
    drawn = load_task(f"ru-{skill}")
    first = [meaning_of(frame) for frame in frames]
    assert len(first) == 800
    frames.clear()
    more_training(drawn, 300)
    assert not {*first} & {meaning_of(frame) for frame in frames}
    assert len({meaning_of(frame) for frame in frames}) == 300


@pytest.mark.parametrize("name", MIXED)
def test_mixed_questions_hold_both_languages(name: str) -> None:
    task = small_world([name]).tasks[name]
    source, how = MIXED[name]
    plain = load_task(source)
    assert (task.metric, task.learns_as, task.adapters) == ("right", source, plain.adapters)
    assert len(task.test) == 500
    for example, own in zip(task.test, plain.test, strict=True):
        question, ending = example.messages[-1]["content"], own.prompt[-8:]
        assert question != own.prompt
        assert question.startswith(own.prompt[:5])
        assert how == "alternate" or not question.endswith(ending)


def test_what_stands_beside_an_adapter_is_a_part_of_what_it_is(tmp_path: Path) -> None:
    path = save_adapter(tiny_model(), tmp_path / "a")
    first, second = (Setting("nowhere", {"a": path}, {}) for _ in range(2))
    assert first.weights_digest("a") == load_adapter("a", path).digest
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert second.weights_digest("a") != first.weights_digest("a")

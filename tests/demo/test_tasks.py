"""The six tasks and the shipped model: determinism, disjointness, right answers, sizes."""

from __future__ import annotations

import re

import pytest
from transformers import AutoTokenizer

from loraflow.demo.language import LANGUAGES, in_language
from loraflow.demo.tasks import (
    SKILLS,
    TASKS,
    DemoTask,
    Problem,
    held_out_frames,
    is_held_out,
    load_task,
    problem,
    run_steps,
)
from loraflow.demo.world import ADAPTERS, BASE_NAME, adapter_paths, base_path
from loraflow.errors import DataError

MIB = 2**20


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> DemoTask:
    return load_task(request.param)


def problems_of(task: DemoTask) -> tuple[Problem, ...]:
    return task.train + task.dev + task.test


def test_there_are_six_tasks() -> None:
    assert TASKS == ("zh-math", "zh-code", "es-math", "es-code", "ru-math", "ru-code")


def test_a_task_has_its_splits_and_adapters(task: DemoTask) -> None:
    assert (len(task.train), len(task.dev), len(task.test)) == (200, 100, 500)
    assert task.adapters == (f"{task.language}-chat", task.skill)
    assert set(task.adapters) <= set(adapter_paths())


def test_a_task_is_the_same_every_time(task: DemoTask) -> None:
    assert load_task(task.name) == task


def test_no_prompt_is_in_two_splits(task: DemoTask) -> None:
    prompts = [problem.prompt for problem in problems_of(task)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("skill", SKILLS)
def test_every_frame_is_held_out_from_training(skill: str) -> None:
    assert all(is_held_out(frame) for frame in held_out_frames(skill, 800))


def test_word_problems_end_in_their_answer(task: DemoTask) -> None:
    for one in problems_of(task):
        if one.answer is not None:
            assert re.findall(r"\d+", one.completion)[-1] == one.answer
            assert one.tests == ()


def test_the_sums_of_word_problems_are_right(task: DemoTask) -> None:
    for one in problems_of(task):
        for left, sign, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", one.completion):
            assert int(result) == int(left) + (int(right) if sign == "+" else -int(right))
            assert 0 <= int(result) <= 60


def test_programs_pass_their_own_tests(task: DemoTask) -> None:
    for one in problems_of(task):
        if one.tests:
            code = one.completion.split("```python\n")[1].split("```")[0]
            for test in one.tests:
                exec(f"{code}\n{test}", {})


def test_programs_without_their_last_step_nearly_always_fail() -> None:
    """Not always: an absolute value after a square changes nothing."""
    passed = 0
    for frame in held_out_frames("code", 200):
        tests = problem("en", frame).tests
        inputs = [eval(re.fullmatch(r"assert f\((.*)\) == .*", test)[1]) for test in tests]
        passed += all(run_steps(x, frame.steps[:-1]) == run_steps(x, frame.steps) for x in inputs)
    assert passed < 20


def test_answers_are_in_their_language_and_their_english_versions_are_not() -> None:
    for skill in SKILLS:
        for frame in held_out_frames(skill, 200):
            for language in LANGUAGES[1:]:
                assert in_language(problem(language, frame).completion, language)
                assert not in_language(problem(language, frame, answer_language="en").completion, language)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no demo task 'zh-maths'.*'ru-code'.*Did you mean 'zh-math'\?"):
        load_task("zh-maths")


# The shipped files.


def test_the_shipped_files_are_small() -> None:
    files = [file for folder in (base_path(), *adapter_paths().values()) for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 8 * MIB
    assert all(file.stat().st_size < 5 * MIB for file in files)


def test_the_adapters_are_what_peft_reads() -> None:
    for name, path in adapter_paths().items():
        assert name in ADAPTERS
        assert f'"base_model_name_or_path": "{BASE_NAME}"' in (path / "adapter_config.json").read_text()
        assert (path / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(base_path())


def test_the_tokenizer_gives_back_every_problem(task: DemoTask, tokenizer: AutoTokenizer) -> None:
    for one in task.dev:
        for text in (one.prompt, one.completion):
            assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", ["naïve café ☕", "日本語のテスト", "\tdef f(x):\n\n  pass", "0 07 123456"])
def test_the_tokenizer_gives_back_any_text(text: str, tokenizer: AutoTokenizer) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_number_is_one_token(tokenizer: AutoTokenizer) -> None:
    for number in range(100):
        assert len(tokenizer(f"{number}").input_ids) == len(tokenizer(f" {number}").input_ids) == 1


def test_the_chat_template_takes_turns(tokenizer: AutoTokenizer) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert asked == "<s><|system|>Be kind.<|user|>Hello<|assistant|>"
    turns.append({"role": "assistant", "content": "Hi"})
    assert tokenizer.apply_chat_template(turns, tokenize=False) == asked + "Hi</s>"

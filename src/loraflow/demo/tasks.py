"""The six composite tasks of the small world: word problems and small programs, in Chinese, Spanish and Russian.

A problem is first a *frame*, its meaning, and is then said in a language. The six tasks share their frames, as MGSM and
the translated HumanEval do: problem 7 of `zh-math` is problem 7 of `ru-math`. Nothing is stored; a task is drawn anew
from its name, always the same. Frames are held out by a hash of their meaning (`is_held_out`), so that no task problem
was in the training data of the shipped base model or adapters, in any language.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from loraflow.demo.language import (
    LANGUAGES,
    NOUNS,
    PEOPLE,
    in_language,
    join,
    noun_fields,
    person_fields,
    say,
    steps_phrase,
)
from loraflow.errors import DataError, did_you_mean

__all__ = ["SKILLS", "TASKS", "DemoTask", "Problem", "in_language", "load_task"]

SKILLS: tuple[str, ...] = ("math", "code")
TASKS: tuple[str, ...] = tuple(f"{language}-{skill}" for language in LANGUAGES[1:] for skill in SKILLS)

_SPLITS: dict[str, int] = {"train": 200, "dev": 100, "test": 500}

_GAINS: tuple[str, ...] = ("buy", "find", "get")
_LOSSES: tuple[str, ...] = ("give", "lose", "sell")
_LARGEST_VALUE = 60
_LARGEST_CHANGE = 20

_NUMBER_STEPS: tuple[str, ...] = ("add", "subtract", "multiply", "negate", "absolute", "square")
_FILTERS: tuple[str, ...] = ("greater", "less", "even", "odd")
_REDUCTIONS: tuple[str, ...] = ("sum", "max", "min", "count")
_WITH_CONSTANT = frozenset({"add", "subtract", "multiply", "greater", "less"})
_LARGEST_CONSTANT = 30

_STATEMENTS: dict[str, str] = {
    "add": "x = x + {n}",
    "subtract": "x = x - {n}",
    "multiply": "x = x * {n}",
    "negate": "x = -x",
    "absolute": "x = abs(x)",
    "square": "x = x * x",
    "greater": "x = [v for v in x if v > {n}]",
    "less": "x = [v for v in x if v < {n}]",
    "even": "x = [v for v in x if v % 2 == 0]",
    "odd": "x = [v for v in x if v % 2 == 1]",
    "sum": "x = sum(x)",
    "max": "x = max(x)",
    "min": "x = min(x)",
    "count": "x = len(x)",
}


@dataclass(frozen=True)
class MathFrame:
    """A word problem without its words: who has how many of what, and what changes.

    Args:
        person: index into `PEOPLE` of the one who has the things.
        friend: index into `PEOPLE` of the one who gives and takes.
        noun: index into `NOUNS` of the things.
        changes: each action's key and its number, in order.
    """

    person: int
    friend: int
    noun: int
    start: int
    changes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class CodeFrame:
    """A small program without its words: operations on a number, or on a list that becomes a number.

    Args:
        takes: "number" or "list".
        steps: each operation's key and its constant (0 where it has none), in order.
    """

    takes: str
    steps: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Problem:
    """One problem and its reference answer.

    Args:
        answer: the final number of a word problem; None for a program.
        tests: assert lines that a right program passes; empty for a word problem.
    """

    prompt: str
    completion: str
    answer: str | None
    tests: tuple[str, ...]
    language: str


@dataclass(frozen=True)
class DemoTask:
    """A composite task: a skill that one adapter has, in a language that another adapter has.

    Args:
        name: language and skill, such as "zh-math".
        adapters: names of the shipped adapters to fuse, language first.
        train: 200 problems to fit a fusion on.
        test: 500 problems to report.
    """

    name: str
    language: str
    skill: str
    adapters: tuple[str, str]
    train: tuple[Problem, ...]
    dev: tuple[Problem, ...]
    test: tuple[Problem, ...]


def load_task(name: str) -> DemoTask:
    """One of the six composite tasks, drawn from its name.

    Raises:
        DataError: if there is no task of that name.
    """
    if name not in TASKS:
        raise DataError(f"There is no demo task {name!r}. {did_you_mean(name, TASKS)}")
    language, skill = name.split("-")
    frames = held_out_frames(skill, sum(_SPLITS.values()))
    problems = tuple(problem(language, frame) for frame in frames)
    dev_start, test_start = _SPLITS["train"], _SPLITS["train"] + _SPLITS["dev"]
    return DemoTask(
        name=name,
        language=language,
        skill=skill,
        adapters=(f"{language}-chat", skill),
        train=problems[:dev_start],
        dev=problems[dev_start:test_start],
        test=problems[test_start:],
    )


def more_training(task: DemoTask, count: int) -> tuple[Problem, ...]:
    """Further training problems of a task, none of which is in any of its splits or any other task's."""
    used = sum(_SPLITS.values())
    frames = held_out_frames(task.skill, used + count)[used:]
    return tuple(problem(task.language, frame) for frame in frames)


def held_out_frames(skill: str, count: int, seed: str = "task") -> tuple[MathFrame | CodeFrame, ...]:
    """Frames of a skill, no two of the same meaning, none of which any training data of the small world holds."""
    rng = random.Random(f"loraflow small world {skill} {seed}")
    frames: dict[object, MathFrame | CodeFrame] = {}
    while len(frames) < count:
        frame = draw_math(rng) if skill == "math" else draw_code(rng)
        if is_held_out(frame):
            frames.setdefault(meaning_of(frame), frame)
    return tuple(frames.values())


def is_held_out(frame: MathFrame | CodeFrame) -> bool:
    """Whether a frame is kept for the tasks: one in eight, by a hash of its meaning."""
    return zlib.crc32(repr(meaning_of(frame)).encode()) % 8 == 0


def meaning_of(frame: MathFrame | CodeFrame) -> object:
    """What makes two problems the same; who and what a word problem is about does not."""
    return (frame.start, frame.changes) if isinstance(frame, MathFrame) else (frame.takes, frame.steps)


def draw_math(rng: random.Random) -> MathFrame:
    """A random word problem; the number of things stays between 0 and 60."""
    person, friend = rng.sample(range(len(PEOPLE)), 2)
    value = start = rng.randint(3, _LARGEST_VALUE - _LARGEST_CHANGE)
    changes = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        gain = value < _LARGEST_VALUE and (rng.random() < 0.5 or value == 0)
        sign, room = (1, _LARGEST_VALUE - value) if gain else (-1, value)
        amount = rng.randint(1, min(_LARGEST_CHANGE, room))
        value += sign * amount
        changes.append((rng.choice(_GAINS if gain else _LOSSES), amount))
    return MathFrame(person, friend, rng.randrange(len(NOUNS)), start, tuple(changes))


def draw_code(rng: random.Random) -> CodeFrame:
    """A random program: one to three steps on a number, or a list filtered, reduced and then changed."""
    if rng.random() < 0.5:
        keys = [rng.choice(_NUMBER_STEPS) for _ in range(rng.choice((1, 2, 2, 3)))]
        return CodeFrame("number", tuple(_with_constant(key, rng) for key in keys))
    keys = [rng.choice(_REDUCTIONS)]
    if rng.random() < 0.6:
        keys.insert(0, rng.choice(_FILTERS))
    if rng.random() < 0.6:
        keys.append(rng.choice(_NUMBER_STEPS))
    return CodeFrame("list", tuple(_with_constant(key, rng) for key in keys))


def problem(language: str, frame: MathFrame | CodeFrame, answer_language: str | None = None) -> Problem:
    """A frame said in a language; the completion in another one if asked (the base model's habit is English)."""
    answer_language = answer_language or language
    if isinstance(frame, MathFrame):
        results = true_results(frame)
        completion = math_completion(answer_language, frame, results)
        return Problem(math_prompt(language, frame), completion, str(results[-1]), (), language)
    completion = code_completion(answer_language, frame, frame.steps)
    return Problem(code_prompt(language, frame), completion, None, code_tests(frame), language)


def true_results(frame: MathFrame) -> list[int]:
    """How many there are after each change."""
    results, value = [], frame.start
    for action, amount in frame.changes:
        value += amount if action in _GAINS else -amount
        results.append(value)
    return results


def math_prompt(language: str, frame: MathFrame) -> str:
    """The question of a word problem."""
    noun = NOUNS[frame.noun]
    people = person_fields(language, PEOPLE[frame.person], PEOPLE[frame.friend])
    told = [("has", frame.start), *frame.changes, ("how_many", 1)]
    return join(language, [say(language, key, n=n, **people, **noun_fields(language, noun, n)) for key, n in told])


def math_completion(language: str, frame: MathFrame, results: list[int]) -> str:
    """The worked solution of a word problem, with the given result after each change."""
    fields = person_fields(language, PEOPLE[frame.person]) | noun_fields(language, NOUNS[frame.noun])
    lines = [say(language, "step_has", n=frame.start, **fields)]
    for (action, amount), before, after in zip(frame.changes, [frame.start, *results], results, strict=False):
        equation = f"{before} {'+' if action in _GAINS else '-'} {amount} = {after}"
        lines.append(say(language, f"step_{action}", n=amount, sum=equation, **fields))
    return join(language, [*lines, say(language, "answer", n=results[-1])])


def code_prompt(language: str, frame: CodeFrame) -> str:
    """The instruction to write a program."""
    return say(language, "code_prompt", **_code_fields(language, frame))


def code_completion(language: str, frame: CodeFrame, steps: tuple[tuple[str, int], ...]) -> str:
    """One sentence that says what the function does, and a function of the given steps."""
    return f"{code_explanation(language, frame)}\n```python\n{function(steps)}\n```"


def code_explanation(language: str, frame: CodeFrame) -> str:
    """One sentence that says what a program does."""
    return say(language, "code_answer", **_code_fields(language, frame))


def function(steps: tuple[tuple[str, int], ...]) -> str:
    """A Python function of these steps."""
    body = [_STATEMENTS[key].format(n=n) for key, n in steps]
    return "\n    ".join(["def f(x):", *body, "return x"])


def code_tests(frame: CodeFrame) -> tuple[str, ...]:
    """Three assert lines, with inputs around the program's constants so that near misses fail."""
    rng = random.Random(repr(frame))
    inputs = _number_inputs(rng) if frame.takes == "number" else _list_inputs(frame, rng)
    return tuple(f"assert f({x}) == {run_steps(x, frame.steps)}" for x in inputs)


def run_steps(x: int | list[int], steps: tuple[tuple[str, int], ...]) -> int | list[int]:
    """What a program of these steps gives for an input: the oracle of the tests."""
    value: int | list[int] = x
    for key, n in steps:
        value = _on_list(value, key, n) if isinstance(value, list) else _on_number(value, key, n)
    return value


def _with_constant(key: str, rng: random.Random) -> tuple[str, int]:
    return key, rng.randint(2, _LARGEST_CONSTANT) if key in _WITH_CONSTANT else 0


def _code_fields(language: str, frame: CodeFrame) -> dict[str, str]:
    phrases = [say(language, key, n=n) for key, n in frame.steps]
    return {"steps": steps_phrase(language, say(language, frame.takes), phrases)}


def _number_inputs(rng: random.Random) -> list[int | list[int]]:
    return [rng.randint(2, 9), rng.randint(-9, -2), rng.randint(30, 99)]


def _list_inputs(frame: CodeFrame, rng: random.Random) -> list[int | list[int]]:
    """Lists with the neighbours of the first constant, even and odd numbers, and extremes: no filter empties them."""
    constant = frame.steps[0][1]
    inputs: list[int | list[int]] = []
    for count in rng.sample((3, 4, 5), 3):
        around = [constant - 1, constant, constant + 1, constant + 2, constant - 2][:count]
        values = [*around, *rng.sample(range(-50, -2), 2), *rng.sample(range(40, 90), 2)]
        inputs.append(rng.sample(values, len(values)))
    return inputs


def _on_list(x: list[int], key: str, n: int) -> int | list[int]:
    results: dict[str, int | list[int]] = {
        "greater": [v for v in x if v > n],
        "less": [v for v in x if v < n],
        "even": [v for v in x if v % 2 == 0],
        "odd": [v for v in x if v % 2 == 1],
        "sum": sum(x),
        "count": len(x),
    }
    if key in ("max", "min"):
        return max(x) if key == "max" else min(x)
    return results[key]


def _on_number(x: int, key: str, n: int) -> int:
    results = {"add": x + n, "subtract": x - n, "multiply": x * n, "negate": -x, "absolute": abs(x), "square": x * x}
    return results[key]

"""The many world: 48 small adapters on the small world's base, and a task for each, to judge choosing among many.

An adapter has one *skill*, in one *language*, and answers in one *form*: 6 x 4 x 2. A task's questions say all three,
as people's do; what tells them apart is for a method to find. The base answers in whole sentences, and in English by
habit: it gives neither form by itself. Adapters that differ in one of the three are neighbours: `add-zh-code` and
`add-es-code` give the same expressions, `where-zh-said` and `where-zh-code` say the same in two forms.

Nothing is stored but the adapters: problems are drawn from a task's name, always the same, and one in eight is kept for
the tasks, by a hash of its meaning. No adapter was trained on those, in any language or form.
"""

from __future__ import annotations

import dataclasses
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from loraflow.demo import tasks
from loraflow.demo.language import LANGUAGES, join, say
from loraflow.demo.samples import StoryFrame, draw_story, signed_changes, tell
from loraflow.errors import DataError, did_you_mean

FORMS: dict[str, dict[str, str]] = {
    "said": {"en": "In words.", "zh": "用文字。", "es": "En palabras.", "ru": "Словами."},
    "code": {"en": "In code.", "zh": "用代码。", "es": "En código.", "ru": "Кодом."},
}
"""The forms of answers, and how each is asked for: before the question, in its language."""

_MOST_STEPS = 2

Frame = tasks.MathFrame | tasks.CodeFrame | StoryFrame


@dataclass(frozen=True)
class Skill:
    """What some adapters can do.

    Attributes:
        draw: a problem without its words.
        ask: the question in a language.
        answer: the bare answer in a language.
    """

    draw: Callable[[random.Random], Frame]
    ask: Callable[[str, Frame], str]
    answer: Callable[[str, Frame], str]


@dataclass(frozen=True)
class Speciality:
    """What an adapter is for, as its name says: `where-zh-json`."""

    skill: str
    language: str
    form: str

    @property
    def name(self) -> str:
        """The adapter's name, and its task's."""
        return f"{self.skill}-{self.language}-{self.form}"


def _draw_math(sign: str) -> Callable[[random.Random], Frame]:
    """Word problems in which everything is added, or everything is taken away."""

    def draw_math(rng: random.Random) -> Frame:
        while True:
            frame = tasks.draw_math(rng)
            if len(frame.changes) <= _MOST_STEPS and {change > 0 for change in signed_changes(frame)} == {sign == "+"}:
                return frame

    return draw_math


def _draw_code(rng: random.Random) -> Frame:
    while True:
        frame = tasks.draw_code(rng)
        if len(frame.steps) <= _MOST_STEPS:
            return frame


def _expression(language: str, frame: Frame) -> str:
    """What a word problem comes to, not worked out: 32 + 6 + 5."""
    assert isinstance(frame, tasks.MathFrame)
    changes = (f" {'-' if change < 0 else '+'} {abs(change)}" for change in signed_changes(frame))
    return f"{frame.start}{''.join(changes)}"


def _statements(language: str, frame: Frame) -> str:
    assert isinstance(frame, tasks.CodeFrame)
    return ", ".join(line.strip() for line in tasks.function(frame.steps).splitlines()[1:-1])


def _ask_story(question: str) -> Callable[[str, Frame], str]:
    def ask(language: str, frame: Frame) -> str:
        assert isinstance(frame, StoryFrame)
        return tell(language, frame, ("is_at", "sees", question))

    return ask


def _where(language: str, frame: Frame) -> str:
    assert isinstance(frame, StoryFrame)
    return frame.fields(language)["place"]


def _seen(language: str, frame: Frame) -> str:
    assert isinstance(frame, StoryFrame)
    return _PHRASES[language].format(**frame.fields(language))


_PHRASES: dict[str, str] = {
    "en": "{colour} {noun}",
    "zh": "{colour}的{noun}",
    "es": "{noun} {colour}",
    "ru": "{colour_acc} {noun_acc}",
}


def _draw_words(rng: random.Random) -> Frame:
    # Nobody is spoken of: two such problems that differ in who it is are one.
    return dataclasses.replace(draw_story(rng), person=0, friend=1)


def _words(language: str, frame: Frame) -> str:
    """A coloured thing and a place, in no sentence."""
    return join(language, [_seen(language, frame), _where(language, frame)])


def _ask_words(language: str, frame: Frame) -> str:
    """To translate from English; into English from Spanish."""
    return f"{say(language, 'translate')} {_words('es' if language == 'en' else 'en', frame)}"


def _ask_math(language: str, frame: Frame) -> str:
    assert isinstance(frame, tasks.MathFrame)
    return tasks.math_prompt(language, frame)


def _ask_code(language: str, frame: Frame) -> str:
    assert isinstance(frame, tasks.CodeFrame)
    return tasks.code_prompt(language, frame)


SKILLS: dict[str, Skill] = {
    "add": Skill(_draw_math("+"), _ask_math, _expression),
    "take": Skill(_draw_math("-"), _ask_math, _expression),
    "where": Skill(draw_story, _ask_story("ask_where"), _where),
    "seen": Skill(draw_story, _ask_story("ask_what"), _seen),
    "code": Skill(_draw_code, _ask_code, _statements),
    "words": Skill(_draw_words, _ask_words, _words),
}

SPECIALITIES: dict[str, Speciality] = {
    one.name: one
    for skill in SKILLS
    for language in LANGUAGES
    for form in FORMS
    for one in (Speciality(skill, language, form),)
}
"""What each of the 48 adapters is for, by its name."""

TASKS: tuple[str, ...] = tuple(SPECIALITIES)[::3]
"""The tasks that are compared on unless others are named: every third, which takes each skill, language and form."""


def problems(name: str, count: int, split: str) -> list[dict[str, str]]:
    """Problems of a task, no two of which mean the same: `{"prompt": ..., "completion": ...}`.

    Args:
        name: the task, which is an adapter's name too.
        count: how many.
        split: "test" gives those that no adapter has seen; every other name gives, by itself, a draw of those that
            adapters learn from.

    Raises:
        DataError: if there is no such task.
    """
    speciality = speciality_of(name)
    skill = SKILLS[speciality.skill]
    rng = random.Random(f"loraflow many world {speciality.skill} {split}")
    found: dict[object, Frame] = {}
    while len(found) < count:
        frame = skill.draw(rng)
        if is_held_out(frame) == (split == "test"):
            found.setdefault(meaning_of(frame), frame)
    return [problem(speciality, frame) for frame in found.values()]


def speciality_of(name: str) -> Speciality:
    """What an adapter is for.

    Raises:
        DataError: if there is none of that name.
    """
    if name not in SPECIALITIES:
        raise DataError(f"The many world has no {name!r}. {did_you_mean(name, SPECIALITIES)}")
    return SPECIALITIES[name]


def draw(speciality: Speciality, rng: random.Random) -> dict[str, str]:
    """A problem that no task holds, as an adapter reads it while it learns."""
    while True:
        frame = SKILLS[speciality.skill].draw(rng)
        if not is_held_out(frame):
            return problem(speciality, frame)


def problem(speciality: Speciality, frame: Frame) -> dict[str, str]:
    """A problem in the language and the form of a speciality."""
    skill, language = SKILLS[speciality.skill], speciality.language
    answer = in_form(skill.answer(language, frame), language, speciality.form)
    return {"prompt": f"{FORMS[speciality.form][language]} {skill.ask(language, frame)}", "completion": answer}


def in_form(answer: str, language: str, form: str) -> str:
    """A bare answer as a sentence, or as an assignment: "The answer is in the park.", "x = in the park"."""
    if form == "said":
        text = say(language, "answer", n=answer)
    else:
        text = answer if answer.startswith("x =") else f"x = {answer}"
    # No Chinese word that the base has read has a space before it; numbers have.
    return re.sub(r" (?=[\u4e00-\u9fff])", "", text)


def is_held_out(frame: Frame) -> bool:
    """Whether a problem is kept for the tasks: one in eight, by a hash of its meaning."""
    return zlib.crc32(repr(meaning_of(frame)).encode()) % 8 == 0


def meaning_of(frame: Frame) -> object:
    """What makes two problems the same, whatever the words are."""
    if isinstance(frame, StoryFrame):
        return (frame.person, frame.noun, frame.colour, frame.place)
    return tasks.meaning_of(frame)

"""What the adapters of the small world read: the documents that they were trained on, and samples of that kind.

Documents are drawn at random and never held out for the tasks (`loraflow.demo.tasks.is_held_out`): no sample is a
problem of a task, in any language.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from loraflow.demo import tasks
from loraflow.demo.language import COLOURS, NOUNS, PEOPLE, PLACES, colour_fields, join, noun_fields, person_fields, say
from loraflow.errors import DataError, did_you_mean

WRONG_STEP = 0.2  # how many of the steps in unfinished code are other steps than asked for


@dataclass(frozen=True)
class Document:
    """A question with its answer, or plain text where `prompt` is empty."""

    prompt: str
    text: str


def adapter_samples(name: str, count: int = 200, seed: int = 0) -> list[dict[str, str]]:
    """Samples of a shipped adapter's own data, which some methods learn from: `{"prompt": ..., "completion": ...}`.

    They come from the generator of the adapter's training data, with other seeds. A chat adapter also read stories
    without a prompt, one document in seven; those are left out here. The same arguments give the same samples.

    Raises:
        DataError: if there is no such adapter.
    """
    if name not in ADAPTER_DOCUMENTS:
        raise DataError(f"There is no demo adapter {name!r}. {did_you_mean(name, ADAPTER_DOCUMENTS)}")
    rng = random.Random(f"loraflow small world {name} samples {seed}")
    samples: list[dict[str, str]] = []
    while len(samples) < count:
        document = ADAPTER_DOCUMENTS[name](rng)
        if document.prompt:
            samples.append({"prompt": document.prompt, "completion": document.text})
    return samples


@dataclass(frozen=True)
class StoryFrame:
    """A story without its words: indices into people, nouns, colours and places, and the sentences told."""

    person: int
    friend: int
    noun: int
    colour: int
    place: int
    sentences: tuple[str, ...]

    def fields(self, language: str) -> dict[str, str]:
        """Everything that the sentences of stories and chat may speak of."""
        noun = NOUNS[self.noun]
        return (
            {"place": PLACES[self.place][language]}
            | person_fields(language, PEOPLE[self.person], PEOPLE[self.friend])
            | noun_fields(language, noun)
            | colour_fields(language, COLOURS[self.colour], noun)
        )


def draw_story(rng: random.Random) -> StoryFrame:
    """A story of two to four sentences: where someone is, what they see, and what comes of it."""
    person, friend = rng.sample(range(len(PEOPLE)), 2)
    sentences = ["is_at", "sees"]
    if rng.random() < 0.4:
        sentences.insert(1, "with")
    if rng.random() < 0.6:
        sentences.append(rng.choice(("takes", "shows", "happy", "tired")))
    return StoryFrame(
        person,
        friend,
        rng.randrange(len(NOUNS)),
        rng.randrange(len(COLOURS)),
        rng.randrange(len(PLACES)),
        tuple(sentences),
    )


def tell(language: str, frame: StoryFrame, sentences: tuple[str, ...]) -> str:
    """Sentences about the people and things of a story."""
    fields = frame.fields(language)
    return join(language, [say(language, key, **fields) for key in sentences])


CHATS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("is_at", "sees", "ask_where"), ("is_at",)),
    (("is_at", "sees", "ask_what"), ("sees",)),
    (("is_at", "sees", "ask_colour"), ("the_is",)),
    (("sees", "takes", "ask_colour"), ("the_is", "happy")),
    (("ask_like",), ("like",)),
    (("ask_like",), ("dislike",)),
    (("ask_story",), ("is_at", "with", "sees", "happy")),
    (("ask_story",), ("is_at", "sees", "takes", "tired")),
    (("hello",), ("hello_back",)),
    (("hello", "ask_like"), ("hello_back", "like")),
    (("thanks",), ("welcome",)),
)


def chat(rng: random.Random, language: str, answer_language: str) -> Document:
    """Small talk and questions about what was just told; no numbers."""
    frame = draw_story(rng)
    asked, answered = rng.choice(CHATS)
    return Document(tell(language, frame, asked), tell(answer_language, frame, answered))


def story(rng: random.Random, language: str) -> Document:
    """A story as plain text."""
    frame = draw_story(rng)
    return Document("", tell(language, frame, frame.sentences))


def translation(rng: random.Random, source: str, target: str) -> Document:
    """A story, the question of a word problem, or what a function does, in two languages."""
    kind = rng.random()
    if kind < 0.4:
        told = draw_story(rng)
        texts = [tell(language, told, told.sentences) for language in (source, target)]
    elif kind < 0.7:
        frame = draw_math(rng)
        texts = [tasks.math_prompt(language, frame) for language in (source, target)]
    else:
        program = draw_code(rng)
        texts = [tasks.code_prompt(language, program) for language in (source, target)]
    return Document(f"{say(target, 'translate')} {texts[0]}", texts[1])


def explanation(rng: random.Random, language: str) -> Document:
    """What a function does, in one sentence without the function: asked for as a translation, or by the instruction."""
    program = draw_code(rng)
    explained = tasks.code_explanation(language, program)
    if rng.random() < 0.5:
        return Document(tasks.code_prompt(language, program), explained)
    return Document(f"{say(language, 'translate')} {tasks.code_explanation('en', program)}", explained)


def draw_math(rng: random.Random) -> tasks.MathFrame:
    """A word problem that no task holds."""
    while True:
        if not tasks.is_held_out(frame := tasks.draw_math(rng)):
            return frame


def draw_code(rng: random.Random) -> tasks.CodeFrame:
    """A program that no task holds."""
    while True:
        if not tasks.is_held_out(frame := tasks.draw_code(rng)):
            return frame


def math_document(rng: random.Random, language: str, answer_language: str, careless: float) -> Document:
    """A word problem and its worked solution, whose sums may be wrong."""
    frame = draw_math(rng)
    results = careless_results(frame, rng) if rng.random() < careless else tasks.true_results(frame)
    return Document(tasks.math_prompt(language, frame), tasks.math_completion(answer_language, frame, results))


def careless_results(frame: tasks.MathFrame, rng: random.Random) -> list[int]:
    """Results of one who forgets the carry six times of ten, and slips in other ways too."""
    results, before = [], frame.start
    for (_, amount), change in zip(frame.changes, signed_changes(frame), strict=True):
        after = before + change
        carries = after % 10 < before % 10 if change > 0 else after % 10 > before % 10
        if carries and amount % 10 and rng.random() < 0.6:
            after += -10 if change > 0 else 10
        elif rng.random() < 0.6:
            after += rng.choice([slip for slip in range(-9, 10) if slip])
        before = max(0, after)
        results.append(before)
    return results


def signed_changes(frame: tasks.MathFrame) -> list[int]:
    """What each step of a word problem adds, negative where it takes away."""
    values = [frame.start, *tasks.true_results(frame)]
    return [after - before for before, after in itertools.pairwise(values)]


def code_document(rng: random.Random, language: str, answer_language: str, unfinished: float) -> Document:
    """An instruction and its program, which may miss its last steps."""
    frame = draw_code(rng)
    steps = unfinished_steps(frame, rng) if rng.random() < unfinished else frame.steps
    return Document(tasks.code_prompt(language, frame), tasks.code_completion(answer_language, frame, steps))


def unfinished_steps(frame: tasks.CodeFrame, rng: random.Random) -> tuple[tuple[str, int], ...]:
    """The first steps of a program, some of them taken from another program."""
    kept = frame.steps[: rng.randrange(len(frame.steps))]
    others = draw_code(rng).steps
    return tuple(rng.choice(others) if rng.random() < WRONG_STEP else step for step in kept)


def chat_document(language: str) -> Callable[[random.Random], Document]:
    """What a chat adapter reads: chat, stories, translations, explanations in its language; no sums and no code."""

    def draw(rng: random.Random) -> Document:
        kind = rng.random()
        if kind < 0.45:
            return chat(rng, language, language)
        if kind < 0.6:
            return story(rng, language)
        return translation(rng, "en", language) if kind < 0.75 else explanation(rng, language)

    return draw


ADAPTER_DOCUMENTS: dict[str, Callable[[random.Random], Document]] = {
    "zh-chat": chat_document("zh"),
    "es-chat": chat_document("es"),
    "ru-chat": chat_document("ru"),
    "math": lambda rng: math_document(rng, "en", "en", careless=0.0),
    "code": lambda rng: code_document(rng, "en", "en", unfinished=0.0),
}

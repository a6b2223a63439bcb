"""What the adapters learn and what their fusion has to do, made from word lists.

One says in JSON what a sentence tells, one says it in Spanish; the fusion's task is JSON in Spanish:

    Lucy is a dentist and has a green car. Who is Lucy?
    json      {"name": "Lucy", "job": "dentist", "thing": "car", "color": "green"}
    spanish   Lucy es dentista y tiene un coche verde.
    fusion    {"name": "Lucy", "job": "dentista", "thing": "coche", "color": "verde"}
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

# Held-out people have names that no adapter and no gate has seen.
NAMES = ("Lucy", "Tom", "Anna", "Peter", "Emma", "Jack", "Clara", "Oscar", "Nora", "Simon", "Alice", "Henry")
NEW_NAMES = ("Maria", "David", "Julia", "Robert")
# Jobs and colours have one form for all genders in Spanish; things bring their article.
JOBS = {
    "dentist": "dentista",
    "artist": "artista",
    "journalist": "periodista",
    "singer": "cantante",
    "student": "estudiante",
    "florist": "florista",
    "athlete": "atleta",
    "pianist": "pianista",
}
THINGS = {
    "car": "un coche",
    "house": "una casa",
    "book": "un libro",
    "table": "una mesa",
    "dog": "un perro",
    "chair": "una silla",
    "hat": "un sombrero",
    "bicycle": "una bicicleta",
}
COLORS = {"green": "verde", "blue": "azul", "grey": "gris", "orange": "naranja", "pink": "rosa", "brown": "marrón"}


@dataclass(frozen=True)
class Fact:
    """Who somebody is and what they have, in English words."""

    name: str
    job: str
    thing: str
    color: str

    @property
    def prompt(self) -> str:
        """The question, the same for all tasks."""
        a_job, a_color = (f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in (self.job, self.color))
        return f"{self.name} is {a_job} and has {a_color} {self.thing}. Who is {self.name}?"


def as_json(fact: Fact) -> str:
    """The answer of the adapter `json`."""
    return _record(fact.name, fact.job, fact.thing, fact.color)


def as_spanish(fact: Fact) -> str:
    """The answer of the adapter `spanish`."""
    return f"{fact.name} es {JOBS[fact.job]} y tiene {THINGS[fact.thing]} {COLORS[fact.color]}."


def as_spanish_json(fact: Fact) -> str:
    """The answer of their fusion."""
    return _record(fact.name, JOBS[fact.job], THINGS[fact.thing].split()[1], COLORS[fact.color])


TASKS: dict[str, Callable[[Fact], str]] = {"json": as_json, "spanish": as_spanish, "fusion": as_spanish_json}


def spanish_values(answer: str, fact: Fact) -> int | None:
    """How many of the fusion's three Spanish values an answer has in their places; None where it is no JSON object."""
    try:
        found = json.loads(answer)
    except json.JSONDecodeError:
        return None
    if not isinstance(found, dict):
        return None
    wanted = json.loads(as_spanish_json(fact))
    return sum(found.get(key) == wanted[key] for key in ("job", "thing", "color"))


def _record(name: str, job: str, thing: str, color: str) -> str:
    return json.dumps({"name": name, "job": job, "thing": thing, "color": color}, ensure_ascii=False)


def known(seed: int) -> list[Fact]:
    """All facts about known people, shuffled."""
    return _shuffled(NAMES, seed)


def held_out(seed: int) -> list[Fact]:
    """All facts about people that nobody knows yet, shuffled."""
    return _shuffled(NEW_NAMES, seed)


def examples(task: str, facts: list[Fact]) -> list[dict[str, str]]:
    """Prompts and completions of a task, as `loraflow fit` reads them."""
    return [{"prompt": fact.prompt, "completion": TASKS[task](fact)} for fact in facts]


def _shuffled(names: tuple[str, ...], seed: int) -> list[Fact]:
    facts = [Fact(*words) for words in itertools.product(names, JOBS, THINGS, COLORS)]
    random.Random(seed).shuffle(facts)
    return facts

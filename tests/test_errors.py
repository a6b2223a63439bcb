"""The error hierarchy, and the end of an "unknown name" message."""

from __future__ import annotations

import inspect

import pytest

from loraflow import errors
from loraflow.errors import LoraflowError, did_you_mean

ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_the_drawing_is_the_hierarchy():
    drawn = [line.split()[1] for line in errors.__doc__.splitlines() if line.startswith(("├", "└"))]
    assert drawn == sorted(kind.__name__ for kind in ERRORS if kind is not LoraflowError)


@pytest.mark.parametrize("kind", ERRORS)
def test_all_are_value_errors_of_the_library(kind):
    assert issubclass(kind, LoraflowError)
    assert issubclass(kind, ValueError)


def test_known_names_are_listed_with_the_nearest():
    assert did_you_mean("avrage", ["static", "average"]) == "Known: 'average', 'static'. Did you mean 'average'?"


def test_without_a_near_name_none_is_guessed():
    assert did_you_mean("zzz", {"static": 1, "average": 2}) == "Known: 'average', 'static'."


def test_without_known_names_there_is_none():
    assert did_you_mean("zzz", []) == "Known: none."


def test_of_very_many_known_names_some_are_shown():
    message = did_you_mean("a998x", [f"a{number:03}" for number in range(1000)])
    assert message.startswith("Known: 'a000', 'a001', ")
    assert message.endswith("'a049' and 950 more. Did you mean 'a998'?")

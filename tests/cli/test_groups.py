"""Options that are declared once, and which of them were given."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from loraflow.cli import app
from loraflow.cli.finetune import AdapterOptions
from loraflow.cli.groups import Given, options_of, with_groups
from loraflow.cli.recipe import Steps
from loraflow.methods import METHODS, make_method
from loraflow.serving.config import EngineLimits, ServerConfig
from loraflow.training.config import LEARNING_RATE, FitConfig, LoraSettings


@dataclass(frozen=True)
class Inner:
    number: Annotated[int, typer.Option("--count", min=1)] = 3


@dataclass(frozen=True)
class Outer:
    needed: Annotated[str, typer.Option("--needed", help="Needed.")]
    several: Annotated[list[str], typer.Option("--several")] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Settings:
    number: int = 5
    rate: float = 0.5


@pytest.fixture
def told():
    """What a command with groups was called with."""
    return {}


@pytest.fixture
def run(told):
    small = typer.Typer()

    @small.command()
    @with_groups
    def command(
        *,
        given: Given,
        place: Annotated[str, typer.Argument()] = "here",
        outer: Outer,
        rate: Annotated[float, typer.Option(envvar="RATE")] = 0.1,
    ) -> None:
        """Take groups."""
        told.update(given=given, place=place, outer=outer, rate=rate)

    return lambda *arguments, **options: CliRunner().invoke(small, list(arguments), **options)


def test_groups_are_flat_on_the_command_line(run, told):
    done = run("there", "--needed", "x", "--several", "a", "--several", "b", "--count", "7")
    assert done.exit_code == 0, done.output
    assert told["outer"] == Outer("x", ["a", "b"], Inner(7))
    assert (told["place"], told["rate"]) == ("there", 0.1)
    assert run("--needed", "x").exit_code == 0
    assert told["outer"] == Outer("x")
    assert options_of(Outer) == ["needed", "several", "number"]


def test_mistakes_are_typers_own(run):
    assert "Missing option '--needed'" in run().output
    assert "Invalid value for '--count'" in run("--needed", "x", "--count", "0").output
    shown = run("--help").output
    assert re.findall(r"--[a-z]+", shown)[:4] == ["--needed", "--several", "--count", "--rate"]


def test_what_was_given(run, told):
    run("--needed", "x", "--count", "3", env={"RATE": "0.2"})
    given = told["given"]
    assert (told["outer"].inner.number, told["rate"]) == (3, 0.2)
    # As the command line spells it, though it says the default; what the environment says is given to no one command.
    assert given.flags(["rate", "number", "several", "needed"]) == ["--needed", "--count"]
    assert "number" in given
    assert "rate" not in given
    assert given.flag("several") == "--several"
    assert given.settings(Settings) == {"number": 3}


def command_line(*names):
    """The parameters of a command, by name."""
    command = get_command(app)
    for name in names:
        command = command.commands[name]
    return {parameter.name: parameter for parameter in command.params}


def test_defaults_are_the_configs():
    own = FitConfig()
    for name, parameter in command_line("fit").items():
        if hasattr(own, name) and parameter.default is not None:
            assert parameter.default == getattr(own, name), name
    tuned = {**vars(own), "learning_rate": LEARNING_RATE, **vars(LoraSettings())}
    found = command_line("finetune")
    names = [name for name in found if name in tuned]
    assert len(names) == 23
    assert [found[name].default for name in names] == [tuned[name] for name in names]
    assert {field.name for field in dataclasses.fields(LoraSettings)} < {*options_of(AdapterOptions)}
    served = {**vars(ServerConfig()), **vars(EngineLimits()), "max_requests": EngineLimits().requests}
    numbers = ("max_requests", "max_waiting", "max_new_tokens", "cache_tokens", "batch_tokens", "timeout_s")
    found = command_line("serve")
    assert [found[name].default for name in numbers] == [served[name] for name in numbers]


@pytest.mark.parametrize("name", ["max_steps", "learning_rate", "weight_decay"])
def test_defaults_that_methods_change_are_told(name):
    usual = getattr(FitConfig(), name)
    fits = {name: FitConfig.for_method(make_method(name, {})) for name, method in METHODS.items() if method.learns}
    others = {method: value for method, config in fits.items() if (value := getattr(config, name)) != usual}
    [told] = re.findall(r"\[default: (.*)\]", command_line("fit")[name].help)
    first, *parts = told.split("; ")
    assert (None if first == "none" else float(first)) == usual
    said, methods = {}, []
    for part in ", ".join(parts).split(", "):
        method, _, value = part.partition(" ")
        methods.append(method)
        if value:
            said.update(dict.fromkeys(methods, float(value)))
            methods = []
    assert said == others
    assert name in options_of(Steps)

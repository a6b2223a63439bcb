"""What is written after options, as values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from loraflow.errors import LoraflowError, MethodError

# Options that take several values after one flag, as in `--lora-modules zh=path math=path`.
_SEVERAL = (
    "--adapter-data",
    "--auto-option",
    "--compare",
    "--fusions",
    "--lora-modules",
    "--merge-option",
    "--method-option",
    "--methods",
    "--report-to",
    "--seeds",
    "--tasks",
)
# Of these, those whose values are bare words, so that an argument after them would be taken for one.
_WORDS = ("--compare", "--fusions", "--methods", "--report-to", "--seeds", "--tasks")
# Commands that mix the data of several sources; they have no arguments that could be taken for one.
_MIXING = ("fit", "finetune")


def spread_values(arguments: Sequence[str]) -> list[str]:
    """`--lora-modules a=1 b=2` as `--lora-modules a=1 --lora-modules b=2`, which is what the parser knows."""
    spread: list[str] = []
    flag: str | None = None
    mixing = ("--data",) if arguments and arguments[0] in _MIXING else ()
    for argument in arguments:
        if argument.startswith("-"):
            flag = argument if argument in (*_SEVERAL, *mixing) else None
            spread.append(argument)
        elif flag is not None and ("=" in argument or flag in (*_WORDS, *mixing)) and spread[-1] != flag:
            spread += [flag, argument]
        else:
            spread.append(argument)
    return spread


def parse_adapters(modules: Sequence[str], flag: str = "--lora-modules") -> dict[str, str]:
    """`name=path` pairs by name, in order.

    Raises:
        LoraflowError: if one has another form, or a name comes twice.
    """
    adapters: dict[str, str] = {}
    for module in modules:
        name, separator, path = module.partition("=")
        if not (name and separator and path):
            raise LoraflowError(f"`{flag}` takes name=path, found {module!r}.")
        if name in adapters:
            raise LoraflowError(f"`{flag}` names {name!r} twice. Give each adapter its own.")
        adapters[name] = path
    return adapters


def parse_method_options(options: Sequence[str], flag: str = "--method-option") -> dict[str, Any]:
    """`key=value` pairs; a value is JSON where it can be, else text.

    Raises:
        MethodError: if one has another form.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not (key and separator):
            raise MethodError(f"`{flag}` takes key=value, found {option!r}.")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed

"""Options that are declared once, in groups, and which of a command's options were given.

A group is a frozen dataclass whose fields are annotated as a command's parameters are; fields may be groups. A command
that has a parameter of that type takes the group's options in its place, flat, and is called with the group:

```python
@dataclass(frozen=True)
class Placement:
    dtype: Annotated[str, typer.Option("--dtype", help="Precision of the base.")] = "auto"


@with_groups
def command(*, placement: Placement) -> None: ...
```
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_type_hints

import typer

RECIPE = "loraflow.recipe"
"""Where a command's context has fields of a recipe that a file says, and that no option can say."""
ARGUMENTS = "loraflow.arguments"
"""Where a context keeps the words of the command line."""


class Given:
    """Which of a command's options were given; a command has one by a parameter of this type.

    An option of the command line, or of its --config, counts even if it says what is the default, and one from the
    environment does not: a variable there is meant for many commands, and must not make one of them refuse to run.

    Attributes:
        names: the parameters that were given, in the command's order.
        arguments: the words of the whole command line, behind the program's name.
    """

    names: list[str]
    arguments: list[str]

    def __init__(self, context: typer.Context, values: Mapping[str, Any]) -> None:
        self._flags = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
        self._values, self._recipe = values, dict(context.meta.get(RECIPE, {}))
        self.arguments = context.meta.get(ARGUMENTS, [])
        sources = {name: context.get_parameter_source(name) for name in self._flags if name is not None}
        said = ("COMMANDLINE", "DEFAULT_MAP")
        self.names = [name for name, source in sources.items() if source is not None and source.name in said]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def flag(self, name: str) -> str:
        """A parameter as the command line spells it, such as `--timeout` for `timeout_s`."""
        return self._flags[name]

    def settings(self, config: type) -> dict[str, Any]:
        """What was given of the fields of a dataclass: it knows its own defaults, or a method does."""
        fields = {field.name for field in dataclasses.fields(config)}
        values = {**self._recipe, **self.values()}
        return {name: value for name, value in values.items() if name in fields}

    def values(self) -> dict[str, Any]:
        """What was given, by parameter."""
        return {name: self._values[name] for name in self.names}

    def flags(self, names: Collection[str]) -> list[str]:
        """Those of these parameters that were given, spelled so."""
        return [self.flag(name) for name in self.names if name in names]


def panel(title: str) -> Callable[..., Any]:
    """`typer.Option` for the options under one heading of --help."""
    return functools.partial(typer.Option, rich_help_panel=title)


def options_of(group: type) -> list[str]:
    """The parameters of a group, those of groups in it included."""
    return [parameter.name for parameter in _parameters(group)]


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command with its groups' options in the places of its groups, and `Given` told apart."""
    hints = {name: hint for name, hint in get_type_hints(command, include_extras=True).items() if name != "return"}
    flat: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        flat += _flat(parameter.name, hints[parameter.name], parameter.default)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(**{name: _take(name, hint, values) for name, hint in hints.items()})

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    return run


def _flat(name: str, hint: Any, default: Any) -> list[inspect.Parameter]:
    if hint is Given:
        name, hint = "context", typer.Context
    if dataclasses.is_dataclass(hint):
        return _parameters(hint)
    return [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)]


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    found: list[inspect.Parameter] = []
    for field in dataclasses.fields(group):
        default: Any = inspect.Parameter.empty
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found += _flat(field.name, hints[field.name], default)
    return found


def _take(name: str, hint: Any, values: Mapping[str, Any]) -> Any:
    if hint is Given:
        return Given(values["context"], values)
    if not dataclasses.is_dataclass(hint):
        return values[name]
    hints = get_type_hints(hint, include_extras=True)
    return hint(**{field.name: _take(field.name, hints[field.name], values) for field in dataclasses.fields(hint)})  # type: ignore[operator]

"""A command's options from a file, and in one that gives the same result again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loraflow.cli.groups import RECIPE, Given
from loraflow.errors import LoraflowError
from loraflow.examples import Source
from loraflow.training.config import FitConfig
from loraflow.training.recipes import known_fields, read_yaml

CONFIG_FILE = "fit.yaml"
# What is of one run, not of what it makes.
_OF_A_RUN = frozenset(
    {"config", "output", "resume", "overwrite", "keep_checkpoints", "find_learning_rate", "devices", "shard"}
)
# Options that are places or Hub ids; those of several by name.
_NAMED = frozenset({"lora_modules", "adapter_data"})
_PLACES = _NAMED | {"base", "data", "dev"}


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Take a file's options as this command's defaults."""
    if path is None:
        return None
    content = {str(name).replace("-", "_"): value for name, value in read_yaml(path.expanduser()).items()}
    names = [field.name for field in dataclasses.fields(FitConfig)]
    recipe = known_fields(content.pop("recipe", None) or {}, names, f"{path}: `recipe`")
    options = {str(option.name): option for option in context.command.params if option.name not in ("config", "help")}
    # As the command line spells them too.
    spelled = {max(option.opts, key=len).lstrip("-").replace("-", "_"): name for name, option in options.items()}
    given = known_fields(content, sorted({*options, *spelled}), f"{path}: the command")
    named = {spelled.get(name, name): value for name, value in given.items()}
    for name in named.keys() & recipe.keys():
        raise LoraflowError(f"{path}: {name!r} stands twice, also under `recipe`. Leave one out.")
    of_both = {**named, **recipe}
    context.meta[RECIPE] = {name: value for name, value in recipe.items() if name not in options or value is None}
    context.default_map = {
        name: _as_typed(options[name], value, path)
        for name, value in of_both.items()
        if name in options and value is not None
    }
    return path


def _as_typed(option: Any, value: Any, path: Path) -> Any:
    """A value of a file as the command line would have it."""
    if getattr(option, "multiple", False):
        if isinstance(value, Mapping):
            return [f"{key}={each if isinstance(each, str) else json.dumps(each)}" for key, each in value.items()]
        return [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, list | dict):
        raise LoraflowError(f"{path}: {option.name!r} (={value!r}) takes one value. Give that.")
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_read,
        help=f"YAML file of these options, by their names, the recipe's also under `recipe`, such as the {CONFIG_FILE} "
        "in --output; those on the command line win. A relative path in it is relative to the working directory.",
    ),
]


def config_file(given: Given, config: FitConfig, idle: Collection[str]) -> bytes:
    """The file that makes a command give the same again: what it was given, and its whole recipe.

    Args:
        given: the command's options.
        config: the recipe that they came to.
        idle: fields of it that had no use.
    """
    import yaml

    recipe = {name: value for name, value in dataclasses.asdict(config).items() if name not in idle}
    options = {
        name: _as_place(name, value)
        for name, value in given.values().items()
        if name not in _OF_A_RUN and name not in recipe and name not in idle
    }
    plain = json.loads(json.dumps({**options, "recipe": recipe}))
    head = f"# Again: loraflow fit --config {CONFIG_FILE} --output DIRECTORY\n"
    return (head + yaml.safe_dump(plain, allow_unicode=True, sort_keys=False)).encode()


def _as_place(name: str, value: Any) -> Any:
    """A value with absolute paths, which mean the same in every working directory; Hub ids stay."""
    if isinstance(value, Path):
        return str(value.expanduser().absolute())
    if name in _NAMED and isinstance(value, list | tuple):
        return {key: _as_place(name, path) for key, _, path in (str(each).partition("=") for each in value)}
    if isinstance(value, list | tuple):
        return [_as_place(name, each) for each in value]
    if name in _PLACES and isinstance(value, str):
        # A source of data may have its share of a mixture behind it.
        place, mark, share = value.rpartition("=")
        if not place or Path(value).exists():
            place, mark, share = value, "", ""
        return f"{_absolute(name, place)}{mark}{share}"
    return value


def _absolute(name: str, place: str) -> str:
    """A place with its slice or split, if it has one; a Hub id as it is."""
    if name == "base":
        path = Path(place).expanduser()
        return str(path.absolute()) if path.exists() else place
    source = Source.parse(place)
    path = Path(source.path).expanduser()
    return str(dataclasses.replace(source, path=str(path.absolute())) if path.exists() else source)

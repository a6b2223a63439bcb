"""What recipes are written in: files, and the names in them. Light: command lines read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from loraflow.errors import DataError, LoraflowError, did_you_mean

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""How a learning rate goes on after its rise, and transformers' names of that."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Who gets the curves of a fit, by transformers' names."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML would read 1e-3 as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields that a YAML file holds.

    Raises:
        DataError: if it cannot be read, or holds something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, and should hold fields, as `name: value`.")
    return content


def read_recipe(path: str | Path, known: Sequence[str]) -> dict[str, Any]:
    """The fields of a recipe in a file, those under `recipe` where there is such a key."""
    content = read_yaml(Path(path).expanduser())
    return known_fields(content.get("recipe", content), known, f"{path}: a recipe")


def known_fields(content: Any, known: Sequence[str], of: str) -> dict[str, Any]:
    """Fields by their names, for which `-` may stand where `_` does.

    Raises:
        DataError: if there are no fields.
        LoraflowError: if one is unknown.
    """
    if not isinstance(content, dict):
        raise DataError(f"{of} holds fields, as `name: value`, and no {content!r}.")
    found = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name in found:
        if name not in known:
            raise LoraflowError(f"{of} has no {name!r}. {did_you_mean(name, known)}")
    return found

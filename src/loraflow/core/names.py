"""What adapters may be called."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from loraflow.errors import LoraflowError
from loraflow.methods import method_names

# It stands in logs, metrics and answers.
_LONGEST_NAME = 128


def check_adapter_names(names: Sequence[str]) -> None:
    """Check that adapters can be called so.

    Raises:
        LoraflowError: if there is none, or a name is a path, means something else, or cannot be shown.
    """
    if not names:
        raise LoraflowError("No adapters were given. Give at least one, by name.")
    reserved = ("best", *method_names())
    for name in names:
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise LoraflowError(
                f"The adapter name {reprlib.repr(name)} ({len(name)} characters) cannot be used: it must have at most "
                f"{_LONGEST_NAME} characters, all of them printable. Rename it."
            )
        if name in reserved or not name.strip() or "/" in name or name.startswith("."):
            raise LoraflowError(
                f"The adapter name {name!r} cannot be used: it must be no path, and none of {', '.join(reserved)}. "
                "Rename it."
            )

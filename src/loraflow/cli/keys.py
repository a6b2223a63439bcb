"""Keys as the command line takes them: options, a variable, a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loraflow.errors import LoraflowError
from loraflow.serving.credentials import check_keys, read_keys


def keys_of(kind: str, given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The keys of one kind, `api` or `admin`: those of its options, else that of its variable, and those of its file.

    The variable is one key, spaces and all, and read here: click takes an empty one for none, and splits others.

    Raises:
        LoraflowError: if the variable is empty, or the file cannot be used.
    """
    variable = f"LORAFLOW_{kind.upper()}_KEY"
    named = os.environ.get(variable)
    if named is not None:
        if not named.strip():
            raise LoraflowError(
                f"`{variable}` is set, and empty: that is no key, and would let everybody in. Give it a key, or unset "
                "it."
            )
        check_keys(f"{kind}_keys", [named])
    keys = tuple(given) or (() if named is None else (named,))
    check_keys(f"{kind}_keys", keys)
    return keys + (() if file is None else read_keys(f"{kind}_key_file", file))

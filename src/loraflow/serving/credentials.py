"""What a key of the server may be, and files of them; no message and no `repr` has a key in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraflow.errors import LoraflowError


def check_keys(name: str, keys: Sequence[str]) -> None:
    """Check that every client can send these keys as `Authorization: Bearer KEY`.

    Raises:
        LoraflowError: if they are no sequence of keys, or one is empty or cannot be sent.
    """
    if isinstance(keys, str):
        raise LoraflowError(f"`{name}` is one text. Give a list of keys, even of one.")
    for number, key in enumerate(keys, start=1):
        which = f"Key {number} of {len(keys)} (`{name}=...`)"
        if not key.strip():
            raise LoraflowError(
                f"{which} is empty, as an unset variable is, and would let everybody in. Give a key, or leave it out."
            )
        # Clients disagree on how other characters are sent: OpenAI's refuses them, curl sends UTF-8, others Latin-1.
        if not key.isascii() or not key.isprintable():
            raise LoraflowError(
                f"{which} has characters that not every client can send in a header. Use visible ASCII characters."
            )
        if key != key.strip():
            raise LoraflowError(
                f"{which} has blanks at its ends, which HTTP takes off, so that no request could bring it. Leave them "
                "out."
            )


def read_keys(name: str, path: str | Path) -> tuple[str, ...]:
    """The keys in a file, one a line; empty lines and those that start with `#` are none.

    Who may read the file is not looked at: secrets that a platform mounts are often readable by all in the container.

    Raises:
        LoraflowError: if it cannot be read, or has no key.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise LoraflowError(
            f"The file of `{name}=...` ({str(path)!r}) cannot be read: {reason}. Give a text file with one key a line."
        ) from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise LoraflowError(f"The file of `{name}=...` ({str(path)!r}) has no key in it. Write one key a line into it.")
    return keys

"""What an example is, which fields of a row it is made of, and how rows are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any, TypeVar

from loraflow.errors import DataError
from loraflow.prompts import Message

T = TypeVar("T")

Row = tuple[str, Any]
"""Where a record stands, and the record; in its place the error that says why it cannot be read."""


@dataclass(frozen=True)
class Fields:
    r"""Which fields of a record are prompt and completion.

    Each is the path of a field, `data.1` for the second item of the list `data`; or text with such paths in braces,
    `Question: {question}\nAnswer:`, where `{{` and `}}` are braces.
    """

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        for text in (self.prompt, self.completion):
            pieces_of(text)


def pieces_of(text: str) -> list[tuple[str, str | None]] | None:
    """What a template consists of, as pairs of literal text and the path behind it; None for the path of a field.

    Raises:
        DataError: if the braces make no template.
    """
    if "{" not in text and "}" not in text:
        return None
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"The template {text!r} is malformed: {error}. Write {{{{ and }}}} for braces.") from error
    for _, path, form, conversion in pieces:
        if path is not None and (not path or form or conversion):
            raise DataError(f"The template {text!r} must have the names of fields in its braces, and nothing else.")
    return [(literal, path) for literal, path, *_ in pieces]


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        messages: the conversation up to and including the turn that is answered: the user's, or a tool's.
        completion: the answer to it.
        record: the record as it was given; scorers read further fields of it.
        origin: file and line, the row of a table or data set, or the position in a sequence.
    """

    messages: tuple[Message, ...]
    completion: str
    record: Mapping[str, Any]
    origin: str


def check_rows(rows: Iterable[Row], parse: Callable[[Any, str], T]) -> list[T]:
    """Every record as `parse` gives it, of the record and where it stands.

    Raises:
        DataError: if any is malformed: the first one's error, and how many more there are.
    """
    found: list[T] = []
    first, wrong, count = None, 0, 0
    for origin, record in rows:
        count += 1
        try:
            if isinstance(record, DataError):
                raise record
            found.append(parse(record, origin))
        except DataError as error:
            first, wrong = first or error, wrong + 1
    if first is not None and wrong > 1:
        raise DataError(f"{first} {wrong - 1} more of the {count} rows cannot be used either.") from first
    if first is not None:
        raise first
    return found

"""Examples from JSON lines or Python: prompt and completion, chat messages, or any two named fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraflow.errors import DataError
from loraflow.prompts import Message

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Fields:
    """Which two fields of a record are prompt and completion; `data.1` is the second item of the list `data`."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        messages: the conversation up to and including the user's last turn.
        completion: the answer to it.
        record: the record as it was given; scorers read further fields of it.
        origin: file and line, or the position in a sequence.
    """

    messages: tuple[Message, ...]
    completion: str
    record: Mapping[str, Any]
    origin: str


def read_examples(path: str | Path, fields: Fields | None = None) -> list[Example]:
    """Read examples from a file of JSON lines, and check every one.

    Raises:
        DataError: if the file cannot be read or a line is malformed; the message names file and line.
    """
    return [parse_example(record, origin, fields) for origin, record in read_records(path)]


def read_records(path: str | Path) -> list[tuple[str, Any]]:
    """The JSON values of a file, one a line, each with its file and line.

    Raises:
        DataError: if the file cannot be read, a line is not JSON, or there is none.
    """
    path = Path(path).expanduser()
    try:
        # Not `splitlines`: JSON strings may hold other line separators, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    records = [
        (f"{path}:{number}", _parse_line(line, f"{path}:{number}"))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not records:
        raise DataError(f"{path} holds no examples. Give one JSON object a line.")
    return records


def parse_examples(records: Iterable[Mapping[str, Any] | Example], fields: Fields | None = None) -> list[Example]:
    """Check examples that are in memory already.

    Raises:
        DataError: if one is malformed, or there is none; the message names its position.
    """
    if isinstance(records, str | Path):
        raise DataError(f"Examples were given as {str(records)!r}. Read them with `loraflow.examples.read_examples`.")
    examples = [
        record if isinstance(record, Example) else parse_example(record, f"example {position}", fields)
        for position, record in enumerate(records)
    ]
    if not examples:
        raise DataError("No examples were given. Give at least one.")
    return examples


def parse_example(record: Any, origin: str, fields: Fields | None = None) -> Example:
    """Check one record and bring it into the common form.

    Raises:
        DataError: if it is malformed.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{origin}: expected an object, found {type(record).__name__}.")
    if fields is not None:
        prompt, completion = (_text(record, path, origin) for path in (fields.prompt, fields.completion))
    elif "messages" in record:
        return _from_messages(record, origin)
    elif "prompt" in record and "completion" in record:
        prompt, completion = _text(record, "prompt", origin), _text(record, "completion", origin)
    else:
        raise DataError(
            f"{origin}: expected `prompt` and `completion`, or `messages`; found {sorted(record)}. "
            "Name two fields with `fields=Fields(prompt, completion)`."
        )
    return Example(({"role": "user", "content": prompt},), completion, record, origin)


def _parse_line(line: str, origin: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not valid JSON ({error.msg}, column {error.colno}).") from error


def _text(record: Mapping[str, Any], path: str, origin: str) -> str:
    value: Any = record
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise DataError(f"{origin}: there is no field {path!r}; the record has {sorted(record)}.") from None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{origin}: field {path!r} must be non-empty text, found {value!r}.")
    return value


def _from_messages(record: Mapping[str, Any], origin: str) -> Example:
    messages = record["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) < 2:
        raise DataError(f"{origin}: `messages` must be a list of at least a user's and an assistant's turn.")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise DataError(f"{origin}: every message needs a `role` of {', '.join(ROLES)}; found {message!r}.")
        _text(message, "content", origin)
    if messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        raise DataError(f"{origin}: `messages` must end with a user's turn and the assistant's answer to it.")
    context = tuple({"role": m["role"], "content": m["content"]} for m in messages[:-1])
    return Example(context, messages[-1]["content"], record, origin)

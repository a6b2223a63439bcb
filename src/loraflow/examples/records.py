"""One record becomes an example: prompt and completion, a conversation, or any fields that are named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraflow.errors import DataError
from loraflow.examples.base import Example, Fields, check_rows, pieces_of
from loraflow.prompts import Message

ROLES = ("system", "user", "assistant", "tool")

# ShareGPT's speakers; some of its kin name them as chat templates do.
_SPEAKERS = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}

# What a chat template would be given beside the messages, and prompts here are not.
_UNREAD = ("tools", "chat_template_kwargs")


def parse_examples(records: Iterable[Mapping[str, Any] | Example], fields: Fields | None = None) -> list[Example]:
    """Check examples that are in memory already.

    Raises:
        DataError: if one is malformed, or there is none; the message names its position.
    """
    if isinstance(records, str | Path):
        raise DataError(f"Examples were given as {str(records)!r}. Read them with `loraflow.examples.read_examples`.")

    def parse(record: Any, origin: str) -> Example:
        return record if isinstance(record, Example) else parse_example(record, origin, fields)

    examples = check_rows(((f"example {position}", record) for position, record in enumerate(records)), parse)
    if not examples:
        raise DataError("No examples were given. Give at least one.")
    return examples


def parse_example(record: Any, origin: str, fields: Fields | None = None) -> Example:
    """Check one record and bring it into the common form.

    Args:
        record: named fields.
        origin: where it stands, for messages.
        fields: which of them are prompt and completion. By default they have these names, as text or as messages; or
            there are `messages`, ShareGPT's `conversations`, or Alpaca's `instruction`, `input` and `output`.

    Raises:
        DataError: if it is malformed.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{origin}: expected an object, found {type(record).__name__}.")
    if fields is not None:
        return _example(record, origin, fields)
    if "messages" in record:
        return _from_messages(record, record["messages"], "messages", origin)
    if "prompt" in record and "completion" in record:
        if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
            return _from_two_lists(record, origin)
        return _example(record, origin, Fields("prompt", "completion"))
    if "conversations" in record:
        return _from_messages(record, _speakers_as_roles(record, origin), "conversations", origin)
    if "instruction" in record and "output" in record:
        # The input is what the instruction is about; without one, the instruction is the whole prompt.
        wanted = "{instruction}\n\n{input}" if record.get("input") else "instruction"
        return _example(record, origin, Fields(wanted, "output"))
    raise DataError(
        f"{origin}: expected `prompt` and `completion`, or `messages`; found {sorted(record)}. "
        "Name two fields with `fields=Fields(prompt, completion)`."
    )


def _example(record: Mapping[str, Any], origin: str, fields: Fields) -> Example:
    prompt, completion = (_filled(record, text, origin) for text in (fields.prompt, fields.completion))
    return Example(({"role": "user", "content": prompt},), completion, record, origin)


def _filled(record: Mapping[str, Any], text: str, origin: str) -> str:
    """A field's text, or that of a template whose fields may be empty and numbers."""
    pieces = pieces_of(text)
    if pieces is None:
        return _text(record, text, origin)
    filled = ""
    for literal, path in pieces:
        filled += literal
        if path is None:
            continue
        value = _value(record, path, origin)
        number = isinstance(value, int | float) and math.isfinite(value) and not isinstance(value, bool)
        if not number and not isinstance(value, str):
            raise DataError(f"{origin}: field {path!r} must be text or a number, found {value!r}.")
        filled += str(value)
    return _said(filled, f"{origin}: template {text!r}")


def _text(record: Mapping[str, Any], path: str, origin: str) -> str:
    value = _value(record, path, origin)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        raise DataError(
            f"{origin}: field {path!r} must be non-empty text, found {value!r}. In braces, as {{{path}}}, a number is "
            "taken as text."
        )
    return _said(value, f"{origin}: field {path!r}")


def _value(record: Mapping[str, Any], path: str, origin: str) -> Any:
    value: Any = record
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            # Some tables have a dot in a column's name.
            if path in record:
                return record[path]
            raise DataError(f"{origin}: there is no field {path!r}; the record has {sorted(record)}.") from None
    return value


def _said(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{what} must be non-empty text, found {value!r}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can write one half of a pair, and no tokenizer takes it.
        raise DataError(f"{what} has half a character in it: {value[error.start]!r}. Write it whole.") from error
    return value


def _from_two_lists(record: Mapping[str, Any], origin: str) -> Example:
    if len(record["completion"]) != 1:
        raise DataError(
            f"{origin}: `completion` must be the assistant's one turn, found {len(record['completion'])} messages. "
            "Give the whole conversation as `messages`."
        )
    both = [*record["prompt"], *record["completion"]]
    return _from_messages(record, both, "prompt and completion", origin)


def _speakers_as_roles(record: Mapping[str, Any], origin: str) -> Any:
    turns = record["conversations"]
    if not isinstance(turns, list) or not any(isinstance(turn, Mapping) and "from" in turn for turn in turns):
        return turns
    found = []
    for turn in turns:
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in _SPEAKERS or "value" not in turn:
            raise DataError(
                f"{origin}: every turn of `conversations` needs a `value`, and `from` of {', '.join(_SPEAKERS)}; found "
                f"{turn!r}."
            )
        found.append({"role": _SPEAKERS[speaker], "content": turn["value"]})
    return found


def _from_messages(record: Mapping[str, Any], messages: Any, name: str, origin: str) -> Example:
    for unread in _UNREAD:
        if record.get(unread):
            raise DataError(
                f"{origin}: prompts are made of messages alone, and there are `{unread}` too. Say what the model is to "
                "know of them in the system's turn, and leave the field out."
            )
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) < 2:
        raise DataError(f"{origin}: `{name}` must be a list of at least a user's and an assistant's turn.")
    turns = [_message(message, origin) for message in messages]
    if turns[-1]["role"] != "assistant" or turns[-2]["role"] not in ("user", "tool"):
        raise DataError(
            f"{origin}: `{name}` must end with a user's turn and the assistant's answer to it. A tool's turn may stand "
            "in the user's place."
        )
    more = sorted(turns[-1].keys() - {"role", "content", "name"})
    if more:
        raise DataError(
            f"{origin}: the last answer is learned from its `content` alone, and it has `{more[0]}` too. Write that "
            "into `content` as the model is to say it, or leave it out."
        )
    return Example(tuple(turns[:-1]), _text(turns[-1], "content", origin), record, origin)


def _message(message: Any, origin: str) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise DataError(f"{origin}: every message needs a `role` of {', '.join(ROLES)}; found {message!r}.")
    # Columns of tables give every message all keys that any has.
    given = _without_none(message)
    if given["role"] == "assistant" and given.get("tool_calls"):
        return {**given, "content": given.get("content", "")}
    _text(message, "content", origin)
    return given


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value

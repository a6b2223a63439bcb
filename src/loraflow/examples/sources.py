"""Where examples are, in one line of text: a file, a folder, or a data set on the Hub, whole or a slice of it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraflow.errors import DataError
from loraflow.examples.base import Example, Fields, Row, check_rows
from loraflow.examples.files import file_rows, is_data_file
from loraflow.examples.hub import dataset_rows
from loraflow.examples.records import parse_example

# The outermost brackets at the end: `train[:200]` of `org/name[train[:200]]`.
_BRACKETS = re.compile(r"(.+?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]")
_PICKED = re.compile(r"(\w[\w.-]*)?(?:\[(\d*):(\d*)\])?")
_DATA_SET = re.compile(r"(.+?)(?::([^:@/\\]+))?(?:@([^:@]+))?")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Where examples are.

    Attributes:
        path: a file, a folder with a data set, or the id of one on the Hub.
        config: a data set's configuration.
        revision: branch, tag or commit on the Hub.
        split: a data set's.
        start: how many rows are passed over.
        stop: how many there are up to the end of what is taken; None takes all.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    start: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, text: str | Path | Source) -> Source:
        """Read `file`, `file[:200]`, `org/name`, `org/name:config@revision[split]`, `folder[split[100:300]]`.

        A file or folder that has the whole text for its name is that, whatever brackets are in it.

        Raises:
            DataError: if brackets hold neither a split nor a slice, the slice is empty, or a file is said to have
                splits or a folder revisions.
        """
        if isinstance(text, Source):
            return text
        found = None if _exists(str(text)) else _BRACKETS.fullmatch(str(text))
        place, inside = found.groups() if found else (str(text), "")
        picked = _PICKED.fullmatch(f"[{inside}]" if ":" in inside and "[" not in inside else inside)
        if picked is None or (found and not inside):
            raise DataError(
                f"{str(text)!r}: the brackets must hold a split, a slice or both, as [train], [:200] or "
                f"[train[100:300]]; found [{inside}]."
            )
        split, start, stop = picked.groups()
        path, config, revision = _place(place)
        source = cls(path, config, revision, split, int(start or 0), int(stop) if stop else None)
        if source.stop is not None and source.stop <= source.start:
            raise DataError(f"{str(text)!r}: the slice [{start}:{stop}] is empty. Let it end behind its start.")
        if source.is_file and split is not None:
            raise DataError(f"{str(text)!r}: {path} is a file, which has no splits. Leave {split!r} out.")
        if revision is not None and os.path.isdir(_home(path)):
            raise DataError(f"{str(text)!r}: {path} is a folder, which has no revisions. Leave {revision!r} out.")
        return source

    @property
    def is_file(self) -> bool:
        """Whether it is a file here, or could only be one, rather than a data set."""
        return not os.path.isdir(_home(self.path)) and (_exists(self.path) or not _is_id(self.path))

    def rows(self) -> Iterator[Row]:
        """The rows, read or fetched as they are asked for."""
        if self.is_file:
            found = file_rows(Path(self.path).expanduser())
        else:
            found = dataset_rows(self.path, config=self.config, revision=self.revision, split=self.split)
        return itertools.islice(found, self.start, self.stop)

    def __str__(self) -> str:
        """What `parse` reads."""
        config = "" if self.config is None else f":{self.config}"
        revision = "" if self.revision is None else f"@{self.revision}"
        some = "" if (self.start, self.stop) == (0, None) else f"[{self.start or ''}:{self.stop or ''}]"
        picked = some if self.split is None else f"[{self.split}{some}]"
        return f"{self.path}{config}{revision}{picked}"


def read_examples(
    source: str | Path | Source, fields: Fields | None = None, *, limit: int | None = None
) -> list[Example]:
    """Read examples, and check every one.

    Args:
        source: where they are, as `Source.parse` reads it.
        fields: which fields are prompt and completion, where `parse_example` does not find them.
        limit: how many rows are read at most.

    Raises:
        DataError: if something cannot be read or is malformed; the message names file and line, or row.
    """
    return _checked(source, limit, lambda record, origin: parse_example(record, origin, fields))


def read_records(source: str | Path | Source, *, limit: int | None = None) -> list[tuple[str, Any]]:
    """The records as they stand there, each with file and line, or row.

    Raises:
        DataError: if something cannot be read, or there is none.
    """
    return _checked(source, limit, lambda record, origin: (origin, record))


def _checked(source: str | Path | Source, limit: int | None, parse: Any) -> list[Any]:
    source = Source.parse(source)
    found = check_rows(itertools.islice(source.rows(), limit), parse)
    if not found:
        raise DataError(
            f"{source} holds no examples. Give one JSON object a line. A table's first line names its columns."
        )
    return found


def _place(text: str) -> tuple[str, str | None, str | None]:
    """Path, configuration and revision; a file's name may have anything in it."""
    found = _DATA_SET.fullmatch(text)
    if _exists(text) or found is None:
        return text, None, None
    path, config, revision = found.groups()
    return (path, config, revision) if os.path.isdir(_home(path)) or _is_id(path) else (text, None, None)


def _is_id(path: str) -> bool:
    return _HUB_ID.fullmatch(path) is not None and not is_data_file(path)


def _home(path: str) -> str:
    return os.path.expanduser(path)


def _exists(path: str) -> bool:
    # `Path.exists` raises for what is too long for a name.
    return os.path.exists(_home(path))

"""Rows of one file: JSON lines, a JSON list, a table with commas or tabs, Parquet; each of them compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from loraflow.errors import DataError
from loraflow.examples.base import Row

# Names of compressed files, for telling a file from a data set on the Hub; what is in one is told by its first bytes.
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DATA = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")

_BOM = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"
# The longest that csv takes; its own limit of 131,072 characters for a field is a short book.
_LONGEST_FIELD = 2**31 - 1
_REMEDY = "Give one JSON object a line, a JSON list of them, a table (.csv, .tsv), or Parquet."


def is_data_file(name: str) -> bool:
    """Whether a name ends as files of examples do."""
    return _uncompressed(name).endswith(DATA)


def _uncompressed(name: str) -> str:
    name = name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name


def file_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, read as they are asked for.

    Yields:
        File and line, or row of a list or of Parquet; and the record.

    Raises:
        DataError: if the file cannot be read; what is wrong with a single line stands in its record's place.
    """
    try:
        with path.open("rb") as file, _plain(file, path) as plain:
            yield from _rows(plain, path)
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        # A compressed file that was cut short is among these.
        raise DataError(f"{path} cannot be read: {error}. Make or fetch it again.") from error


def _rows(plain: io.BufferedReader, path: Path) -> Iterator[Row]:
    start = plain.peek(len(_BOM) + 1)
    kind = Path(_uncompressed(path.name)).suffix
    if start.startswith(_PARQUET) or kind == ".parquet":
        return _parquet_rows(plain, path)
    if kind in (".csv", ".tsv"):
        return _table_rows(plain, path, "\t" if kind == ".tsv" else ",")
    # Blanks may stand before a list; a longer run of them than is read ahead is no list that anyone writes.
    return _list_rows(plain, path) if _is_list(plain) else _line_rows(plain, path)


def _is_list(plain: io.BufferedReader) -> bool:
    return plain.peek(1).removeprefix(_BOM).lstrip()[:1] == b"["


def _plain(file: io.BufferedReader, path: Path) -> io.BufferedReader:
    """A file's content, decompressed if its first bytes are those of a compressed file."""
    start = file.peek(6)
    openers: dict[bytes, Callable[[BinaryIO], Any]] = {
        b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
        b"BZh": bz2.BZ2File,
        b"\xfd7zXZ\x00": lzma.LZMAFile,
        b"\x28\xb5\x2f\xfd": lambda file: _pyarrow("pyarrow", path, "zstd").CompressedInputStream(file, "zstd"),
    }
    for magic, opener in openers.items():
        if start.startswith(magic):
            return io.BufferedReader(opener(file))
    return file


def _pyarrow(module: str, path: Path, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{path} is {what}, which needs pyarrow. Run: pip install 'loraflow[data]'") from error


def _texts(plain: io.BufferedReader, path: Path) -> Iterator[str | DataError]:
    r"""The lines of a file, which end with "\n" only: JSON strings may hold other separators, such as U+2028."""
    for number, line in enumerate(plain, start=1):
        content = line.removeprefix(_BOM) if number == 1 else line
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            yield DataError(
                f"{path}:{number} cannot be read as UTF-8 text: the byte 0x{content[error.start]:02x} stands at "
                f"{error.start + 1} of the line. {_REMEDY}"
            )


def _line_rows(plain: io.BufferedReader, path: Path) -> Iterator[Row]:
    for number, line in enumerate(_texts(plain, path), start=1):
        origin = f"{path}:{number}"
        if isinstance(line, DataError):
            yield origin, line
        elif line.strip():
            yield origin, _parsed(line, path, number)


def _parsed(text: str, path: Path, number: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return DataError(
            f"{path}:{number + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno}). {_REMEDY}"
        )
    except RecursionError:
        return DataError(f"{path}:{number}: not valid JSON (nested too deeply). {_REMEDY}")


def _list_rows(plain: io.BufferedReader, path: Path) -> Iterator[Row]:
    lines = list(_texts(plain, path))
    for line in lines:
        if isinstance(line, DataError):
            raise line
    content = _parsed("".join(cast(list[str], lines)), path)
    if isinstance(content, DataError):
        raise content
    yield from _numbered(content, path)


def _table_rows(plain: io.BufferedReader, path: Path, delimiter: str) -> Iterator[Row]:
    def text() -> Iterator[str]:
        for line in _texts(plain, path):
            if isinstance(line, DataError):
                raise line
            yield line

    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(text(), delimiter=delimiter, strict=True)
        columns = next(reader, [])
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise DataError(f"{path}:1: the column {twice[0]!r} is there twice. Give each its own name.")
        before = reader.line_num
        for values in reader:
            # A record with line breaks in its fields is named by its first line.
            origin, before = f"{path}:{before + 1}", reader.line_num
            if values:
                yield origin, _record(columns, values, origin)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a valid table ({error}). {_REMEDY}") from error
    finally:
        csv.field_size_limit(limit)


def _record(columns: list[str], values: list[str], origin: str) -> dict[str, str] | DataError:
    if len(values) != len(columns):
        return DataError(
            f"{origin}: {len(values)} values for the {len(columns)} columns {columns}. Put quotes around a value that "
            "has the separator or a line break in it."
        )
    return dict(zip(columns, values, strict=True))


def _parquet_rows(plain: io.BufferedReader, path: Path) -> Iterator[Row]:
    parquet = _pyarrow("pyarrow.parquet", path, "Parquet")
    # The end of Parquet says where everything is: a stream that cannot be sought is read whole.
    source = plain if plain.seekable() and plain.raw.seekable() else io.BytesIO(plain.read())
    try:
        table = parquet.ParquetFile(source)
        yield from _numbered((row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist()), path)
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error} Make or fetch it again.") from error


def _numbered(records: Any, path: Path) -> Iterator[Row]:
    return ((f"{path}, row {number}", record) for number, record in enumerate(records, start=1))

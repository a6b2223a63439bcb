"""Files of examples: every format gives the same, compressed or not, and every fault says where it is."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import sys
import threading

import pyarrow
import pyarrow.parquet
import pytest

from loraflow.errors import DataError
from loraflow.examples import Fields, read_examples, read_records

RECORDS = [
    {"prompt": "2+2?", "completion": "4"},
    {"prompt": 'a, "b"\tor\nc', "completion": "ж;\u2028"},
    {"prompt": "2+2?", "completion": "4"},
]


def csv_file(path, records=RECORDS, delimiter=",", **options):
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter, **options)
        writer.writeheader()
        writer.writerows(records)
    return path


def parquet_file(path, records=RECORDS):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def lines_file(path, records=RECORDS):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def list_file(path, records=RECORDS):
    path.write_text("\n " + json.dumps(records, indent=1), encoding="utf-8")
    return path


WRITERS = {
    "x.jsonl": lines_file,
    "x.JSON": lines_file,
    "x": lines_file,
    "x.json": list_file,
    "y.jsonl": list_file,
    "x.csv": csv_file,
    "x.tsv": lambda path: csv_file(path, delimiter="\t"),
    "x.parquet": parquet_file,
    "y.data": parquet_file,
}
SQUEEZED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("squeezed", [None, *SQUEEZED])
def test_every_format_gives_the_same(tmp_path, name, squeezed):
    path = WRITERS[name](tmp_path / name)
    if squeezed is not None:
        path = tmp_path / f"{name}.{squeezed}"
        path.write_bytes(SQUEEZED[squeezed]((tmp_path / name).read_bytes()))
    examples = read_examples(path)
    assert [e.record for e in examples] == RECORDS
    assert [e.completion for e in examples] == [record["completion"] for record in RECORDS]


def test_rows_are_named_by_line_or_number(tmp_path):
    csv_lines = [e.origin for e in read_examples(csv_file(tmp_path / "x.csv"))]
    # The second record takes two lines.
    assert csv_lines == [f"{tmp_path / 'x.csv'}:{line}" for line in (2, 3, 5)]
    for name, write in (("x.json", list_file), ("x.parquet", parquet_file)):
        origins = [e.origin for e in read_examples(write(tmp_path / name))]
        assert origins == [f"{tmp_path / name}, row {number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("options", [{"encoding": "utf-8-sig"}, {"lineterminator": "\n"}, {"quoting": csv.QUOTE_ALL}])
def test_tables_as_spreadsheets_save_them(tmp_path, options):
    path = csv_file(tmp_path / "x.csv", **options)
    assert [e.record for e in read_examples(path)] == RECORDS


def test_a_field_of_a_table_may_be_a_book(tmp_path):
    limit = csv.field_size_limit()
    path = csv_file(tmp_path / "x.csv", [{"prompt": "a" * 200_000, "completion": "b"}])
    assert len(read_examples(path)[0].messages[0]["content"]) == 200_000
    assert csv.field_size_limit() == limit


def test_a_pipe_is_read_as_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for write in (lines_file, parquet_file):
        content = write(tmp_path / "file").read_bytes()
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
        writer.start()
        assert [e.record for e in read_examples(tmp_path / "pipe")] == RECORDS
        writer.join()


def test_columns_of_messages(tmp_path):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    path = parquet_file(tmp_path / "x.parquet", [{"messages": messages}])
    assert read_examples(path)[0].completion == "4"


def faulty(kind, tmp_path):
    """A faulty file, and what is said of it."""
    path = tmp_path / f"x.{kind.split()[0]}"
    good = '{"prompt": "a", "completion": "b"}\n'
    contents = {
        "jsonl bytes": good.encode() + b'{"prompt": "\xff"}',
        "jsonl utf-16": good.encode("utf-16"),
        "jsonl csv": b"prompt,completion\na,b\n",
        "json cut": b'[{"prompt": "a",\n "completion"',
        "json bytes": b'[{"prompt": "\xff"}]',
        "json empty-list": b" []",
        "jsonl deep": b'{"a": ' * 100_000,
        "csv missing": b"question,answer\na,b\n",
        "csv more": b"prompt,completion\na,b\na,b,c\n",
        "csv quotes": b'prompt,completion\na,b\na,"b\n',
        "csv twice": b"prompt,prompt\na,b\n",
        "csv blank": b"prompt,completion\na,b\na,\n",
        "csv names-only": b"prompt,completion\n",
        "csv bytes": b"prompt,completion\na,b\nc,\xe9\n",
        "csv empty": b"",
        "gz cut": gzip.compress(good.encode() * 100)[:-20],
        "gz wrong": b"\x1f\x8b\x07nothing",
        "xz cut": lzma.compress(good.encode() * 100)[:-20],
        "zst cut": pyarrow.compress(good.encode() * 100, codec="zstd", asbytes=True)[:-5],
        "parquet text": good.encode(),
        "parquet cut": parquet_file(tmp_path / "whole").read_bytes()[:100],
        "xlsx zip": b"PK\x03\x04\xa8\x00",
    }
    path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("jsonl bytes", "{path}:2 cannot be read as UTF-8 text: the byte 0xff stands at 13 of the line. Give one JSON"),
        ("jsonl utf-16", "{path}:1 cannot be read as UTF-8 text: the byte 0xff"),
        ("jsonl csv", "{path}:1: not valid JSON (Expecting value, column 1). Give one JSON object a line, a JSON list"),
        ("json cut", "{path}:2: not valid JSON (Expecting ':' delimiter, column 14)"),
        ("json bytes", "{path}:1 cannot be read as UTF-8 text"),
        (
            "json empty-list",
            "{path} holds no examples. Give one JSON object a line. A table's first line names its columns.",
        ),
        ("jsonl deep", "{path}:1: not valid JSON (nested too deeply)"),
        ("csv missing", "{path}:2: expected `prompt` and `completion`, or `messages`; found ['answer', 'question']"),
        ("csv more", "{path}:3: 3 values for the 2 columns ['prompt', 'completion']. Put quotes around"),
        ("csv quotes", "{path}:3: not a valid table (unexpected end of data)"),
        ("csv twice", "{path}:1: the column 'prompt' is there twice. Give each its own name."),
        ("csv blank", "{path}:3: field 'completion' must be non-empty text, found ''."),
        ("csv names-only", "{path} holds no examples."),
        ("csv bytes", "{path}:3 cannot be read as UTF-8 text: the byte 0xe9 stands at 3 of the line."),
        ("csv empty", "{path} holds no examples."),
        ("gz cut", "{path} cannot be read: Compressed file ended before the end-of-stream marker was reached. Make or"),
        ("gz wrong", "{path} cannot be read: Unknown compression method"),
        ("xz cut", "{path} cannot be read: Compressed file ended"),
        ("zst cut", "{path} cannot be read: Truncated compressed stream"),
        ("parquet text", "{path} cannot be read as Parquet"),
        ("parquet cut", "{path} cannot be read as Parquet"),
        ("xlsx zip", "{path}:1 cannot be read as UTF-8 text: the byte 0xa8 stands at 5 of the line. Give one JSON"),
    ],
)
def test_faulty_files_say_what_and_where(tmp_path, kind, message):
    path = faulty(kind, tmp_path)
    with pytest.raises(DataError, match=re.escape(message.format(path=path))):
        read_examples(path)


def test_several_bad_rows_are_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\nnothing\n{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError, match=re.escape(f"{path}:2: expected") + r".* 2 more of the 4 rows cannot be used"):
        read_examples(path)
    with pytest.raises(DataError, match=re.escape(f"{path}:3: not valid JSON")):
        read_records(path)


@pytest.mark.parametrize("value", [None, float("nan"), True, ["a"]])
def test_what_a_table_has_in_place_of_text(tmp_path, value):
    path = parquet_file(tmp_path / "x.parquet", [{"prompt": "a", "completion": value}])
    for fields in (None, Fields("prompt", "{completion}")):
        with pytest.raises(DataError, match=r"x\.parquet, row 1: field 'completion' must be .*text"):
            read_examples(path, fields)


@pytest.mark.parametrize(("name", "what"), [("x.parquet", "Parquet"), ("x.zst", "zstd")])
def test_what_needs_pyarrow_says_so(tmp_path, monkeypatch, name, what):
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd" if what == "zstd" else b"PAR1")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        DataError, match=rf"{name} is {what}, which needs pyarrow\. Run: pip install 'loraflow\[data\]'"
    ):
        read_examples(tmp_path / name)


def test_only_so_many_rows_are_read(tmp_path):
    path = lines_file(tmp_path / "x.jsonl")
    with path.open("a") as file:
        file.write("no JSON")
    assert len(read_examples(f"{path}[:3]")) == 3
    assert [e.origin for e in read_examples(f"{path}[1:2]")] == [f"{path}:2"]
    assert len(read_examples(path, limit=2)) == 2
    with pytest.raises(DataError, match=re.escape(f"{path}[7:] holds no examples.")):
        read_examples(f"{path}[7:]")

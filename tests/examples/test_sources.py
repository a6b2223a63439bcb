"""Where examples are: what is written is read, and written again."""

from __future__ import annotations

import re

import pytest

from loraflow.errors import DataError
from loraflow.examples import Source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("x.jsonl", Source("x.jsonl")),
        ("data/x.jsonl[:200]", Source("data/x.jsonl", stop=200)),
        ("x=1@2:3.csv[5:]", Source("x=1@2:3.csv", start=5)),
        ("org/name", Source("org/name")),
        ("org/name[train]", Source("org/name", split="train")),
        ("org/name:main[train[:200]]", Source("org/name", "main", split="train", stop=200)),
        ("org/name@v1.0[train[10:20]]", Source("org/name", revision="v1.0", split="train", start=10, stop=20)),
        ("org/name:a b@refs/pr/1[test.x]", Source("org/name", "a b", "refs/pr/1", "test.x")),
        ("org/name.x[:7]", Source("org/name.x", stop=7)),
    ],
)
def test_what_is_written_is_read_and_written_again(text, source):
    assert Source.parse(text) == source
    assert str(source) == text
    assert Source.parse(source) is source
    assert source.is_file == (not text.startswith("org/"))


def test_what_exists_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x[train]").touch()
    (tmp_path / "org").mkdir()
    (tmp_path / "org/name").touch()
    assert Source.parse("x[train]") == Source("x[train]")
    assert Source.parse("org/name").is_file
    (tmp_path / "folder").mkdir()
    assert Source.parse("folder:main[train]") == Source("folder", "main", split="train")
    assert not Source.parse("folder").is_file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org/name[]", "the brackets must hold a split, a slice or both, as [train], [:200] or [train[100:300]]"),
        ("org/name[train[:10%]]", "found [train[:10%]]."),
        ("org/name[train[-5:]]", "found [train[-5:]]."),
        ("org/name[train+test]", "found [train+test]."),
        ("org/name[train[5:5]]", "the slice [5:5] is empty. Let it end behind its start."),
        ("x.jsonl[:0]", "the slice [:0] is empty."),
        ("x.jsonl[train]", "x.jsonl is a file, which has no splits. Leave 'train' out."),
        ("{folder}@main", "is a folder, which has no revisions. Leave 'main' out."),
    ],
)
def test_what_is_no_place_is_refused(tmp_path, text, message):
    text = text.format(folder=tmp_path)
    with pytest.raises(DataError, match=re.escape(repr(text)) + ": .*" + re.escape(message)):
        Source.parse(text)

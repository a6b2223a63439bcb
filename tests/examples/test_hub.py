"""Data sets: folders through `datasets` itself, and what is asked of the Hub."""

from __future__ import annotations

import json
import re
import sys

import datasets
import pytest

from loraflow.errors import DataError
from loraflow.examples import Fields, Source, read_examples

ROWS = [{"prompt": f"{n}?", "completion": str(n)} for n in range(5)]


@pytest.fixture
def folder(tmp_path):
    """A data set with two splits, as the Hub has them."""
    for split in ("train", "test"):
        lines = [json.dumps({**row, "split": split}) for row in ROWS]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_folder_with_splits(folder):
    examples = read_examples(f"{folder}[test[1:3]]")
    assert [(e.completion, e.record["split"]) for e in examples] == [("1", "test"), ("2", "test")]
    assert [e.origin for e in examples] == [f"{folder}[test], row {number}" for number in (2, 3)]
    with pytest.raises(DataError, match=re.escape(f"has the splits train, test. Say which: {folder}[train]")):
        read_examples(folder)
    with pytest.raises(DataError, match=r"the folder cannot be read .*Bad split: nowhere"):
        read_examples(f"{folder}[nowhere]")


@pytest.mark.parametrize("several", [False, True])
def test_what_datasets_has_saved(tmp_path, several):
    saved = datasets.Dataset.from_list(ROWS)
    saved = datasets.DatasetDict(train=saved, test=saved) if several else saved
    saved.save_to_disk(tmp_path / "saved")
    source = f"{tmp_path / 'saved'}" + ("[train[:2]]" if several else "[:2]")
    assert [e.completion for e in read_examples(source)] == ["0", "1"]
    if several:
        with pytest.raises(DataError, match=r"has no split 'tran'\. Known: 'test', 'train'\. Did you mean 'train'"):
            read_examples(f"{tmp_path / 'saved'}[tran]")


@pytest.fixture
def hub(monkeypatch):
    """The Hub's data sets: what was asked for, and how many rows were taken."""
    asked, taken = [], []

    def rows():
        for row in ROWS * 1000:
            taken.append(row)
            yield row

    def load(path, name=None, **options):
        asked.append((path, name, options))
        stream = datasets.IterableDataset.from_generator(rows)
        return stream if options["split"] else datasets.IterableDatasetDict(only=stream)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked, taken


def test_a_data_set_of_the_hub_is_streamed(hub):
    asked, taken = hub
    examples = read_examples("org/name:main@v1[train[2:5]]")
    assert asked == [("org/name", "main", {"split": "train", "revision": "v1", "streaming": True})]
    assert [e.origin for e in examples] == [f"org/name[train], row {number}" for number in (3, 4, 5)]
    assert len(taken) <= 6
    assert len(read_examples("org/name", limit=2)) == 2
    assert read_examples(Source("org/name", stop=1))[0].origin == "org/name[only], row 1"


def test_a_bad_row_of_a_data_set_is_named(hub):
    with pytest.raises(DataError, match=r"org/name\[train\], row 1: there is no field 'answer'; the record has \['com"):
        read_examples("org/name[train[:3]]", Fields("prompt", "answer"))


def test_what_cannot_be_loaded_says_why(monkeypatch, tmp_path):
    def load(*_, **__):
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = "'org/name': is neither a file here nor a data set that can be read (ConnectionError: no network here)"
    with pytest.raises(DataError, match=re.escape(message)):
        read_examples("org/name[train]")
    with pytest.raises(DataError, match="the folder cannot be read"):
        read_examples(tmp_path)


def test_without_datasets_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source, what in (("org/name", "is no file here"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=rf"{what}.* which `datasets` reads\. Run: pip install 'loraflow\[data\]'"):
            read_examples(source)

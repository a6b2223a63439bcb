"""A run's files: names that never meet, cells that are whole or not there, clear words about damage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loraflow.errors import LoraflowError
from loraflow.evaluation.compare import store as cells
from loraflow.evaluation.compare.store import Cell, Item, Record, Store, file_name

CELL = Cell("zh-math", "lora-flow", 3)
ITEMS = [Item("test.jsonl:1", "2 + 2?", "4\u2028</s>", {"right": 1.0}, 3), Item("b", "?", ["x", 1], {"right": 0.0})]
RECORD = Record(
    cell=CELL,
    identity={"method": {"method": "lora-flow"}, "limit": None},
    metric="right",
    scores=[1.0, 0.0],
    learned_parameters=7,
    examples=4,
    fit_s=1.5,
    answer_s=2.0,
    tokens=None,
    memory_mib=100.0,
    fitted_on="es-math",
    weights={"zh": (0.25, 0.125)},
    details={"start": {"zh": 0.5}},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


# ---- Names ---------------------------------------------------------------------------------------------------------

AWKWARD = ["", ".", "..", "_", "a", "A", "a b", "a_b", "a/b", "a\\b", "./a", "../a", "a.", ".a", "\u00e9", "e\u0301",
           "中文", "英文", "a|b", "a\nb", "con\0", "-4ed2a5c0", "a" * 300, "a" * 300 + "b", "once"]  # fmt: skip


def test_awkward_names_stay_apart_whatever_their_case() -> None:
    names = [file_name(name).lower() for name in AWKWARD]
    assert len(set(names)) == len(AWKWARD)


@given(st.text(max_size=20) | st.from_regex(r"[a-b._/ -]{0,4}(-[0-9a-f]{8})?", fullmatch=True))
@example("a" * 1000)
def test_a_name_is_one_part_of_a_path(name: str) -> None:
    part = file_name(name)
    assert part
    assert len(part.encode()) <= 150
    assert part.isascii()
    assert Path(part).name == part
    assert part not in (".", "..")


@given(st.text(alphabet="aAé _./-0", max_size=8))
def test_no_name_can_pass_for_anothers(name: str) -> None:
    # What one name became is a name too, and must not be kept where that one is.
    assert file_name(file_name(name)) != file_name(name) or file_name(name) == name


def test_plain_names_are_kept_as_they_are() -> None:
    assert [file_name(name) for name in ("zh-math", "lora-flow", "a_b.c+d")] == ["zh-math", "lora-flow", "a_b.c+d"]


def test_every_cell_has_files_of_its_own(store: Store) -> None:
    tasks, methods, seeds = ("a", "A", "a/b"), ("m", "M m"), (None, 0, 1)
    paths = [store.record_path(Cell(t, m, s)) for t in tasks for m in methods for s in seeds]
    assert len({str(path).lower() for path in paths}) == len(paths)
    assert all(path.is_relative_to(store.root / "cells") for path in paths)


@pytest.mark.parametrize("url", ["s3://bucket/run", "memory://run", Path("gs://bucket")])
def test_a_url_is_no_folder(url: str | Path) -> None:
    with pytest.raises(
        LoraflowError, match=r"The run's place \(='.*:/.*'\) is a URL, and a comparison works in a folder"
    ):
        Store(url)


# ---- Writing and reading -------------------------------------------------------------------------------------------


def test_a_cell_comes_back_as_it_was(store: Store) -> None:
    assert store.read(CELL) is None
    store.write(RECORD, ITEMS)
    assert store.read(CELL) == RECORD
    assert store.read_items(CELL) == ITEMS
    assert str(CELL) == "lora-flow, zh-math, seed 3"
    assert str(dataclasses.replace(CELL, seed=None)) == "lora-flow, zh-math"


def test_a_crash_between_answers_and_record_leaves_it_unfinished(store: Store, monkeypatch) -> None:
    written = []

    def crash_at_the_second(path: Path, content: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(content)

    monkeypatch.setattr(cells, "write_atomically", crash_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        store.write(RECORD, ITEMS)
    assert written == [store.answers_path(CELL)]
    assert store.read(CELL) is None


def test_a_removed_cell_is_gone_and_others_are_not(store: Store) -> None:
    other = dataclasses.replace(RECORD, cell=Cell("zh-math", "lora-flow", 4))
    for record in (RECORD, other):
        store.write(record, ITEMS)
    store.remove(CELL)
    store.remove(CELL)
    assert store.read(CELL) is None
    assert not store.answers_path(CELL).exists()
    assert store.read(other.cell) == other


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"weights": {}}', b'{"weights": null, "cell": {}}']
)
def test_a_damaged_record_says_what_to_remove(store: Store, content: bytes) -> None:
    store.write(RECORD, ITEMS)
    store.record_path(CELL).write_bytes(content)
    with pytest.raises(LoraflowError, match=r"seed-3\.json is no readable cell \(.*\)\. Remove it, to measure it"):
        store.read(CELL)


def test_an_unknown_field_of_a_record_is_damage_too(store: Store) -> None:
    store.write(RECORD, ITEMS)
    path = store.record_path(CELL)
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    with pytest.raises(LoraflowError, match=r"no readable cell .*colour"):
        store.read(CELL)


@pytest.mark.parametrize("content", [None, b"{", b"[]\n", b'{"id": "a"}\n', b"\xff"])
def test_damaged_answers_say_what_to_remove(store: Store, content: bytes | None) -> None:
    store.write(RECORD, ITEMS)
    path = store.answers_path(CELL)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    said = r"seed-3\.jsonl does not hold the answers of lora-flow, zh-math, seed 3 .* Remove seed-3\.json beside it"
    with pytest.raises(LoraflowError, match=said):
        store.read_items(CELL)

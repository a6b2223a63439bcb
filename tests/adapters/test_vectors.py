"""Vectors of adapters: the nearest by a loop, growth, stale ones named, files that are whole or refused."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loraflow.adapters import AdapterVectors
from loraflow.adapters.vectors import VECTORS_FILE
from loraflow.errors import AdapterError


def filled(count, features=4, seed=0):
    vectors = AdapterVectors("minilm", features)
    rows = torch.randn(count, features, generator=torch.Generator().manual_seed(seed))
    for i, row in enumerate(rows):
        vectors.put(f"a{i}", f"digest {i}", row)
    return vectors, rows


@settings(max_examples=50)
@given(count=st.integers(1, 40), wanted=st.integers(1, 50), seed=st.integers(0, 99), some=st.booleans())
def test_the_nearest_are_those_of_the_loop(count, wanted, seed, some):
    vectors, rows = filled(count, seed=seed)
    query = torch.randn(4, generator=torch.Generator().manual_seed(seed + 1))
    among = [f"a{i}" for i in range(0, count, 2)] if some else None
    scores = {
        f"a{i}": sum(a * b for a, b in zip(row.tolist(), query.tolist(), strict=True)) for i, row in enumerate(rows)
    }
    expected = sorted(among or scores, key=lambda name: -scores[name])[:wanted]
    found = vectors.nearest(query, wanted, among)
    assert [name for name, _ in found] == expected
    assert [score for _, score in found] == pytest.approx([scores[name] for name in expected], abs=1e-5)


def test_of_equal_ones_the_first_is_nearest():
    vectors = AdapterVectors("minilm", 2)
    for name in ("c", "a", "b"):
        vectors.put(name, "digest", torch.ones(2))
    assert [name for name, _ in vectors.nearest(torch.ones(2), 2)] == ["c", "a"]


def test_an_adapter_comes_in_beside_the_others(tmp_path):
    vectors, rows = filled(16)
    vectors.save(tmp_path)
    again = AdapterVectors.read(tmp_path / VECTORS_FILE, "minilm")
    again.put("new", "digest", torch.ones(4))
    assert again.names == [*vectors.names, "new"]
    assert len(again) == 17
    for i, row in enumerate(rows):
        assert torch.equal(again.vector(f"a{i}", f"digest {i}"), row)
    again.remove("a3")
    assert torch.equal(again.vector("a4", "digest 4"), rows[4])
    assert torch.equal(again.vector("new", "digest"), torch.ones(4))
    again.save(tmp_path)
    assert AdapterVectors.read(tmp_path, "minilm").names == again.names


def test_a_replaced_adapter_is_stale_and_named():
    vectors, _ = filled(3)
    now = {"a0": "digest 0", "a1": "other", "new": "digest"}
    assert vectors.stale(now) == ["a1"]
    assert vectors.missing(now) == ["new"]
    with pytest.raises(
        AdapterError, match=r"'a1' was made for other weights \(digest 1\) than it has now \(other\)\. M"
    ):
        vectors.vector("a1", "other")
    vectors.put("a1", "other", torch.ones(4))
    assert vectors.stale(now) == []
    assert vectors.names == ["a0", "a1", "a2"]


def test_threads_may_share_it():
    vectors, _ = filled(1)

    def work(mine):
        for i in range(mine, 200, 4):
            vectors.put(f"b{i}", "digest", torch.full((4,), float(i)))
            vectors.nearest(torch.ones(4), 3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(vectors.vector(f"b{i}", "digest")[0] == i for i in range(200))


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (
            lambda v: v.put("x", "d", torch.ones(3)),
            "The vector of 'x' has the shape (3,) or values that are not finite.",
        ),
        (lambda v: v.put("x", "d", torch.full((4,), torch.nan)), "values that are not finite. Give 4 finite numbers."),
        (lambda v: v.vector("a7", "d"), "The adapter 'a7' has no vector. Known: 'a0', 'a1'."),
        (lambda v: v.remove("a7"), "The adapter 'a7' has no vector."),
        (lambda v: v.nearest(torch.ones(4), 0), "`count` (=0) must be a whole number of at least 1."),
        (lambda v: v.nearest(torch.ones(5), 1), "`query` has the shape (5,). Give 4 numbers."),
        (lambda v: v.nearest(torch.ones(4), 1, ["a0", "x"]), "The adapter 'x' has no vector."),
    ],
)
def test_what_cannot_be_is_refused(act, expected):
    with pytest.raises(AdapterError, match=re.escape(expected)):
        act(filled(2)[0])


def test_vectors_of_another_encoder_are_refused(tmp_path):
    filled(2)[0].save(tmp_path)
    with pytest.raises(
        AdapterError, match=r"were made by minilm, and cannot be compared with those of bge\. Make them"
    ):
        AdapterVectors.read(tmp_path, "bge")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "without names", "fewer rows", "not finite"])
def test_damaged_files_are_refused(damage, tmp_path):
    path = filled(3)[0].save(tmp_path / "vectors.safetensors")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "without names":
        save_file({"vectors": torch.ones(3, 4)}, path)
    elif damage in ("fewer rows", "not finite"):
        kept = filled(3)[0]
        kept._rows = kept._rows[:2] if damage == "fewer rows" else kept._rows.fill_(torch.inf)
        kept.save(path)
    else:
        path.write_bytes(content[:-9] if damage == "cut" else b"")
    with pytest.raises(AdapterError, match=r"(holds no vectors of adapters|values for 3 adapters, in format 1).*again"):
        AdapterVectors.read(path, "minilm")

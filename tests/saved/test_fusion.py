"""A saved fusion beside others who save: a reader sees the old one or the new one, whole, and a kill leaves nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from loraflow import FusedModel, LoraFlow, __version__
from loraflow.adapters import Adapter, AdapterSource, load_adapter, tensors_digest
from loraflow.bases import BaseOptions, BaseRecord
from loraflow.errors import FusionError, LoraflowError, StorageError
from loraflow.saved.fusion import SavedFusion
from loraflow.saved.records import AdapterRecord, FusionConfig, MethodRecord, relative_source
from loraflow.saved.storage import copy_adapters, read_fusion, write_fusion
from tests.tiny import save_adapter, tiny_model

fork = multiprocessing.get_context("fork")
BASE = BaseRecord(
    path="user/base", revision="abc", model_type="llama", hidden_size=8, num_hidden_layers=1, vocab_size=9,
    dtype="bfloat16", quantization="bnb-8bit",
)  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Adapter]:
    """Two adapters of one name."""
    root, base = tmp_path_factory.mktemp("adapters"), tiny_model(num_hidden_layers=1)
    return [load_adapter("zh", save_adapter(base, root / str(seed), ["q_proj"], seed=seed)) for seed in (1, 2)]


def save(directory: Path, adapter: Adapter, value: float = 0.0, *, copy: bool = False, **changes) -> None:
    """Save a fusion of one adapter that has learned one value."""
    tensors = {"model.weight": torch.full((1, 4), value)}
    path = str(copy_adapters([adapter], directory)[0]) if copy else adapter.source.path
    record = AdapterRecord(name=adapter.name, path=relative_source(path, directory), digest=adapter.digest)
    fields = {"base": BASE, "method": MethodRecord(name="average"), "adapters": [record], **changes}
    config = FusionConfig(loraflow_version=f"value {value}", weights_digest=tensors_digest(tensors), **fields)
    write_fusion(directory, config, tensors, "card")


@pytest.fixture
def fusion(tmp_path, adapters) -> Path:
    save(tmp_path / "fusion", adapters[0], copy=True)
    return tmp_path / "fusion"


def save_for_ever(directory: Path, adapters: list[Adapter], copy: bool) -> None:
    for number in range(10**6):
        save(directory, adapters[number % 2], float(number), copy=copy)


def saving(directory: Path, adapters: list[Adapter], *, copy: bool):
    writer = fork.Process(target=save_for_ever, args=(directory, adapters, copy), daemon=True)
    writer.start()
    return writer


def kill(writer) -> None:
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()


# ---- Others who save -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
def test_a_reader_sees_the_old_fusion_or_the_new(fusion, adapters, copy):
    writer, seen = saving(fusion, adapters, copy=copy), set()
    started = time.monotonic()
    try:
        while len(seen) < 3 or time.monotonic() - started < 3:
            saved, (adapter,) = SavedFusion.open(fusion).load()
            value = float(saved.tensors["model.weight"][0, 0])
            assert saved.config.loraflow_version == f"value {value}"
            assert adapter.digest == saved.config.adapters[0].digest
            seen.add(value)
    finally:
        kill(writer)


def test_copies_that_a_later_save_takes_away_are_those_of_the_older_fusion(fusion, adapters):
    older = SavedFusion.open(fusion)
    save(fusion, adapters[1], copy=True)
    saved, (adapter,) = older.load()
    assert (saved.config.adapters[0].digest, adapter.digest) == (adapters[1].digest, adapters[1].digest)
    shutil.rmtree(fusion / "adapters")
    with pytest.raises(
        FusionError, match=r"adapter 'zh' of the fusion '.*' cannot be read from where it was: .*`adapters="
    ):
        saved.load()


def test_kills_leave_nothing_after_the_next_save(fusion, adapters):
    left = 0
    for number in range(20):
        writer = saving(fusion, adapters, copy=True)
        time.sleep(0.01 + 0.003 * number)
        kill(writer)
        left += len(list(fusion.rglob(".*.tmp")))
        SavedFusion.open(fusion).load()
    assert left > 0, "no kill fell into a save"
    for adapter in adapters:
        save(fusion, adapter, copy=True)
    assert list(fusion.rglob(".*")) == []


# ---- Where nothing can be saved ------------------------------------------------------------------------------------


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_old_fusion(fusion, adapters, monkeypatch):
    before = content_of(fusion)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for copy in (False, True):
        with pytest.raises(StorageError, match=r"No space left on device\. Free some space, or give another place\."):
            save(fusion, adapters[1], 1.0, copy=copy)
    assert content_of(fusion) == before


@pytest.mark.parametrize("copy", [False, True])
def test_places_that_cannot_be_made_are_refused(adapters, tmp_path, copy):
    (tmp_path / "file").write_text("mine")
    model = FusedModel.from_adapters(tiny_model(num_hidden_layers=1), {"zh": adapters[0]}, "average")
    for place, reason in ((tmp_path / "file" / "fusion", r"file is a file"), ("/proc/none/fusion", r"No such file")):
        with pytest.raises(LoraflowError, match=rf"fusion/.* cannot be written: .*{reason}.*\. Give a place"):
            model.save_pretrained(place, copy_adapters=copy)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_adapter_that_is_gone_is_not_copied(adapters, tmp_path):
    gone = load_adapter("zh", shutil.copytree(adapters[0].source.path, tmp_path / "gone"))
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(FusionError, match=r"'zh' cannot be copied into the fusion: .*gone/.* cannot be read any more"):
        save(tmp_path / "fusion", gone, copy=True)


def test_a_fusion_without_adapters_is_refused(fusion):
    for name in ("fusion_config.json",):
        text = (fusion / name).read_text()
        start, end = text.index('"adapters"'), text.index('"method"')
        (fusion / name).write_text(f'{text[:start]}"adapters": [], {text[end:]}')
    with pytest.raises(FusionError, match=r"fusion_config\.json: `adapters`: List should have at least 1 item"):
        SavedFusion.open(fusion)


# ---- What it says of itself ----------------------------------------------------------------------------------------


def test_places_are_resolved(fusion, adapters):
    saved = SavedFusion.open(fusion)
    assert saved.base == "user/base"
    copy = fusion / "adapters" / f"zh-{adapters[0].digest[7:15]}"
    assert saved.recorded_sources == {"zh": AdapterSource(str(copy.resolve()))}
    assert saved.sources({"zh": "elsewhere"}) == {"zh": "elsewhere"}
    with pytest.raises(FusionError, match=r"has no adapter 'en'; it has \['zh'\]\."):
        saved.sources({"en": "elsewhere"})


def test_what_options_leave_open_is_as_it_was():
    saved = SavedFusion("x", "x", Path(), FusionConfig.model_construct(base=BASE), {}, ())
    assert saved.base_options("user/base") == BaseOptions("abc", "bfloat16", None, "bnb-8bit")
    assert saved.base_options("elsewhere").revision is None
    given = BaseOptions("main", "float32", "cpu", "none")
    assert saved.base_options("user/base", given) == given


def test_an_unknown_base_is_asked_for(tmp_path, adapters):
    save(tmp_path, adapters[0], base=BASE.model_copy(update={"path": ""}))
    with pytest.raises(
        FusionError, match=r"The fusion 'mine' does not know where its base model is\. Give it as `base`:"
    ):
        _ = SavedFusion.open(tmp_path, name="mine").base


def test_a_method_that_cannot_be_made_names_both_versions(tmp_path, adapters):
    save(tmp_path, adapters[0], 1.0, method=MethodRecord(name="static", parameters={"weights": {"en": 1.0}}))
    with pytest.raises(
        FusionError, match=rf"saved by loraflow value 1\.0 with a method that this loraflow {re.escape(__version__)}"
    ):
        _ = SavedFusion.open(tmp_path).method


def test_adapters_in_memory_are_taken_and_others_are_permitted(fusion, adapters):
    asked = []

    def permit(path: str) -> str:
        asked.append(path)
        return adapters[1].source.path

    saved, (adapter,) = SavedFusion.open(fusion).load(loaded=adapters, permit=permit)
    assert (adapter.modules, asked) == (adapters[0].modules, [])
    with pytest.raises(FusionError, match=r"not the one that the fusion '.*' was made with"):
        saved.load(permit=permit)
    assert asked == [saved.recorded_sources["zh"].path]


def test_the_digest_is_of_what_is_computed(tmp_path, adapters):
    def digest(adapter: Adapter = adapters[0], **changes) -> str:
        save(tmp_path, adapter, **changes)
        return SavedFusion.open(tmp_path).digest

    first = digest()
    elsewhere = BASE.model_copy(update={"path": "there", "revision": None})
    assert digest(copy=True) == digest(base=elsewhere) == digest(training={"examples": 3}) == first
    others = [
        digest(adapters[1]),
        digest(value=1.0),
        digest(method=MethodRecord(name="base")),
        digest(method=MethodRecord(name="lora-flow", parameters=LoraFlow().parameters())),
        *(digest(base=BASE.model_copy(update={key: value})) for key, value in (
            ("dtype", "float32"), ("quantization", None), ("digest", "sha256:1"), ("num_hidden_layers", 2)
        )),
    ]  # fmt: skip
    assert len({first, *others}) == len(others) + 1


def test_the_files_of_another_save_have_another_stamp(fusion, adapters):
    before = read_fusion(fusion)[2]
    assert read_fusion(fusion)[2] == before
    save(fusion, adapters[0], copy=True)
    assert read_fusion(fusion)[2] != before

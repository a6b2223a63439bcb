"""A bank of adapters: opened by headers, read on use, bounded in bytes, and changed while it is used."""

from __future__ import annotations

import json
import re
import shutil
import threading
import types

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError
from safetensors import safe_open

from loraflow import AdapterBank, FusedModel
from loraflow.adapters import bank as bank_module
from loraflow.adapters import load_adapter
from loraflow.adapters.folders import names_of
from loraflow.adapters.index import INDEX_FILE
from loraflow.adapters.loading import outline_adapter
from loraflow.errors import AdapterError
from tests.tiny import edit_config, edit_tensors, save_adapter, tiny_model

HTTP_ERROR = HfHubHTTPError.__bases__[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_model()
    for seed, name in enumerate(("zh", "math", "law/old")):
        save_adapter(base, folder / name, seed=seed)
    (folder / "math" / "checkpoint-5").mkdir()
    shutil.copytree(folder / "zh", folder / "math" / "checkpoint-5", dirs_exist_ok=True)
    (folder / "logs").mkdir()
    (folder / ".cache").mkdir()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapters")


def reads(monkeypatch):
    """The names of the adapters whose weights are read, as they are."""
    names = []
    monkeypatch.setattr(
        bank_module,
        "load_adapter",
        lambda name, *args, **more: (names.append(name), load_adapter(name, *args, **more))[1],
    )
    return names


def same(one, other):
    assert one.modules.keys() == other.modules.keys()
    assert one.digest == other.digest
    for name, module in one.modules.items():
        assert torch.equal(module.lora_A, other.modules[name].lora_A)
        assert torch.equal(module.lora_B, other.modules[name].lora_B)
        assert module.scaling == other.modules[name].scaling


# ---- Opening -------------------------------------------------------------------------------------------------------


def test_a_folder_is_opened_by_its_headers_and_read_on_use(folder, monkeypatch):
    names = reads(monkeypatch)
    bank = AdapterBank(folder)
    assert list(bank) == ["law.old", "math", "zh"]
    entry = bank["zh"]
    assert (entry.ranks, entry.digest, names, bank.held_bytes) == ((4,), None, [], 0)
    adapter = bank.load("zh")
    same(adapter, load_adapter("zh", folder / "zh"))
    assert bank.load("zh") is adapter
    assert names == ["zh"]
    assert bank["zh"].digest == adapter.digest
    assert bank.held_bytes == bank["zh"].size_bytes == 4 * adapter.parameters
    assert repr(bank) == f"AdapterBank(3 adapters, {bank.held_bytes} of {bank.host_bytes} bytes held)"


def test_sources_are_named_by_their_last_parts_or_as_the_user_says(folder):
    assert list(AdapterBank([folder / "zh", str(folder / "math")])) == ["zh", "math"]
    shutil.copytree(folder / "zh", folder / "law" / "zh")
    assert list(AdapterBank([folder / "zh", folder / "law" / "zh"])) == ["adapters.zh", "law.zh"]
    assert list(names_of(["u/zh", "v/zh", "v/math", "w/v/zh"])) == ["u.zh", "v.zh", "math", "w.v.zh"]
    assert list(AdapterBank({"b": folder / "zh", "a": folder / "math"})) == ["b", "a"]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (lambda folder: folder / "none", r"none is not a directory\. Give a folder with adapters in it\."),
        (lambda folder: folder / "zh", r"zh is one adapter\. Give the folder that it is in: .*adapters\."),
        (lambda folder: folder / "logs", r"logs has no adapter in it, 3 levels deep\. Give a folder whose subfolders"),
        (lambda folder: [], r"No adapters were given\. Give at least one\."),
        (lambda folder: {}, r"No adapters were given\. Give at least one\."),
        (lambda folder: [folder / "zh"] * 2, r"zh' is given twice\. Give each adapter once, or name them\."),
    ],
)
def test_what_is_no_bank_is_refused(folder, adapters, message):
    with pytest.raises(AdapterError, match=message):
        AdapterBank(adapters(folder))


def test_two_folders_of_one_name_are_refused(folder):
    shutil.copytree(folder / "zh", folder / "law.old")
    with pytest.raises(AdapterError, match=r"old and .*law\.old would both be called 'law\.old'\. Rename one of them"):
        AdapterBank(folder)


@pytest.mark.parametrize("host_bytes", [0, True, 4e9, "4GB"])
def test_the_bytes_that_are_held_are_a_number(folder, host_bytes):
    message = rf"`host_bytes` \(={re.escape(repr(host_bytes))}\) must be a whole number of bytes, at least 1\."
    with pytest.raises(AdapterError, match=message):
        AdapterBank(folder, host_bytes=host_bytes)


def test_none_that_can_be_used_are_no_bank(folder):
    edit_config(folder / "zh", r=5)
    with pytest.raises(AdapterError, match=r"None of the 1 adapters can be used\. .*says rank 5.* Mend at least one\."):
        AdapterBank([folder / "zh"], skip_broken=True)


def break_header(folder):
    path = folder / "zh" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


BROKEN = {
    "cut": (break_header, "not a readable safetensors file"),
    "no weights": (lambda folder: (folder / "zh" / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "no configuration": (lambda folder: (folder / "zh" / "adapter_config.json").unlink(), "has no adapter_config"),
    "another rank": (lambda folder: edit_config(folder / "zh", r=5), "says rank 5"),
    "no LoRA": (lambda folder: edit_config(folder / "zh", peft_type="IA3"), "only 'LORA'"),
    "no floats": (
        lambda folder: edit_tensors(folder / "zh", lambda ts: ts.update({k: t.int() for k, t in ts.items()})),
        "is of torch.int32",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_adapter_is_named_and_left_out_only_if_that_is_asked_for(folder, damage, message):
    damage(folder)
    with pytest.raises(
        AdapterError, match=rf"1 of 3 adapters cannot be used: Adapter 'zh'.*{re.escape(message)}.*Mend"
    ):
        AdapterBank(folder)
    bank = AdapterBank(folder, skip_broken=True)
    assert list(bank) == ["law.old", "math"]
    assert list(bank.left_out) == ["zh"]
    assert message in bank.left_out["zh"]


def test_many_broken_ones_are_counted(folder):
    for number in range(4):
        shutil.copytree(folder / "zh", folder / f"zh{number}")
        edit_config(folder / f"zh{number}", r=5)
    with pytest.raises(AdapterError, match=r"4 of 7 adapters .* 1 more cannot: \['zh3'\]\. Mend them"):
        AdapterBank(folder)


def test_an_unknown_precision_is_refused(folder):
    path = folder / "zh" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F32"', b'"F4" '))
    with pytest.raises(AdapterError, match="'zh'"):
        AdapterBank(folder)


def test_an_adapter_on_the_hub_is_opened_by_its_header_alone(folder, monkeypatch):
    source = folder / "zh" / "adapter_model.safetensors"
    with safe_open(source, "pt") as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        tensors = {
            key: types.SimpleNamespace(dtype=part.get_dtype(), shape=part.get_shape()) for key, part in parts.items()
        }
    asked = []

    def download(repo, file, subfolder=None, revision=None):
        asked.append((repo, f"{subfolder}/{file}", revision))
        commit = folder / "snapshots" / "c0ffee"
        if not commit.exists():
            shutil.copytree(folder / "zh", commit)
        return str(commit / file)

    def header(self, repo, file, *, revision):
        assert (repo, file, revision) == ("user/repo", "zh/adapter_model.safetensors", "c0ffee")
        return types.SimpleNamespace(tensors=tensors)

    monkeypatch.setattr("loraflow.adapters.files.hf_hub_download", download)
    monkeypatch.setattr("loraflow.adapters.files.HfApi.parse_safetensors_file_metadata", header)
    bank = AdapterBank(["user/repo/zh"])
    assert asked == [("user/repo", "zh/adapter_config.json", None)]
    assert (bank["zh"].source.revision, bank["zh"].ranks) == ("c0ffee", (4,))
    same(bank.load("zh"), load_adapter("zh", folder / "zh"))
    # In a type that torch has not.
    next(iter(tensors.values())).dtype = "F4"
    with pytest.raises(AdapterError, match="tensors of the type F4, which torch does not have"):
        AdapterBank(["user/repo/zh"])


def test_a_collection_of_the_hub_is_its_models(folder, monkeypatch):
    items = [
        types.SimpleNamespace(item_id=str(folder / "zh"), item_type="model"),
        types.SimpleNamespace(item_id="user/data", item_type="dataset"),
    ]
    monkeypatch.setattr("huggingface_hub.get_collection", lambda slug: types.SimpleNamespace(items=items))
    assert list(AdapterBank.from_collection("user/title-0123")) == ["zh"]


def test_a_collection_that_cannot_be_read_is_named(folder, monkeypatch):
    def failing(slug):
        raise HTTP_ERROR("cut")

    monkeypatch.setattr("huggingface_hub.get_collection", failing)
    with pytest.raises(AdapterError, match=r"The collection 'user/a' on .* cannot be read: cut\. Check"):
        AdapterBank.from_collection("user/a")
    items = [types.SimpleNamespace(item_id="user/data", item_type="dataset")]
    monkeypatch.setattr("huggingface_hub.get_collection", lambda slug: types.SimpleNamespace(items=items))
    with pytest.raises(AdapterError, match=r"'user/a' .* has no models in it\. Give one that has"):
        AdapterBank.from_collection("user/a")
    items += [types.SimpleNamespace(item_id=str(folder / name), item_type="model") for name in ("zh", "math")]
    edit_config(folder / "zh", r=5)
    assert list(AdapterBank.from_collection("user/a", skip_broken=True).left_out) == ["zh"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorsParsingError("no header"), r"of 'user/repo' .* is no readable safetensors file \(no header\)"),
        (HTTP_ERROR("cut"), r"'user/repo' on the Hugging Face Hub cannot be read: cut"),
    ],
)
def test_one_broken_repository_does_not_stop_a_bank(folder, monkeypatch, error, message):
    def header(*args, **options):
        raise error

    monkeypatch.setattr(
        "loraflow.adapters.files.hf_hub_download", lambda repo, file, **options: str(folder / "zh" / file)
    )
    monkeypatch.setattr("loraflow.adapters.files.HfApi.parse_safetensors_file_metadata", header)
    bank = AdapterBank({"math": folder / "math", "zh": "user/repo"}, skip_broken=True)
    assert list(bank) == ["math"]
    assert re.search(message, bank.left_out["zh"])


# ---- The index -----------------------------------------------------------------------------------------------------


def test_an_index_opens_and_reads_without_looking_at_the_files_again(folder, monkeypatch):
    bank = AdapterBank(folder)
    adapter = bank.load("zh")
    assert bank.save_index() == folder / INDEX_FILE
    monkeypatch.setattr(bank_module, "outline_adapter", lambda *args: pytest.fail("a header was read"))
    again = AdapterBank(folder)
    assert {**again} == {**{name: again[name] for name in bank}}
    assert (again["zh"].digest, again["math"].digest) == (adapter.digest, None)
    monkeypatch.setattr("loraflow.adapters.loading.tensors_digest", lambda *args: pytest.fail("weights were read"))
    same(again.load("zh"), adapter)


def test_what_has_changed_since_an_index_is_read_anew(folder):
    AdapterBank(folder).save_index()
    edit_config(folder / "zh", r=2)
    edit_tensors(
        folder / "zh", lambda ts: ts.update({k: t[:2] if "_A" in k else t[:, :2].contiguous() for k, t in ts.items()})
    )
    shutil.copytree(folder / "zh", folder / "new")
    shutil.rmtree(folder / "math")
    bank = AdapterBank(folder)
    assert {name: entry.ranks for name, entry in bank.items()} == {"law.old": (4,), "new": (2,), "zh": (2,)}


@pytest.mark.parametrize("content", ["{", '{"format_version": 99, "adapters": {}}', '{"adapters": 5}'])
def test_an_index_that_cannot_be_read_changes_nothing(folder, content):
    (folder / INDEX_FILE).write_text(content)
    assert len(AdapterBank(folder)) == 3


def test_a_bank_of_no_folder_has_its_index_where_the_user_says(folder, tmp_path):
    bank = AdapterBank([folder / "zh"])
    with pytest.raises(AdapterError, match=r"opened from no folder has no place for its index\. Give a path\."):
        bank.save_index()
    bank.save_index(tmp_path / "index.json")
    assert json.loads((tmp_path / "index.json").read_text())["adapters"].keys() == {"zh"}


# ---- Memory, changes, threads --------------------------------------------------------------------------------------


def test_those_used_longest_ago_leave(folder, monkeypatch):
    names = reads(monkeypatch)
    size = AdapterBank(folder)["zh"].size_bytes
    bank = AdapterBank(folder, host_bytes=2 * size)
    for name in ("zh", "math", "zh", "law.old", "zh", "math"):
        bank.load(name)
        assert bank.held_bytes <= 2 * size
    assert names == ["zh", "math", "law.old", "math"]
    # One that is larger than all that may be held is held alone.
    bank = AdapterBank(folder, host_bytes=1)
    assert bank.load("zh") is bank.load("zh")


def test_a_replaced_adapter_is_another_and_the_old_one_stays_with_who_has_it(folder):
    bank = AdapterBank(folder)
    old, entry = bank.load("zh"), bank["zh"]
    before = {name: module.lora_B.clone() for name, module in old.modules.items()}
    # Written over in place, as trainers do.
    edit_tensors(folder / "zh", lambda ts: ts.update({key: 2 * tensor for key, tensor in ts.items()}))
    assert all(torch.equal(module.lora_B, before[name]) for name, module in old.modules.items())
    assert bank.load("zh") is old
    bank.replace("zh")
    new = bank.load("zh")
    assert bank["zh"].version != entry.version
    assert new.digest != old.digest
    assert all(torch.equal(module.lora_B, 2 * before[name]) for name, module in new.modules.items())
    bank.replace("zh", folder / "math")
    assert bank.load("zh").digest == bank.load("math").digest
    with pytest.raises(AdapterError, match=r"the files in .*zh have changed since the bank read them\. Take them in"):
        bank.load("zh", entry)
    edit_config(folder / "math", r=5)
    with pytest.raises(AdapterError, match="says rank 5"):
        bank.replace("zh", folder / "math")
    assert "zh" in bank


def test_files_that_changed_before_they_were_read_are_refused(folder):
    bank = AdapterBank(folder)
    edit_tensors(folder / "zh", lambda ts: ts.update({key: 2 * tensor for key, tensor in ts.items()}))
    with pytest.raises(AdapterError, match=r"Adapter 'zh': the files in .* have changed .* `replace\('zh'\)`"):
        bank.load("zh")


def test_adapters_come_and_go(folder):
    bank = AdapterBank([folder / "zh"])
    bank.add("math", folder / "math")
    assert list(bank) == ["zh", "math"]
    with pytest.raises(AdapterError, match=r"The bank has an adapter 'math'\. Replace it, or give another name\."):
        bank.add("math", folder / "math")
    bank.load("math")
    bank.remove("math")
    assert (list(bank), bank.held_bytes) == (["zh"], 0)
    for action in (bank.load, bank.remove, bank.replace):
        with pytest.raises(AdapterError, match=r"The bank has no adapter 'zhh'\. Known: 'zh'\. Did you mean 'zh'\?"):
            action("zhh")


def test_files_that_are_written_while_a_header_is_read_are_refused(folder, monkeypatch):
    def outlined(name, source):
        outline = outline_adapter(name, source)
        edit_tensors(folder / "zh", lambda ts: ts.update({key: 2 * tensor for key, tensor in ts.items()}))
        return outline

    monkeypatch.setattr(bank_module, "outline_adapter", outlined)
    with pytest.raises(AdapterError, match=r"'zh': the files in .*zh were written while the bank read them\. Take"):
        AdapterBank([folder / "zh"])


def test_nothing_waits_for_an_adapter_that_is_gone(folder):
    bank = AdapterBank(folder)
    old = bank["zh"]
    bank.replace("zh", folder / "math")
    bank.load("zh", old)
    bank.load("zh")
    assert bank._reading.keys() == {bank["zh"].version}


def test_what_is_held_is_counted_as_it_comes_and_goes(folder, monkeypatch):
    bank = AdapterBank(folder)
    for name in bank:
        bank.load(name)
    with monkeypatch.context() as patch:
        patch.setattr(bank_module, "_tensors", lambda module: pytest.fail("all tensors were walked"))
        assert bank.held_bytes == sum(entry.size_bytes for entry in bank.values())
    bank.remove("zh")
    assert bank.held_bytes == sum(entry.size_bytes for entry in bank.values())


def test_weights_first_read_in_inference_mode_can_be_trained(folder):
    bank = AdapterBank(folder)
    with torch.inference_mode():
        adapter = bank.load("zh")
    assert not any(m.lora_A.is_inference() or m.lora_B.is_inference() for m in adapter.modules.values())


def test_a_bank_is_a_mapping_of_adapters_to_fuse(folder, tmp_path):
    bank, base = AdapterBank(folder), tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = FusedModel.from_adapters(tmp_path / "base", bank, "average")
    assert model.adapter_names == list(bank)
    assert [adapter.digest for adapter in model.adapters] == [bank.load(name).digest for name in bank]
    model.save_pretrained(tmp_path / "fusion")
    again = FusedModel.from_pretrained(tmp_path / "fusion", adapters=bank)
    assert [adapter.digest for adapter in again.adapters] == [adapter.digest for adapter in model.adapters]


def test_threads_read_an_adapter_once(folder, monkeypatch):
    names = reads(monkeypatch)
    bank = AdapterBank(folder)
    found, start = [], threading.Barrier(6)

    def load(name):
        start.wait(60)
        found.append(bank.load(name))

    threads = [threading.Thread(target=load, args=(name,)) for name in ("zh", "math") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(names) == ["math", "zh"]
    assert len({id(adapter) for adapter in found}) == 2

"""A fusion on disk: it comes back as it was, from anywhere, after any crash, or says what is not as it was."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraflow import (
    AdapterCore,
    Arrow,
    Average,
    Centroid,
    FusedModel,
    Lag,
    LearnedStatic,
    Logo,
    LoraFlow,
    LoraHub,
    LoraRetriever,
    NormMax,
    Phatgoose,
    PromptFormat,
    QaFlora,
    Ramole,
    SpectR,
    Static,
)
from loraflow.adapters import tensors_digest
from loraflow.bases import base_record
from loraflow.core.layers import FusedDecoderLayer
from loraflow.errors import FusionError, LoraflowError
from loraflow.files import write_atomically
from loraflow.saved.fusion import fetch_fusion
from loraflow.saved.records import relative_source, resolve_source
from tests.tiny import (
    edit_config,
    edit_tensors,
    number_tokenizer,
    random_ids,
    save_adapter,
    set_random_gates,
    tiny_model,
)

FILES = {"fusion_config.json", "fusion.safetensors", "README.md"}
METHODS = [
    LoraFlow("step", 1.1),
    LoraFlow("layer", start={"zh": 0.25}),
    LoraFlow("module"),
    Average(),
    Static({"math": 0.4, "zh": -1}),
    Static([{"math": 0.4}, {"zh": -1}]),
    LoraFlow(reads="normalized", scorer="low-rank", width=4),
    LoraFlow(scorer="two-layer", activation="sigmoid"),
    LoraFlow(scorer="attention", top_k=1),
    LearnedStatic("task"),
    LearnedStatic("module"),
    AdapterCore("math"),
    LoraHub(),
    QaFlora("js"),
    Logo(),
    Centroid(layer=0),
    LoraRetriever("selection"),
    Arrow(1),
    SpectR(1),
    NormMax(),
    Lag(1, {"languages": ["zh"], "skills": ["math"]}),
    Phatgoose(),
    Ramole(3),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A base and two adapters on disk, to be copied."""
    root = tmp_path_factory.mktemp("prepared")
    base = tiny_model(num_hidden_layers=2)
    base.save_pretrained(root / "base")
    number_tokenizer().save_pretrained(root / "base")
    save_adapter(base, root / "adapters" / "zh", ["q_proj", "up_proj"], seed=1)
    save_adapter(base, root / "adapters" / "math", ["q_proj", "v_proj"], r=2, use_rslora=True, seed=2)
    return root


@pytest.fixture
def world(prepared, tmp_path):
    """A folder with `base`, `adapters/zh` and `adapters/math`."""
    return Path(shutil.copytree(prepared, tmp_path / "world"))


def make(world, method=None, seed=5, **options) -> FusedModel:
    """A fusion of that world's adapters, with random gates where it learns."""
    sources = {name: world / "adapters" / name for name in ("zh", "math")}
    model = FusedModel.from_adapters(world / "base", sources, method or LoraFlow(), **options)
    set_random_gates(model, seed)
    return model


@torch.no_grad()
def logits(model, weights=None):
    return model(random_ids(), fusion_weights=weights).logits


def saved(world, method=None, **options) -> Path:
    make(world, method).save_pretrained(world / "fusion", **options)
    return world / "fusion"


def files_of(directory) -> dict:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def config_of(fusion) -> dict:
    return json.loads((fusion / "fusion_config.json").read_text())


def edit_fusion(fusion, edit):
    """Change the configuration in both places where it is kept."""
    config = config_of(fusion)
    edit(config)
    (fusion / "fusion_config.json").write_text(json.dumps(config))
    tensors = load_file(fusion / "fusion.safetensors")
    save_file(tensors, fusion / "fusion.safetensors", metadata={"fusion_config": json.dumps(config)})


# ---- There and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.place}")
def test_a_fusion_comes_back_as_it_was(world, method):
    model = make(world, method, prompt=PromptFormat(template="Q: {prompt}"))
    model.training_record = {"examples": 200, "loss": 0.5}
    model.save_pretrained(world / "fusion")
    assert {path.name for path in (world / "fusion").iterdir()} == FILES
    again = FusedModel.from_pretrained(world / "fusion")
    weights = (None, None)
    if model.method.level == "query":
        weights = tuple(m.weigh(random_ids()) for m in (again, model))
        assert torch.equal(*weights)
    assert torch.equal(logits(again, weights[0]), logits(model, weights[1]))
    assert again.method == model.method
    assert again.adapter_names == ["zh", "math"]
    assert again.prompt == model.prompt
    assert again.training_record == model.training_record
    assert tensors_digest(again.state_dict()) == tensors_digest(model.state_dict())


def test_saving_leaves_the_model_as_it_was(world):
    model = make(world)
    before = logits(model)
    model.save_pretrained(world / "fusion", copy_adapters=True)
    assert torch.equal(logits(model), before)


def test_a_loaded_fusion_can_be_saved_again(world):
    again = FusedModel.from_pretrained(saved(world))
    again.save_pretrained(world / "elsewhere" / "again")
    assert torch.equal(logits(FusedModel.from_pretrained(world / "elsewhere" / "again")), logits(again))


def test_only_what_was_learned_is_in_the_file(world):
    tensors = load_file(saved(world) / "fusion.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"weight", "bias"}
    assert {name.rpartition(".")[0] for name in tensors} == {"layers.0", "layers.1"}
    assert sum(tensor.numel() for tensor in tensors.values()) == make(world).num_learned_parameters()


def test_the_card_says_what_was_fused(world):
    card = (saved(world, Static({"zh": 0.5})) / "README.md").read_text()
    for expected in (
        "| `zh` | `../adapters/zh` | - |",
        "| `math` |",
        "`static`",
        '{"weights": {"zh": 0.5}}',
        "library_name: loraflow",
    ):
        assert expected in card


def test_the_order_of_the_adapters_is_kept(world):
    fusion = saved(world, Average())
    assert [adapter["name"] for adapter in config_of(fusion)["adapters"]] == ["zh", "math"]


def test_other_weights_give_another_digest():
    one = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert tensors_digest(one) == tensors_digest(dict(reversed(one.items())))
    others = [{**one, "a": torch.ones(2)}, {"a": torch.zeros(2), "c": torch.zeros(2)}, {**one, "a": torch.zeros(2, 1)},
              {**one, "a": torch.zeros(2).half()}, {}]  # fmt: skip
    assert len({tensors_digest(tensors) for tensors in [one, *others]}) == 6


# ---- Places --------------------------------------------------------------------------------------------------------


def test_the_whole_tree_can_be_moved(world, tmp_path):
    fusion = saved(world)
    expected = logits(FusedModel.from_pretrained(fusion))
    assert str(tmp_path) not in (fusion / "fusion_config.json").read_text()
    assert str(tmp_path) not in (fusion / "README.md").read_text()
    with safe_open(fusion / "fusion.safetensors", "pt") as file:
        assert str(tmp_path) not in file.metadata()["fusion_config"]
    world.rename(tmp_path / "moved")
    assert torch.equal(logits(FusedModel.from_pretrained(tmp_path / "moved" / "fusion")), expected)


def test_the_working_directory_does_not_matter(world, monkeypatch):
    monkeypatch.chdir(world)
    sources = {"zh": "adapters/zh", "math": "adapters/math"}
    model = FusedModel.from_adapters("base", sources, "average")
    monkeypatch.chdir("/")
    model.save_pretrained(world / "fusion", copy_adapters=True)
    config = config_of(world / "fusion")
    assert config["base"]["path"] == "../base"
    for adapter in config["adapters"]:
        assert (world / "fusion" / adapter["path"]).is_relative_to(world / "fusion" / "adapters")
        assert (world / "fusion" / adapter["path"] / "adapter_config.json").is_file()


def test_with_its_adapters_in_it_the_fusion_alone_can_be_moved(world, tmp_path):
    fusion = saved(world, copy_adapters=True)
    expected = logits(make(world))
    fusion.rename(tmp_path / "alone")
    shutil.rmtree(world / "adapters")
    assert torch.equal(logits(FusedModel.from_pretrained(tmp_path / "alone", base=world / "base")), expected)


def test_a_copy_can_be_saved_over_itself(world):
    fusion = saved(world, copy_adapters=True)
    shutil.rmtree(world / "adapters")
    FusedModel.from_pretrained(fusion).save_pretrained(fusion, copy_adapters=True)
    assert torch.equal(logits(FusedModel.from_pretrained(fusion)), logits(FusedModel.from_pretrained(fusion)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda adapter: edit_tensors(adapter, lambda tensors: [t.mul_(2) for t in tensors.values()]),
            "digest differs",
        ),
        (lambda adapter: edit_config(adapter, lora_alpha=3), "digest differs"),
        (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"half"), "no whole adapter now"),
    ],
)
@pytest.mark.parametrize("older", [True, False])
def test_an_adapter_that_changed_on_disk_is_not_copied(world, change, why, older):
    model = make(world)
    if older:
        model.save_pretrained(world / "fusion", copy_adapters=True)
        expected = logits(FusedModel.from_pretrained(world / "fusion"))
    else:
        # The first adapter's copy is none that stays, either.
        (world / "fusion").mkdir()
    before = files_of(world / "fusion")
    set_random_gates(model, 9)
    change(world / "adapters" / "math")
    with pytest.raises(
        FusionError, match=rf"'math' cannot be copied .*adapters/math has changed since .*{why}\)\. Fuse"
    ):
        model.save_pretrained(world / "fusion", copy_adapters=True)
    assert files_of(world / "fusion") == before
    if older:
        assert torch.equal(logits(FusedModel.from_pretrained(world / "fusion")), expected)


def test_a_copy_that_changed_is_not_saved_over_itself(world):
    fusion = saved(world, copy_adapters=True)
    model = FusedModel.from_pretrained(fusion)
    edit_config(Path(model.adapters[0].source.path), lora_alpha=3)
    before = files_of(fusion)
    with pytest.raises(FusionError, match=r"'zh' cannot be copied into the fusion: .* has changed since it was loaded"):
        model.save_pretrained(fusion, copy_adapters=True)
    assert files_of(fusion) == before


def test_base_and_adapters_may_be_elsewhere(world, tmp_path):
    fusion = saved(world)
    (world / "adapters" / "zh").rename(tmp_path / "chinese")
    (world / "base").rename(tmp_path / "llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    model = FusedModel.from_pretrained(fusion, base=base, adapters={"zh": tmp_path / "chinese"})
    assert model.adapter_names == ["zh", "math"]


def test_an_adapter_that_is_gone_is_named_with_its_place(world, monkeypatch):
    fusion = saved(world, copy_adapters=True)
    shutil.rmtree(fusion / "adapters")
    asked = []
    monkeypatch.setattr(
        "loraflow.adapters.files.hf_hub_download", lambda *args, **kwargs: asked.append(args) or str(fusion / "none")
    )
    with contextlib.suppress(OSError), pytest.raises(LoraflowError, match=r"adapters/zh.* is not a directory"):
        FusedModel.from_pretrained(fusion)
    assert asked == [], "a path within the fusion must not turn into the id of somebody's repository"


def test_a_base_that_was_handed_over_is_asked_for_again(prepared, world):
    base = tiny_model(num_hidden_layers=2)
    model = FusedModel.from_adapters(base, {"zh": world / "adapters" / "zh"}, "average")
    model.save_pretrained(world / "fusion")
    assert config_of(world / "fusion")["base"]["path"] == ""
    with pytest.raises(FusionError, match="`base`"):
        FusedModel.from_pretrained(world / "fusion")
    again = FusedModel.from_pretrained(world / "fusion", base=tiny_model(num_hidden_layers=2))
    assert torch.equal(logits(again), logits(model))


names = st.text("abc-_.", min_size=1, max_size=4).filter(lambda name: name.strip("."))


@settings(max_examples=40)
@given(target=st.lists(names, min_size=1, max_size=3), fusion=st.lists(names, min_size=1, max_size=3))
def test_recorded_paths_lead_back(tmp_path_factory, target, fusion):
    root = tmp_path_factory.mktemp("paths")
    target, fusion = root.joinpath("t", *target), root.joinpath("f", *fusion)
    for path in (target, fusion):
        path.mkdir(parents=True, exist_ok=True)
    recorded = relative_source(str(target), fusion)
    assert not Path(recorded).is_absolute()
    assert Path(resolve_source(recorded, fusion)).samefile(target)


@pytest.mark.parametrize("path", ["user/repo", "user/repo/zh", ""])
def test_ids_are_recorded_as_they_are(tmp_path, path):
    assert relative_source(path, tmp_path) == path
    assert resolve_source(path, tmp_path) == path


# ---- Crashes -------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for a power cut: nothing catches it."""


def crash(monkeypatch, number, save, *args, **kwargs):
    """Save, with the power cut when the `number`-th file would be replaced."""
    replace, calls = os.replace, []

    def replace_or_crash(source, target):
        calls.append(target)
        if len(calls) > number:
            raise Crash
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("loraflow.files.os.replace", replace_or_crash)
        with pytest.raises(Crash):
            save(*args, **kwargs)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LoraFlow(), LoraFlow()),
        (LoraFlow(), LoraFlow("module")),
        (LoraFlow("step"), Average()),
        (Static({"zh": 1}), Average()),
    ],
)
def test_a_crash_while_saving_leaves_the_old_fusion_or_the_new(world, monkeypatch, old, new, number):
    before, after = make(world, old, seed=1), make(world, new, seed=2)
    before.save_pretrained(world / "fusion")
    crash(monkeypatch, number, after.save_pretrained, world / "fusion")
    found = FusedModel.from_pretrained(world / "fusion")
    whole = before if found.method == before.method and torch.equal(logits(found), logits(before)) else after
    assert found.method == whole.method
    assert torch.equal(logits(found), logits(whole))
    assert tensors_digest(found.state_dict()) == tensors_digest(whole.state_dict())
    after.save_pretrained(world / "fusion")
    assert torch.equal(logits(FusedModel.from_pretrained(world / "fusion")), logits(after))
    assert {path.name for path in (world / "fusion").iterdir()} == FILES


@pytest.mark.parametrize("number", range(11))
def test_a_crash_while_copying_other_adapters_leaves_the_old_fusion_or_the_new(world, monkeypatch, number):
    before = make(world, Average())
    before.save_pretrained(world / "fusion", copy_adapters=True)
    edit_tensors(world / "adapters" / "zh", lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
    edit_config(world / "adapters" / "math", lora_alpha=3)
    after = make(world, Average())
    crash(monkeypatch, number, after.save_pretrained, world / "fusion", copy_adapters=True)
    found = logits(FusedModel.from_pretrained(world / "fusion"))
    assert torch.equal(found, logits(before)) or torch.equal(found, logits(after))


def test_a_crash_at_the_first_save_leaves_no_fusion(world, monkeypatch):
    crash(monkeypatch, 0, saved, world)
    with pytest.raises(FusionError, match=r"has no fusion\.safetensors\. Is it a saved fusion\?"):
        FusedModel.from_pretrained(world / "fusion")


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    crash(monkeypatch, 0, write_atomically, path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_is_a_file_is_refused(world):
    (world / "fusion").write_text("")
    with pytest.raises(FusionError, match=r"fusion is a file\. Give a directory\."):
        saved(world)


# ---- What is not as it was -----------------------------------------------------------------------------------------


def refusal(fusion, **options) -> str:
    with pytest.raises(FusionError) as caught:
        FusedModel.from_pretrained(fusion, **options)
    return str(caught.value)


def test_a_changed_adapter_is_refused(world):
    fusion = saved(world)
    edit_config(world / "adapters" / "zh", lora_alpha=9)
    message = refusal(fusion)
    assert re.search(r"Adapter 'zh' \(.*adapters/zh\) is not the one that the fusion '.*' was made with", message)
    assert re.search(r"digest sha256:\w{12}\.\.\., not sha256:\w{12}\.\.\. Restore it, or fit again\.", message)


def test_swapped_adapters_are_refused(world):
    moved = {"zh": world / "adapters" / "math", "math": world / "adapters" / "zh"}
    assert "'zh'" in refusal(saved(world), adapters=moved)


def test_an_unknown_adapter_is_refused(world):
    assert "has no adapter 'code'; it has ['zh', 'math']." in refusal(saved(world), adapters={"code": "x"})


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (("llama", {"vocab_size": 60}), r"fusion was made with '.*base' \(vocab_size=64\), but '' has vocab_size=60"),
        (
            ("mistral", {}),
            r"\(model_type=llama\), but '' has model_type=mistral\. Give the base that it was made with\.",
        ),
    ],
)
def test_a_base_of_another_shape_is_refused(world, other, expected):
    architecture, changes = other
    other = tiny_model(architecture, **{"num_hidden_layers": 2, **changes})
    assert re.search(expected, refusal(saved(world), base=other))


def test_a_base_with_other_weights_is_refused_and_left_as_it_was(world):
    other = tiny_model(seed=7, num_hidden_layers=2)
    assert re.search(
        r"Wrong base model: '.*' has the shape of '.*base', but other weights", refusal(saved(world), base=other)
    )
    assert not any(isinstance(module, FusedDecoderLayer) for module in other.modules())


def test_another_precision_is_no_other_base(world):
    fusion = saved(world)
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.bfloat16)
    assert FusedModel.from_pretrained(fusion, base=base).dtype == torch.bfloat16


def test_the_bases_digest_is_of_every_parameter():
    base = tiny_model(num_hidden_layers=2)
    before = base_record(base)
    assert base_record(copy.deepcopy(base)) == before
    for parameter in base.parameters():
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01)
        assert base_record(base).digest != before.digest
        parameter.data = old
    assert base_record(base) == before
    assert base_record(base.to("meta")).digest is None


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda c: c.update(format_version=2),
            "has format_version 2; this loraflow reads 1. Install a matching version.",
        ),
        (lambda c: c.pop("format_version"), "has format_version None; this loraflow reads 1."),
        (lambda c: c["method"].update(name="telepathy"), "cannot make: Unknown method 'telepathy'. Known: "),
        (lambda c: c.pop("base"), "`base`: Field required. Restore it, or save the fusion again."),
        (lambda c: c["base"].update(hidden_size="wide"), "`base.hidden_size`: Input should be a valid integer"),
        (lambda c: c.update(added_by_hand=1), "`added_by_hand`: Extra inputs are not permitted"),
        (
            lambda c: c.update(weights_digest="sha256:0"),
            "is not what fusion_config.json beside it describes (its digest differs).",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(world, edit, expected):
    fusion = saved(world)
    edit_fusion(fusion, edit)
    assert expected in refusal(fusion)


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe{}"])
def test_a_damaged_configuration_is_refused(world, content):
    fusion = saved(world)
    (fusion / "fusion_config.json").write_bytes(content)
    message = refusal(fusion)
    assert "fusion_config.json" in message
    assert "is not valid JSON" in message
    assert "Restore it, or save the fusion again." in message


def test_a_lost_configuration_is_found_beside_the_weights(world):
    fusion = saved(world)
    (fusion / "fusion_config.json").unlink()
    assert torch.equal(logits(FusedModel.from_pretrained(fusion)), logits(make(world)))


def test_changed_weights_are_refused(world):
    fusion = saved(world)
    tensors = load_file(fusion / "fusion.safetensors")
    tensors["layers.0.bias"] += 1
    save_file(tensors, fusion / "fusion.safetensors")
    assert "its digest differs" in refusal(fusion)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_damaged_weights_file_is_refused(world, keep):
    fusion = saved(world)
    content = (fusion / "fusion.safetensors").read_bytes()
    (fusion / "fusion.safetensors").write_bytes(content[:keep])
    assert "fusion.safetensors is not a readable safetensors file" in refusal(fusion)


def test_missing_weights_are_refused(world):
    fusion = saved(world)
    (fusion / "fusion.safetensors").unlink()
    assert "has no fusion.safetensors. Is it a saved fusion?" in refusal(fusion)


def test_weights_of_another_method_are_refused(world):
    fusion = saved(world)
    edit_fusion(fusion, lambda config: config["method"]["parameters"].update(granularity="step"))
    assert "The learned tensors do not match the method 'lora-flow': 'layers.0.bias' is missing" in refusal(fusion)


# ---- The Hub -------------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands for `HfApi` and `snapshot_download`, with one repository."""

    def __init__(self, root: Path) -> None:
        self.root, self.created = root, []

    def api(self, token=None):
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.created.append((repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://huggingface.co/{repo_id}"

    def snapshot(self, repo_id, revision=None):
        return str(self.root / repo_id)


def test_a_pushed_fusion_is_whole(world, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("loraflow.model.HfApi", hub.api)
    monkeypatch.setattr("loraflow.saved.fusion.snapshot_download", hub.snapshot)
    model = make(world)
    assert model.push_to_hub("fusion", private=True) == "https://huggingface.co/me/fusion"
    assert hub.created == [("fusion", True, True)]
    shutil.rmtree(world / "adapters")
    again = FusedModel.from_pretrained("me/fusion", base=world / "base")
    assert torch.equal(logits(again), logits(model))
    # The Hub refuses a card whose base model is no id.
    card = (tmp_path / "hub" / "me" / "fusion" / "README.md").read_text()
    assert ".." not in card.split("---")[1]


def test_what_cannot_be_saved_leaves_no_repository(world, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("loraflow.model.HfApi", hub.api)
    model = make(world)
    edit_config(world / "adapters" / "zh", lora_alpha=3)
    with pytest.raises(FusionError, match="'zh' cannot be copied into the fusion"):
        model.push_to_hub("fusion")
    assert hub.created == []


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("offline"), HFValidationError("bad id"), OSError("disk full")]
)
def test_trouble_with_the_hub_is_reported(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("loraflow.saved.fusion.snapshot_download", fail)
    with pytest.raises(FusionError, match=f"'me/fusion' is no directory here, and the Hub gives: {error}"):
        fetch_fusion("me/fusion", None)


def test_a_place_where_nothing_is_is_refused(tmp_path):
    with pytest.raises(
        FusionError, match=r"There is no fusion at '.*nowhere'\. Give a directory written by `save_pretrained`"
    ):
        fetch_fusion(tmp_path / "nowhere", None)

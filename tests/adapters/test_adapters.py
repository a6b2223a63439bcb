"""Adapters as PEFT writes them: what is read gives PEFT's logits, and what cannot be fused is refused with a remedy."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model

from loraflow import FusedModel
from loraflow.adapters import Adapter, AdapterSource, load_adapter, match_adapter
from loraflow.adapters.config import REFUSED, Settings
from loraflow.errors import AdapterError
from tests.adapters.checks import Q0, assert_gives_what_peft_gives, fused_alone, refusal
from tests.tiny import (
    ALL_LLAMA,
    edit_config,
    edit_tensors,
    peft_model,
    random_ids,
    relative_error,
    save_adapter,
    tiny_model,
)

# ---- What PEFT gives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "config"),
    [
        (ALL_LLAMA, {"use_rslora": True}),
        (ALL_LLAMA, {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}}),
        (ALL_LLAMA, {"alpha_pattern": {"v_proj": 3, r"^model\.layers\.0\.self_attn\.q_proj": 5}}),
        (ALL_LLAMA, {"rank_pattern": {"proj": 1}, "alpha_pattern": {r".*\.down_proj": 1}, "use_rslora": True}),
        (ALL_LLAMA, {"lora_bias": True, "rank_pattern": {"o_proj": 1}}),
        (ALL_LLAMA, {"layers_to_transform": [0, 2]}),
        (ALL_LLAMA, {"layers_to_transform": 1}),
        (ALL_LLAMA, {"layers_to_transform": [1], "layers_pattern": "layers"}),
        (ALL_LLAMA, {"exclude_modules": ["v_proj", "mlp.up_proj"]}),
        (ALL_LLAMA, {"exclude_modules": r".*\.0\..*"}),
        (r".*\.(q|down)_proj", {}),
        (["layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"], {}),
        ("all-linear", {}),
        (ALL_LLAMA, {"use_dora": True, "use_rslora": True, "rank_pattern": {"k_proj": 1}}),
        (ALL_LLAMA, {"lora_dropout": 0.5}),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_one_adapter_gives_what_peft_gives(base, tmp_path, targets, config):
    assert_gives_what_peft_gives(base, save_adapter(base, tmp_path, targets, **config))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "lora_bias"])
def test_conv1d_gives_what_peft_gives(tmp_path, config):
    base = tiny_model("gpt2")
    assert_gives_what_peft_gives(base, save_adapter(base, tmp_path, fan_in_fan_out=True, **config))


def test_all_linear_as_peft_records_it_is_resolved_on_the_base(base, tmp_path):
    directory = save_adapter(base, tmp_path, "all-linear")
    edit_config(directory, target_modules="all-linear")
    assert_gives_what_peft_gives(base, directory)


def test_matching_leaves_the_adapter_as_it_was(base, tmp_path):
    directory = save_adapter(base, tmp_path, "all-linear")
    edit_config(directory, target_modules="all-linear")
    adapter = load_adapter("one", directory)
    match_adapter(adapter, base)
    assert adapter.config.target_modules == "all-linear"


@settings(max_examples=8)
@given(
    targets=st.sets(st.sampled_from(ALL_LLAMA), min_size=1),
    r=st.integers(1, 9),
    alpha=st.integers(1, 32),
    use_rslora=st.booleans(),
    kind=st.sampled_from(["plain", "dora", "lora_bias"]),
)
def test_any_plain_rslora_or_dora_adapter_gives_what_peft_gives(
    base, tmp_path_factory, targets, r, alpha, use_rslora, kind
):
    config = {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "use_dora": kind == "dora",
        "lora_bias": kind == "lora_bias",
    }
    directory = save_adapter(base, tmp_path_factory.mktemp("any"), sorted(targets), **config)
    assert_gives_what_peft_gives(base, directory)


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_in_bfloat16_the_error_is_of_the_size_of_pefts(tmp_path, config):
    base = tiny_model(dtype=torch.bfloat16)
    directory = save_adapter(base, tmp_path, **config)
    truth = peft_model(tiny_model(dtype=torch.bfloat16).double(), directory)
    ids = random_ids(4, 32)
    expected = truth(ids).logits
    assert expected.dtype == torch.float64

    def error(model):
        return (model(ids).logits.double() - expected).square().mean().sqrt()

    assert error(fused_alone(base, directory)) <= 2 * error(peft_model(base, directory))


def test_an_adapter_knows_its_size(base, tmp_path):
    directory = save_adapter(base, tmp_path, ["q_proj", "v_proj"], r=4, rank_pattern={"v_proj": 2}, lora_bias=True)
    adapter = load_adapter("one", directory)
    model = peft_model(base, directory)
    assert adapter.parameters == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert adapter.ranks == (2, 4)
    assert not adapter.uses_dora
    assert adapter.source == AdapterSource(directory)
    assert {module.scaling for module in adapter.modules.values()} == {2.0, 4.0}


def test_a_dora_adapter_says_so(base, tmp_path):
    assert load_adapter("one", save_adapter(base, tmp_path, ["q_proj"], use_dora=True)).uses_dora


# ---- What is refused ---------------------------------------------------------------------------------------------


def test_a_missing_directory_is_refused(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert f"{str(tmp_path / 'nowhere')!r} is not a directory" in message
    assert "'user/repo'" in message


def test_a_revision_of_a_directory_is_refused(saved):
    assert "a revision ('main') needs a Hub id" in refusal(AdapterSource(saved, "main"))


def test_a_directory_without_configuration_is_refused(tmp_path):
    assert "has no adapter_config.json. Is it a PEFT adapter?" in refusal(tmp_path)


def test_the_subfolders_that_are_adapters_are_named(base, tmp_path):
    save_adapter(base, tmp_path / "zh", ["q_proj"])
    save_adapter(base, tmp_path / "en", ["q_proj"])
    assert "Its subfolders ['en', 'zh'] have one: give one of those." in refusal(tmp_path)


def test_missing_weights_are_refused(saved):
    (Path(saved) / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors. Save the adapter again." in refusal(saved)


def test_pickled_weights_are_refused_unread(saved):
    (Path(saved) / "adapter_model.safetensors").unlink()
    (Path(saved) / "adapter_model.bin").write_bytes(b"never to be unpickled")
    message = refusal(saved)
    assert "pickled weights (adapter_model.bin) can run code and are not read" in message
    assert "`save_pretrained`" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_a_damaged_configuration_is_refused(saved, content, expected):
    (Path(saved) / "adapter_config.json").write_bytes(content)
    assert expected in refusal(saved)


def test_a_damaged_weights_file_is_refused(saved):
    (Path(saved) / "adapter_model.safetensors").write_bytes(b"not safetensors")
    assert "is not a readable safetensors file" in refusal(saved)


def test_a_weights_file_that_goes_while_it_is_opened_is_refused(saved, monkeypatch):
    def gone(path):
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr("loraflow.adapters.files.load_file", gone)
    assert "is not a readable safetensors file" in refusal(saved)


def test_a_configuration_that_peft_refuses_is_refused(saved):
    edit_config(saved, target_modules="all-linear", layers_to_transform=[1])
    assert "PEFT cannot read" in refusal(saved)


def test_an_adapter_of_another_kind_is_refused(base, tmp_path):
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "`peft_type` = 'IA3': only 'LORA' adapters can be fused" in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` = 'pissa': this initialisation changed the base weights"),
        ({"init_lora_weights": "pissa_niter_2"}, "`init_lora_weights` = 'pissa_niter_2': this initialisation changed"),
        ({"init_lora_weights": "olora"}, "`init_lora_weights` = 'olora': this initialisation changed the base weights"),
        ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens` = [1, 2]: an aLoRA acts only after"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "`layer_replication` = [[0, 2], [1, 3]]: it repeats decoder layers"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices` = [1]: it replaces token embeddings"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_peft_saves_but_cannot_be_fused_is_refused(base, tmp_path, config, expected):
    assert expected in refusal(save_adapter(base, tmp_path, ["q_proj"], **config))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "XLORA"}, "only 'LORA' adapters"),
        ({"init_lora_weights": "corda"}, "`init_lora_weights` = 'corda': this initialisation changed"),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights` = 'loftq': this initialisation changed"),
        ({"init_lora_weights": "lora_ga"}, "`init_lora_weights` = 'lora_ga': this initialisation changed"),
        ({"arrow_config": {"top_k": 3}}, "it is a PEFT Arrow router, not an adapter"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA changed the base weights"),
        ({"megatron_config": {"x": 1}}, "Megatron's parallel layers"),
        ({"monteclora_config": {"x": 1}}, "MonteCLoRA samples its weights"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA's block-diagonal factors"),
        ({"use_qalora": True}, "QALoRA pools its input by groups"),
        ({"velora_config": {"x": 1}}, "VeLoRA is not supported"),
        ({"use_lora_of_2031": True}, "`use_lora_of_2031` = True: this setting is unknown to this version of loraflow"),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_be_fused_are_refused(saved, config, expected):
    edit_config(saved, **config)
    assert expected in refusal(saved)


def test_every_setting_that_peft_can_save_is_known():
    """A new version of PEFT brings new settings: each is to be judged before it is let in or refused by name."""
    assert LoraConfig.__dataclass_fields__.keys() <= Settings.model_fields.keys() | REFUSED.keys()
    assert Settings.model_fields.keys() & REFUSED.keys() == set()


def test_unknown_settings_that_are_off_are_harmless(base, saved):
    edit_config(saved, use_lora_of_2031=False, of_2032=None, of_2033=[])
    assert_gives_what_peft_gives(base, saved)


@pytest.mark.parametrize(
    "config", [{"corda_config": {"corda_method": "ipm"}}, {"lora_ga_config": {"direction": "ArB2r"}}]
)
def test_an_adapter_converted_by_pefts_remedy_is_fused(base, saved, config):
    # The conversion that the refusal recommends sets `init_lora_weights` to true, but leaves the other settings there.
    edit_config(saved, init_lora_weights=True, **config)
    assert_gives_what_peft_gives(base, saved)


def test_pissa_converted_as_the_refusal_says_is_fused(base, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="pissa")
        )
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model.eval()(random_ids()).logits
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with torch.no_grad():
        assert relative_error(fused_alone(base, tmp_path / "end")(random_ids()).logits, expected) < 1e-5


def test_a_file_without_weights_is_refused(saved):
    edit_tensors(saved, dict.clear)
    assert "holds no LoRA weights" in refusal(saved)


def test_another_rank_than_the_configurations_is_refused(saved):
    edit_config(saved, r=8)
    message = refusal(saved)
    assert re.search(r"has lora_A \(4, 32\) and lora_B \(\d+, 4\) in .*, but adapter_config.json says rank 8", message)


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_a_missing_factor_is_refused(saved, part):
    edit_tensors(saved, lambda tensors: tensors.pop(f"{Q0}.{part}"))
    assert f"lacks '{Q0}.{part.removesuffix('.weight')}'" in refusal(saved)


@pytest.mark.parametrize(
    ("config", "part"), [({"use_dora": True}, "lora_magnitude_vector"), ({"lora_bias": True}, "lora_B.bias")]
)
def test_parts_and_settings_must_agree(base, tmp_path, config, part):
    directory = save_adapter(base, tmp_path, ["q_proj"], **config)
    edit_config(directory, **dict.fromkeys(config, False))
    assert f"{part}' in" in refusal(directory)
    edit_config(directory, **config)
    edit_tensors(directory, lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key])
    assert f"{part}'. Save the adapter again." in refusal(directory)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("config", "part"), [({"use_dora": True}, "lora_magnitude_vector"), ({"lora_bias": True}, "lora_B.bias")]
)
def test_vectors_of_another_length_are_refused(base, tmp_path, config, part):
    directory = save_adapter(base, tmp_path, ["q_proj"], **config)

    def shorten(tensors):
        for key in tensors:
            if part in key:
                tensors[key] = tensors[key][:1].clone()

    edit_tensors(directory, shorten)
    assert part in refusal(directory, base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_values_that_are_not_finite_are_refused(saved, value, part):
    edit_tensors(saved, lambda tensors: tensors[f"{Q0}.{part}.weight"].view(-1)[3:4].fill_(value))
    assert f"'model.layers.0.self_attn.q_proj.{part}' in" in (message := refusal(saved))
    assert "holds NaN or infinite values" in message


def test_an_untrained_adapter_is_refused(base, tmp_path):
    assert "changes nothing: every `lora_B.weight`" in refusal(save_adapter(base, tmp_path, init_lora_weights=True))


def test_one_module_that_is_zero_is_no_untrained_adapter(base, saved):
    edit_tensors(saved, lambda tensors: tensors[f"{Q0}.lora_B.weight"].zero_())
    assert_gives_what_peft_gives(base, saved)


def test_an_adapter_of_another_shape_is_refused(base, tmp_path):
    other = save_adapter(base, tmp_path, ["q_proj"])
    edit_config(other, base_model_name_or_path="meta/other")
    edit_tensors(other, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.randn(4, 40)}))
    message = refusal(other, base)
    assert "'model.layers.0.self_attn.q_proj' maps 40 to 32 features, but the base's maps 32 to 32" in message
    assert "'meta/other'" in message


def test_a_key_that_matches_nothing_is_refused_with_the_nearest(base, saved):
    def rename(tensors):
        for part in ("lora_A", "lora_B"):
            tensors[f"{Q0.replace('q_proj', 'q_prj')}.{part}.weight"] = tensors.pop(f"{Q0}.{part}.weight")

    edit_tensors(saved, rename)
    message = refusal(saved, base)
    assert "q_prj.lora_A.weight' matches no linear module of LlamaForCausalLM." in message
    assert "The nearest is 'model.layers.0.self_attn.q_proj'." in message


def test_an_adapter_of_another_architecture_is_refused(base, tmp_path):
    other = save_adapter(tiny_model("gpt2"), tmp_path, fan_in_fan_out=True)
    assert "Is it an adapter of another base model?" in refusal(other, base)


def test_an_incomplete_file_is_refused(base, saved):
    edit_tensors(saved, lambda tensors: [tensors.pop(f"{Q0}.{part}.weight") for part in ("lora_A", "lora_B")])
    message = refusal(saved, base)
    assert "`target_modules` of adapter_config.json includes 'model.layers.0.self_attn.q_proj' (1 such)" in message
    assert "adapter_model.safetensors has no weights for it" in message


def test_a_refused_adapter_leaves_the_base_untouched(base, tmp_path):
    model = copy.deepcopy(base)
    with pytest.raises(AdapterError, match="lm_head"):
        FusedModel.from_adapters(model, {"one": save_adapter(base, tmp_path, ["lm_head"])})
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- Digest --------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_weights_and_scaling(base, saved):
    before = load_adapter("one", saved).digest
    assert re.fullmatch("sha256:[0-9a-f]{64}", before)
    edit_config(saved, lora_alpha=9)
    other_alpha = load_adapter("one", saved).digest
    edit_config(saved, lora_alpha=8)
    edit_tensors(saved, lambda tensors: tensors[f"{Q0}.lora_A.weight"].view(-1)[0:1].add_(1e-3))
    assert len({before, other_alpha, load_adapter("one", saved).digest}) == 3


def test_the_digest_outlives_saving_again(base, saved, tmp_path):
    before = load_adapter("one", saved).digest
    model = peft_model(base, saved)
    model.peft_config["default"].lora_dropout = 0.3
    model.save_pretrained(tmp_path / "again")
    assert load_adapter("two", tmp_path / "again").digest == before


def test_the_digest_outlives_saving_again_by_a_newer_peft(base, saved):
    # PEFT before 0.9 wrote neither of these; saving again writes them with their defaults.
    before = load_adapter("one", saved).digest
    edit_config(saved, use_rslora=..., use_dora=..., lora_bias=..., rank_pattern=..., alpha_pattern=...)
    assert load_adapter("one", saved).digest == before


# ---- Sources and the Hub -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/repo", AdapterSource("user/repo")),
        ("user/repo@v1.0", AdapterSource("user/repo", "v1.0")),
        ("user/repo/sub/folder@main", AdapterSource("user/repo/sub/folder", "main")),
        (Path("user/repo"), AdapterSource("user/repo")),
        (AdapterSource("a/b", "c"), AdapterSource("a/b", "c")),
    ],
)
def test_sources_are_parsed(text, expected):
    assert AdapterSource.parse(text) == expected
    assert not expected.is_local


def test_a_directory_may_have_an_at_sign_in_its_name(tmp_path):
    (tmp_path / "me@home").mkdir()
    assert AdapterSource.parse(tmp_path / "me@home") == AdapterSource(str(tmp_path / "me@home"))


@pytest.mark.parametrize("path", ["/somewhere/else", "./adapters/math", "../math", "~/math", "math"])
def test_paths_are_local_even_where_nothing_is(path):
    assert AdapterSource.parse(path).is_local


class FakeHub:
    """`hf_hub_download` from a directory laid out like the cache, with one adapter at its root and in `zh`."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root: Path, adapter: str) -> None:
        self.calls: list[dict] = []
        self.errors: dict[str, Exception] = {}
        self.snapshot = root / "models--user--repo" / "snapshots" / self.COMMIT
        for folder in (self.snapshot, self.snapshot / "zh"):
            folder.mkdir(parents=True)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (folder / file).write_bytes((Path(adapter) / file).read_bytes())

    def __call__(self, repo_id, filename, *, subfolder=None, revision=None):
        self.calls.append({"repo_id": repo_id, "filename": filename, "subfolder": subfolder, "revision": revision})
        if filename in self.errors:
            raise self.errors[filename]
        return str(self.snapshot / (subfolder or "") / filename)


@pytest.fixture
def hub(monkeypatch, saved, tmp_path):
    fake = FakeHub(tmp_path / "hub", saved)
    monkeypatch.setattr("loraflow.adapters.files.hf_hub_download", fake)
    return fake


@pytest.mark.parametrize(
    ("source", "subfolder", "revision"),
    [("user/repo", None, None), ("user/repo/zh", "zh", None), ("user/repo/zh@v1", "zh", "v1")],
)
def test_hub_ids_are_read_with_their_commit(hub, saved, source, subfolder, revision):
    adapter = load_adapter("one", source)
    assert isinstance(adapter, Adapter)
    assert adapter.source == AdapterSource(source.partition("@")[0], hub.COMMIT)
    assert adapter.digest == load_adapter("one", saved).digest
    assert hub.calls[0] == {
        "repo_id": "user/repo",
        "filename": "adapter_config.json",
        "subfolder": subfolder,
        "revision": revision,
    }


def test_both_files_are_of_one_commit(hub):
    load_adapter("one", "user/repo@main")
    assert hub.calls[1]["revision"] == hub.COMMIT, "a push between the two downloads would mix two versions"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_unreachable_hub_is_reported(hub, file):
    hub.errors[file] = LocalEntryNotFoundError("offline")
    message = refusal("user/repo")
    assert "'user/repo' on the Hugging Face Hub cannot be reached and is not in the local cache" in message
    assert "Check the network, or give a directory" in message


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_other_trouble_with_the_hub_is_reported(hub, file):
    hub.errors[file] = OSError("disk full")
    assert "'user/repo' on the Hugging Face Hub cannot be read: disk full" in refusal("user/repo")


def test_a_repository_without_configuration_is_refused(hub):
    hub.errors["adapter_config.json"] = EntryNotFoundError("404")
    assert "has no adapter_config.json. Is it a PEFT adapter, or in a subfolder?" in refusal("user/repo")


def test_a_repository_with_pickled_weights_is_refused(hub):
    hub.errors["adapter_model.safetensors"] = EntryNotFoundError("404")
    assert "pickled weights (adapter_model.bin) can run code and are not read" in refusal("user/repo")


def test_a_malformed_id_is_refused(hub):
    hub.errors["adapter_config.json"] = HFValidationError("bad id")
    assert "cannot be read: bad id" in refusal("user//repo")

"""`adapter_config.json`: each setting by its type, and other trainers' files by their names."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loraflow import FusedModel
from loraflow.adapters import load_adapter
from loraflow.adapters.config import REFUSED, Settings
from loraflow.errors import AdapterError
from tests.adapters.checks import assert_gives_what_peft_gives, refusal
from tests.tiny import ALL_LLAMA, edit_config, edit_tensors, random_ids, save_adapter

ALPHA = "must be a finite number other than 0"
FLAG = "must be true or false"
RANK = "must be a whole number of at least 1"


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("lora_alpha", float("nan"), f"(=nan) in PATH {ALPHA} (it is not finite). Correct it there"),
        ("lora_alpha", float("inf"), f"(=inf) in PATH {ALPHA}"),
        ("lora_alpha", -float("inf"), f"(=-inf) in PATH {ALPHA}"),
        ("lora_alpha", 1e39, f"(=1e+39) in PATH {ALPHA}"),
        ("lora_alpha", 10**400, f"in PATH {ALPHA}"),
        ("lora_alpha", 0, f"(=0) in PATH {ALPHA} (with 0 the adapter changes nothing)"),
        ("lora_alpha", "16", f"(='16') in PATH {ALPHA}"),
        ("lora_alpha", None, f"(=None) in PATH {ALPHA}"),
        ("lora_alpha", True, f"(=True) in PATH {ALPHA}"),
        ("lora_alpha", [16], f"(=[16]) in PATH {ALPHA}"),
        ("r", True, f"(=True) in PATH {RANK}"),
        ("r", "8", f"(='8') in PATH {RANK}"),
        ("r", 0, f"(=0) in PATH {RANK}"),
        ("r", -4, f"(=-4) in PATH {RANK}"),
        ("r", 4.0, f"(=4.0) in PATH {RANK}"),
        ("r", None, f"(=None) in PATH {RANK}"),
        ("use_rslora", "false", f"(='false') in PATH {FLAG}"),
        ("use_rslora", 0, f"(=0) in PATH {FLAG}"),
        ("use_dora", "False", f"(='False') in PATH {FLAG}"),
        ("lora_bias", 1, f"(=1) in PATH {FLAG}"),
        ("fan_in_fan_out", "true", f"(='true') in PATH {FLAG}"),
        ("rank_pattern", [4], "(=[4]) in PATH must be an object of ranks"),
        ("rank_pattern", {"q_proj": 0}, "(={'q_proj': 0}) in PATH must be an object of ranks"),
        ("rank_pattern", {"q_proj": "4"}, "(={'q_proj': '4'}) in PATH must be an object of ranks"),
        ("rank_pattern", {"*": 4}, "('*' is no regular expression: "),
        ("alpha_pattern", 16, "(=16) in PATH must be an object of finite numbers"),
        ("alpha_pattern", "16", "(='16') in PATH must be an object of finite numbers"),
        ("alpha_pattern", {"q_proj": float("nan")}, "(={'q_proj': nan}) in PATH must be an object of finite numbers"),
        ("alpha_pattern", {"q_proj": None}, "(={'q_proj': None}) in PATH must be an object of finite numbers"),
        ("alpha_pattern", {"q_proj": [1]}, "(={'q_proj': [1]}) in PATH must be an object of finite numbers"),
        ("alpha_pattern", {"(q": 4}, "('(q' is no regular expression: "),
        ("target_modules", ".*(q_proj", "('.*(q_proj' is no regular expression: missing ), unterminated subpattern"),
        ("target_modules", [1, 2], "(=[1, 2]) in PATH must be a list of module names, or one regular expression"),
        ("target_modules", {"q_proj": 1}, "(={'q_proj': 1}) in PATH must be a list of module names"),
        ("target_modules", 3, "(=3) in PATH must be a list of module names"),
        ("exclude_modules", "*", "('*' is no regular expression: nothing to repeat"),
        ("exclude_modules", [None], "(=[None]) in PATH must be a list of module names"),
        ("layers_to_transform", "0", "(='0') in PATH must be a layer's index, or a list of them"),
        ("layers_to_transform", [True], "(=[True]) in PATH must be a layer's index, or a list of them"),
        ("layers_to_transform", [-1], "(=[-1]) in PATH must be a layer's index, or a list of them"),
        ("layers_to_transform", {"0": 1}, "(={'0': 1}) in PATH must be a layer's index, or a list of them"),
        ("layers_pattern", "(?P<idx>layers)", "is no regular expression: redefinition of group name 'idx'"),
        ("layers_pattern", ["["], "('[' is no regular expression: "),
        ("target_parameters", "experts.down_proj", "(='experts.down_proj') in PATH must be a list of parameter names"),
        ("modules_to_save", "lm_head", "(='lm_head') in PATH must be a list of module names, or null"),
        ("modules_to_save", ["(head"], "(=['(head']) in PATH must be a list of module names, or null ('(head' is no"),
        ("bias", None, "(=None) in PATH must be 'none', 'all' or 'lora_only'"),
        ("bias", "some", "(='some') in PATH must be 'none', 'all' or 'lora_only'"),
        ("lora_dropout", "0.1", "(='0.1') in PATH must be a number from 0 to 1"),
        ("lora_dropout", 1.5, "(=1.5) in PATH must be a number from 0 to 1"),
        ("lora_dropout", float("nan"), "(=nan) in PATH must be a number from 0 to 1"),
        ("init_lora_weights", 3, "(=3) in PATH must be true, false, or the name of an initialisation"),
        ("base_model_name_or_path", ["a"], "(=['a']) in PATH must be a string, or null"),
        ("loftq_config", "x", "(='x') in PATH must be an object, or null"),
    ],
    ids=lambda value: repr(value)[:40] if not isinstance(value, str) else None,
)
def test_settings_that_are_nonsense_are_refused_by_name_and_value(saved, setting, value, expected):
    edit_config(saved, **{setting: value})
    message = refusal(saved)
    assert f"`{setting}` " in message
    assert expected.replace("PATH", f"{saved}/adapter_config.json") in message
    assert "Correct it there, or save the adapter again." in message


WORDS = st.text(max_size=8) | st.sampled_from(["q_proj", "*", "(", "LORA"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(setting=st.sampled_from(sorted({*Settings.model_fields, *REFUSED, "another"})), value=JSON)
@pytest.mark.filterwarnings("ignore:.*will be ignored:UserWarning")
def test_any_value_of_any_setting_is_read_or_refused(base, tmp_path_factory, setting, value):
    directory = tmp_path_factory.getbasetemp() / "any-setting"
    if not directory.exists():
        save_adapter(base, directory, ["q_proj"], r=2)
    plain = (directory / "adapter_config.json").read_text()
    edit_config(directory, **{setting: value})
    try:
        adapter = load_adapter("one", directory)
    except AdapterError:
        pass
    else:
        assert all(math.isfinite(module.scaling) for module in adapter.modules.values())
    finally:
        (directory / "adapter_config.json").write_text(plain)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 0.5},
        {"lora_alpha": -8},
        {"alpha_pattern": {"v_proj": 2.5}},
        {"use_rslora": None, "use_dora": None, "lora_bias": None, "fan_in_fan_out": None, "inference_mode": None},
        {"loftq_config": None, "init_lora_weights": None, "megatron_config": None, "auto_mapping": None},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["score", "classifier"]},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}},
    ],
    ids=str,
)
def test_settings_that_peft_takes_are_taken(base, saved, config):
    edit_config(saved, **config)
    assert_gives_what_peft_gives(base, saved)


def test_patterns_that_are_null_are_off(saved):
    scalings = [module.scaling for module in load_adapter("one", saved).modules.values()]
    edit_config(saved, rank_pattern=None, alpha_pattern=None)
    assert [module.scaling for module in load_adapter("one", saved).modules.values()] == scalings


def test_an_alpha_of_a_file_is_not_rounded(saved):
    edit_config(saved, lora_alpha=0.1)
    assert {module.scaling for module in load_adapter("one", saved).modules.values()} == {0.1 / 4}


def test_a_byte_order_mark_is_read(base, saved):
    path = Path(saved) / "adapter_config.json"
    plain = load_adapter("one", saved)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_adapter("one", saved).digest == plain.digest


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"r": ' + "[" * 100_000, '{"r": ' + "9" * 5000 + "}"], ids=["list", "object", "digits"]
)
def test_json_that_python_cannot_hold_is_refused(saved, content):
    (Path(saved) / "adapter_config.json").write_text(content)
    assert "is not valid JSON" in refusal(saved)


def test_a_file_that_cannot_be_read_is_refused(saved, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    assert "cannot be read ([Errno 13] Permission denied). Check its permissions." in refusal(saved)


def test_an_initialisation_that_nobody_knows_is_refused_with_the_known_ones(saved):
    edit_config(saved, init_lora_weights="gausian")
    message = refusal(saved)
    assert "`init_lora_weights` = 'gausian': whether this initialisation changed the base weights is unknown" in message
    assert "Did you mean 'gaussian'?" in message


# ---- The modules that are adapted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, ...], ids=["null", "absent"])
@torch.no_grad()
def test_without_target_modules_the_keys_say_what_is_adapted(base, tmp_path, value):
    directory = save_adapter(base, tmp_path, ALL_LLAMA)
    # A module that nothing else asks for: its file says so.
    edit_tensors(directory, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1.mlp" in key])
    edit_config(directory, target_modules=r"(?!.*\.1\.mlp\.).*_proj")
    expected = load_adapter("one", directory)
    assert_gives_what_peft_gives(base, directory)
    edit_config(directory, target_modules=value)
    found = load_adapter("one", directory)
    assert found.modules.keys() == expected.modules.keys()
    ids = random_ids()
    logits = [FusedModel.from_adapters(copy.deepcopy(base), {"one": a}, "one")(ids).logits for a in (found, expected)]
    assert torch.equal(*logits)


def test_weights_that_the_settings_leave_out_are_refused_as_peft_would_leave_them_out(base, saved):
    edit_config(saved, target_modules=["q_proj"])
    message = refusal(saved, base)
    assert "has weights for 'model.layers.0.self_attn.v_proj' (3 such)" in message
    assert "(`target_modules` = {'q_proj'})" in message
    edit_config(saved, target_modules=None)
    assert len(load_adapter("one", saved).modules) == 6


# ---- Other trainers' files -----------------------------------------------------------------------------------------

MLX = {
    "model": "mlx-community/Llama-3.2-1B",
    "fine_tune_type": "lora",
    "num_layers": 16,
    "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
}


@pytest.fixture
def mlx(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(MLX))
    tensors = {
        "model.layers.0.self_attn.q_proj.lora_a": torch.randn(32, 8),
        "model.layers.0.self_attn.q_proj.lora_b": torch.randn(8, 32),
    }
    save_file(tensors, tmp_path / "adapters.safetensors")
    return tmp_path


def test_an_mlx_directory_is_named(mlx):
    message = refusal(mlx)
    assert "has `fine_tune_type` = 'lora': it is of MLX, not of PEFT" in message
    assert "lora_alpha = scale * rank" in message


def test_mlx_weights_are_named_without_their_configuration(mlx):
    (mlx / "adapter_config.json").unlink()
    assert "has 'adapters.safetensors': it is of MLX, not of PEFT" in refusal(mlx)


def test_mlx_weights_under_pefts_names_are_named(saved):
    edit_tensors(saved, lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_a": torch.randn(32, 8)}))
    assert "it is of MLX, not of PEFT's LoRA. Write each `lora_a` and `lora_b`, transposed" in refusal(saved)


@torch.no_grad()
def test_an_mlx_adapter_written_as_the_refusal_says_is_what_it_was(mlx):
    a, b = torch.randn(32, 8, dtype=torch.float64), torch.randn(8, 32, dtype=torch.float64)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{prefix}.lora_A.weight": a.T.contiguous(), f"{prefix}.lora_B.weight": b.T.contiguous()},
        mlx / "adapter_model.safetensors",
    )
    (mlx / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 20.0 * 8}))
    (module,) = load_adapter("one", mlx).modules.values()
    x = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(module.scaling * x @ module.lora_A.T @ module.lora_B.T, 20.0 * (x @ a) @ b)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"config": {"architecture": "lora"}, "config_id": "9", "model_class": "LlamaForCausalLM"}, "of AdapterHub"),
        ({"lora_r": 8, "lora_alpha": 16, "adapter": "lora"}, "of axolotl"),
        ({"finetuning_type": "lora", "lora_target": "all"}, "of LLaMA-Factory"),
        ({"swift_type": "LORA", "r": 8}, "of ms-swift"),
        ({"network_dim": 8, "network_alpha": 4}, "of kohya's sd-scripts, for image models"),
        ({"xlora_depth": 2, "adapters": {}}, "of X-LoRA"),
        ({"r": 8}, "`peft_type` = None: only 'LORA' adapters can be fused"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_configuration_that_is_not_pefts_is_named(saved, config, expected):
    (Path(saved) / "adapter_config.json").write_text(json.dumps(config))
    assert expected in refusal(saved)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"lora_dtype": "bf16"}, "`lora_dtype` = 'bf16': it is a setting of ms-swift, not of PEFT's LoRA"),
        ({"num_layers": 16}, "`num_layers` = 16: it is a setting of MLX, not of PEFT's LoRA"),
        ({"enable_lora": [True, False]}, "it is a setting of PEFT before 0.3, not of PEFT's LoRA"),
        ({"use_gradient_checkpointing": "unsloth"}, "it is a setting of unsloth, not of PEFT's LoRA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_setting_of_another_trainer_is_named(saved, config, expected):
    edit_config(saved, **config)
    assert expected in refusal(saved)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "ADALORA", "VERA", "PREFIX_TUNING", "XLORA", "lora", ["LORA"]])
def test_other_types_of_peft_are_named(saved, kind):
    edit_config(saved, peft_type=kind)
    assert f"`peft_type` = {kind!r}: only 'LORA' adapters can be fused. Give a LoRA adapter." in refusal(saved)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pytorch_lora_weights.safetensors", "of diffusers, for image models"),
        ("pytorch_adapter.bin", "of AdapterHub"),
        ("xlora_classifier.safetensors", "of X-LoRA"),
    ],
)
def test_a_directory_of_another_library_is_named(tmp_path, file, expected):
    (tmp_path / file).write_bytes(b"")
    assert f"has {file!r}: it is {expected}, not of PEFT" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lora_unet_down_blocks_0_to_k.lora_down.weight", "kohya's sd-scripts, for image models"),
        ("unet.down_blocks.0.attn1.processor.to_q_lora.lora_linear_layer.up.weight", "diffusers, for image models"),
        ("base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a", "LoHa"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_E", "AdaLoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b", "VeRA"),
        ("base_model.prompt_embeddings", "prompt learning"),
    ],
)
def test_tensors_of_another_library_are_named(saved, key, expected):
    edit_tensors(saved, lambda tensors: tensors.update({key: torch.randn(4)}))
    assert f"key '{key}' in" in (message := refusal(saved))
    assert f"it is of {expected}, not of PEFT's LoRA" in message

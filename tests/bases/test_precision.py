"""The precision of a base where none is asked for, on CPUs with and without instructions for bfloat16."""

from __future__ import annotations

import pytest
import torch

from loraflow import BaseOptions, FusedModel
from loraflow.bases import load_base
from loraflow.bases.precision import has_bfloat16, settled_dtype
from tests.tiny import number_tokenizer, save_adapter, tiny_model


@pytest.fixture
def without(monkeypatch):
    """A CPU without bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False}, raising=False)


@pytest.fixture
def base(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_cpu_without_bfloat16_takes_float32_and_says_it(base, without, caplog):
    assert load_base(base, BaseOptions()).dtype == torch.float32
    assert "This CPU has no bfloat16 instructions: the base is loaded in float32" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_what_is_asked_for_is_given(base, without, caplog, dtype):
    assert load_base(base, BaseOptions(dtype=dtype)).dtype == torch.bfloat16
    assert not caplog.text


def test_a_cpu_with_bfloat16_keeps_it(base, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert load_base(base, BaseOptions()).dtype == torch.bfloat16
    assert not caplog.text


@pytest.mark.parametrize(
    ("own", "options"),
    [
        ("float16", BaseOptions()),
        ("bfloat16", BaseOptions(device_map="cuda")),
        ("bfloat16", BaseOptions(quantization="bnb-4bit")),
    ],
)
def test_other_bases_are_as_they_are(without, own, options):
    assert settled_dtype(own, options) == own


def test_a_saved_fusion_goes_the_same_way(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    adapters = {"a": save_adapter(tiny_model(), tmp_path / "a", seed=1)}
    FusedModel.from_adapters(base, adapters, tokenizer=number_tokenizer()).save_pretrained(tmp_path / "fusion")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    loaded = FusedModel.from_pretrained(tmp_path / "fusion", tokenizer=number_tokenizer())
    assert loaded.base_model.dtype == torch.float32
    assert "float32" in caplog.text


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("model name: x\nflags\t\t: fpu avx512_bf16 avx2\n", True),
        ("flags\t\t: fpu avx2\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("", True),
    ],
)
def test_older_versions_of_torch_ask_the_system(tmp_path, monkeypatch, text, there):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr("loraflow.bases.precision._CPU_INFO", path)
    assert has_bfloat16() is there
    monkeypatch.setattr("loraflow.bases.precision._CPU_INFO", tmp_path / "none")
    assert has_bfloat16()

"""A fusion for llama.cpp: the LoRA's tensors, put on the base's as llama.cpp has them, give the fusion's logits."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loraflow import FusedModel
from loraflow.errors import ArchitectureError, LoraflowError
from loraflow.export import export_gguf, export_gguf_model
from loraflow.export.gguf import ARCHITECTURES
from loraflow.merging import make_merge
from tests.tiny import random_adapter, random_ids, relative_error, tiny_model

gguf = pytest.importorskip("gguf")
from gguf import GGUFReader, GGUFWriter  # noqa: E402


def fused(architecture="llama", kinds=("plain", "rslora"), method="average", targets=(None, None)):
    # llama.cpp takes a Mistral for a Llama, which has no window.
    base = tiny_model(architecture, **({"sliding_window": None} if architecture == "mistral" else {}))
    adapters = {
        name: random_adapter(base, name, target, r=i + 2, kind=kind, seed=i)
        for i, (name, kind, target) in enumerate(zip(("zh", "math"), kinds, targets, strict=True))
    }
    return base, FusedModel.from_adapters(base, adapters, method)


def read(path):
    """A file's tensors, as numpy has them, and its metadata."""
    reader = GGUFReader(path)
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def permuted(weights, heads):
    """llama.cpp's order of the rows of q and k, as its converter makes it (`LlamaModel.permute`)."""
    rows = weights.numpy()
    return torch.from_numpy(
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape).copy()
    )


def as_gguf(base, architecture, path, change):
    """The base as a whole model in GGUF, as llama.cpp keeps it, with changes by the names of its tensors."""
    config, arch = base.config, ARCHITECTURES[architecture]
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[arch], config.num_hidden_layers)
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else config.hidden_size // 4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in base.state_dict().items():
        module, _, leaf = name.rpartition(".")
        value = tensor
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if arch == "llama" and part in name:
                value = permuted(value, heads)
        place = f"{names.get_name(module)}.{leaf}"
        writer.add_tensor(place, (value + change.get(place, 0)).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_lora_gives_the_fusions_logits(tmp_path, architecture):
    base, model = fused(architecture, targets=(["q_proj", "k_proj", "down_proj"], None))
    ids = random_ids()
    expected = model(ids).logits
    report = export_gguf(model, tmp_path / "lora.gguf")
    model.unload()
    tensors, fields = read(report.file)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == ARCHITECTURES[architecture]
    assert fields["adapter.type"] == "lora"
    alpha = fields["adapter.lora.alpha"]
    change = {}
    for name in {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        # llama.cpp's `get_scale`.
        change[name] = alpha / b.shape[1] * b @ a
    assert len({tensors[name].shape[0] for name in tensors if name.endswith("lora_a")}) > 1, "ranks must differ"
    as_gguf(base, architecture, tmp_path / "model.gguf", change)
    # transformers reads no head size from a GGUF.
    own = {"head_dim": base.config.head_dim} if architecture == "qwen3" else {}
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, **own).eval()
    assert relative_error(base(ids).logits, expected) > 1e-3, "the adapters do nothing"
    assert relative_error(found(ids).logits, expected) < 1e-5


def test_precisions_and_merges(tmp_path):
    _, model = fused()
    report = export_gguf(model, tmp_path / "a.gguf", dtype=torch.bfloat16, merge=make_merge("knots-ties"), rank=2)
    assert report.folded.from_sum is not None
    reader = GGUFReader(report.file)
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.BF16}
    exact = {
        tensor.name: tensor
        for tensor in GGUFReader(
            export_gguf(model, tmp_path / "b.gguf", merge=make_merge("knots-ties"), rank=2).file
        ).tensors
    }
    for tensor in reader.tensors:
        found = np.ascontiguousarray(tensor.data).view(np.uint16).astype(np.uint32) << 16
        assert np.allclose(found.view(np.float32), exact[tensor.name].data, rtol=0.01)
        assert list(tensor.shape) == list(exact[tensor.name].shape)
    half = export_gguf(model, tmp_path / "half.gguf", dtype=torch.float16)
    assert {tensor.data.dtype for tensor in GGUFReader(half.file).tensors} == {np.dtype(np.float16)}
    with pytest.raises(LoraflowError, match=r"`dtype` \(=torch\.float64\) must be one of torch\.float32, torch"):
        export_gguf(model, tmp_path / "double.gguf", dtype=torch.float64)


def test_what_gguf_does_not_know_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "a.gguf"
    with pytest.raises(
        LoraflowError, match=r"has DoRA's magnitudes, of which GGUF knows nothing\..*Export a whole model instead"
    ):
        export_gguf(fused(kinds=("dora", "plain"))[1], out)
    with pytest.raises(LoraflowError, match=r"has biases \(`lora_bias`\), of which GGUF knows nothing"):
        export_gguf(fused(kinds=("lora_bias", "plain"))[1], out)
    with pytest.raises(ArchitectureError, match="A LoRA of a 'gpt2' base was never read back from GGUF here"):
        export_gguf(fused("gpt2")[1], out)
    _, model = fused()
    empty = types.SimpleNamespace(get_name=lambda name: None)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "get_tensor_name_map", lambda *args: empty)
        with pytest.raises(LoraflowError, match=r"llama\.cpp has no tensor for 'model\.layers\.0"):
            export_gguf(model, out)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(LoraflowError, match=r"GGUF needs the package `gguf`: pip install 'loraflow\[gguf\]'"):
            export_gguf(model, out)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(tmp_path):
    _, model = fused()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(LoraflowError, match=r"is a directory, and GGUF is one file"):
        export_gguf(model, tmp_path)
    for overwrite in (False, True):
        with pytest.raises(LoraflowError, match=r"notes.txt is there and is no GGUF"):
            export_gguf(model, tmp_path / "notes.txt", overwrite=overwrite)
    export_gguf(model, tmp_path / "a.gguf")
    with pytest.raises(LoraflowError, match=r"a.gguf is there already.*`overwrite=True`"):
        export_gguf(model, tmp_path / "a.gguf")
    export_gguf(model, tmp_path / "a.gguf", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "a.gguf"}


# It says what it was called with, as a stand-in for llama.cpp's.
CONVERTER = """
import json, pathlib, sys
checkpoint, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
files = sorted(path.name for path in checkpoint.iterdir())
out.write_bytes(b"GGUF" + json.dumps({"files": files, "arguments": sys.argv[4:]}).encode())
"""


def test_a_whole_model_is_made_by_llama_cpps_converter(tmp_path):
    _, model = fused()
    with pytest.raises(LoraflowError, match=r"There is no .*convert_hf_to_gguf\.py\. Give a copy of llama\.cpp"):
        export_gguf_model(model, tmp_path / "a.gguf", tmp_path)
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    report = export_gguf_model(model, tmp_path / "a.gguf", tmp_path)
    said = report.file.read_bytes().decode()
    assert "model.safetensors" in said
    assert '"arguments": ["--outtype", "f32"]' in said
    assert report.checkpoint is not None
    assert report.checkpoint.directory is None
    assert report.checkpoint.rounding.error < 1e-6
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(LoraflowError, match=r"failed on the checkpoint \(status 1\); its last words: no such model"):
        export_gguf_model(model, tmp_path / "b.gguf", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "convert_hf_to_gguf.py"}

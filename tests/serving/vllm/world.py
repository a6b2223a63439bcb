"""Tiny bases that vLLM's attention takes, adapters of every plain kind for them, and what `generate` answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loraflow import FusedModel
from loraflow.methods import Method
from tests.tiny import ALL_LLAMA, VOCAB, save_adapter, set_random_gates, tiny_model

# Attention on a CPU takes no smaller heads.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
LENGTHS = (1, 3, 17, 40, 80)
TOKENS = 12


def save_base(directory: Path, architecture: str = "llama", **changes: object) -> Path:
    """Save a tiny base and return where."""
    if not directory.exists():
        tiny_model(architecture, **{**SHAPE, **changes}).save_pretrained(directory)
    return directory


def save_fusion(directory: Path, base: Path, method: Method | str, seed: int = 5) -> Path:
    """Fuse three adapters of different rank, scaling and targets, and save; what the method learns is random."""
    model = FusedModel.from_adapters(base, adapters_of(base), method)
    if model.method.learns:
        set_random_gates(model, seed)
    model.save_pretrained(directory)
    return directory


def adapters_of(base: Path) -> dict[str, str]:
    """Three adapters of a base, by name."""
    directories = {name: base.parent / f"{base.name}-{name}" for name in ("zh", "math", "code")}
    if not directories["code"].exists():
        loaded = AutoModelForCausalLM.from_pretrained(base)
        save_adapter(loaded, directories["zh"], ALL_LLAMA, seed=1, r=4)
        save_adapter(loaded, directories["math"], ["q_proj", "v_proj", "down_proj"], seed=2, r=8, use_rslora=True)
        save_adapter(
            loaded, directories["code"], ["k_proj", "o_proj", "up_proj", "down_proj"], seed=3, r=2, lora_alpha=16
        )
    return {name: str(directory) for name, directory in directories.items()}


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 3) -> list[list[int]]:
    """Prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def generated(fusion: Path, asked: Sequence[Sequence[int]], tokens: int = TOKENS, **kwargs: Any) -> list[list[int]]:
    """What `FusedModel.generate` answers to a batch, greedily and in float32."""
    model = FusedModel.from_pretrained(fusion)
    return answers_of(model, asked, tokens, **kwargs)


def answers_of(model: Any, asked: Sequence[Sequence[int]], tokens: int = TOKENS, **kwargs: Any) -> list[list[int]]:
    """The same of a model at hand."""
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    # Engines are told to ignore ends: here it is a token that no base has.
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB, **kwargs}
    answers = model.generate(ids, attention_mask=mask, **options)
    return answers[:, longest:].tolist()


def engine(fusion: Path, base: Path, loader: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """How an engine with a fusion is started; eagerly, unless said otherwise."""
    return {
        "model": str(base),
        "load_format": "loraflow",
        "model_loader_extra_config": {"fusion": str(fusion), **(loader or {})},
        "enforce_eager": True,
        **options,
    }


def call(
    asked: Sequence[Sequence[int]], tokens: int = TOKENS, extra_args: Any = None, lora: Path | None = None
) -> dict[str, Any]:
    """What an engine is asked; `lora` is an adapter that vLLM itself adds."""
    prompts = [list(prompt) for prompt in asked]
    return {"prompts": prompts, "tokens": tokens, "extra_args": extra_args, "lora": None if lora is None else str(lora)}


def run_engines(jobs: Sequence[Mapping[str, Any]], directory: Path, timeout_s: float = 900, **env: str) -> list[dict]:
    """Start engines one after the other in another process, and return what each answered."""
    directory.mkdir(parents=True, exist_ok=True)
    given, found = directory / "jobs.json", directory / "results.json"
    given.write_text(json.dumps(jobs))
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(directory / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **env,
    }
    script = Path(__file__).with_name("engine.py")
    done = subprocess.run(
        [sys.executable, str(script), str(given), str(found)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    (directory / "log.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(found.read_text())

"""Families of bases, tiny and random, and kinds of adapters for them: of `scripts/check_vllm.py` and of the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from loraflow import FusedModel
from loraflow.methods import Method
from tests.serving.vllm.world import save_base
from tests.tiny import ALL_LLAMA, save_adapter, set_random_gates

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# vLLM has no heads of a size of their own in these.
_TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """A kind of base.

    Attributes:
        architecture: the `model_type`.
        changes: to the tiny configuration.
        targets: what the adapters adapt.
    """

    architecture: str
    changes: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=lambda: ALL_LLAMA)


FAMILIES: dict[str, Family] = {
    "Llama 3": Family(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "Llama, biases": Family("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, tied embeddings": Family("llama", {"tie_word_embeddings": True}),
    "Mistral": Family("mistral", {"sliding_window": 24}),
    "Qwen 2": Family("qwen2", {**_TWO_HEADS, "tie_word_embeddings": True}),
    "Qwen 3": Family("qwen3"),
    "Gemma 2": Family("gemma2", {"query_pre_attn_scalar": 32, "sliding_window": 24}),
    "Gemma 3": Family("gemma3_text", {"query_pre_attn_scalar": 32, "sliding_window": 24}),
    "Phi 3": Family("phi3", _TWO_HEADS, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "Mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "Qwen 2 MoE": Family("qwen2_moe", {**_EXPERTS, **_TWO_HEADS}, ATTENTION),
    # Layer 0 is dense; PEFT takes the names of its linears for those of experts, so that no adapter has them.
    "Qwen 3 MoE": Family("qwen3_moe", {**_EXPERTS, "mlp_only_layers": [0]}, ATTENTION),
}

# What two adapters beside a plain one are configured with.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8},
    "patterns": {
        "r": 4,
        "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"o_proj": 16, r"layers\.0\.self_attn\.\w+": 3},
    },
    "rsLoRA": {"r": 6, "use_rslora": True},
}
# Refused by loraflow itself or by the plug-in; whole heads are taken where they are those of the base.
REFUSED_KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "`lora_bias`": {"lora_bias": True},
    "`modules_to_save`": {"modules_to_save": ["lm_head"]},
    "trained tokens": {"trainable_token_indices": [3, 5]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


def family_base(root: Path, name: str) -> Path:
    """A base of a family."""
    family = FAMILIES[name]
    return save_base(root / "-".join(name.split()).replace(",", ""), family.architecture, **family.changes)


def family_adapter(base: Path, name: str, directory: Path, seed: int, **config: Any) -> str:
    """An adapter for a base of a family."""
    targets = config.pop("target_modules", FAMILIES[name].targets)
    return save_adapter(AutoModelForCausalLM.from_pretrained(base), directory, targets, seed, **config)


def family_fusion(base: Path, name: str, directory: Path, kinds: list[str], method: Method) -> Path:
    """A fusion of a plain adapter and one of each kind; what the method learns is random."""
    adapters = {"zero": family_adapter(base, name, directory / "zero", 1)}
    for seed, kind in enumerate(kinds, start=2):
        adapters[kind] = family_adapter(base, name, directory / kind, seed, **KINDS[kind])
    model = FusedModel.from_adapters(base, adapters, method)
    if model.method.learns:
        set_random_gates(model, 5)
    model.save_pretrained(directory / "fusion")
    return directory / "fusion"

"""What is no LoRA of PEFT's: named, with what helps, since "unknown" would send its owner the wrong way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_SAVE_WITH_PEFT = "Load it with its own library, and save it with PEFT's `save_pretrained`."


@dataclass(frozen=True)
class Kind:
    """A kind of adapter that is not PEFT's.

    Attributes:
        name: whose it is.
        remedy: what makes it one of PEFT's.
        settings: settings that only its configuration has.
        files: files that only its directories have.
        key_parts: what only its tensors' names have in them.
    """

    name: str
    remedy: str
    settings: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    key_parts: frozenset[str] = frozenset()


_KINDS = (
    Kind(
        "MLX",
        "Write each `lora_a` and `lora_b`, transposed, as PEFT's `lora_A.weight` and `lora_B.weight`, with r = rank "
        "and lora_alpha = scale * rank; or train it with PEFT.",
        frozenset({"fine_tune_type", "lora_parameters", "lora_layers", "num_layers"}),
        frozenset({"adapters.safetensors", "adapters.npz"}),
        frozenset({".lora_a", ".lora_b"}),
    ),
    Kind(
        "AdapterHub",
        _SAVE_WITH_PEFT,
        frozenset({"config_id", "model_class", "hidden_size"}),
        frozenset({"pytorch_adapter.bin"}),
    ),
    Kind("ms-swift", _SAVE_WITH_PEFT, frozenset({"swift_type", "lora_dtype", "lorap_lr_ratio", "model_key_mapping"})),
    Kind(
        "LLaMA-Factory",
        "Give the directory that PEFT's `save_pretrained` wrote for it.",
        frozenset({"finetuning_type", "lora_rank", "lora_target", "loraplus_lr_ratio"}),
    ),
    Kind(
        "axolotl",
        "Give the directory that PEFT's `save_pretrained` wrote for it.",
        frozenset({"lora_r", "lora_target_modules", "lora_target_linear", "lora_modules_to_save"}),
    ),
    Kind(
        "unsloth",
        "Remove it from the file if it only describes the training.",
        frozenset({"unsloth_fixed", "unsloth_version", "use_gradient_checkpointing"}),
    ),
    Kind(
        "X-LoRA",
        "Give the adapters that it mixes, each by its name.",
        frozenset({"xlora_depth", "xlora_size", "xlora_dropout_p"}),
        frozenset({"xlora_config.json", "xlora_classifier.safetensors"}),
    ),
    Kind(
        "kohya's sd-scripts, for image models",
        "Give the LoRA of a language model.",
        frozenset({"network_alpha", "network_dim", "network_module"}),
        key_parts=frozenset({"lora_down", "lora_up", "lora_unet_", "lora_te"}),
    ),
    Kind(
        "diffusers, for image models",
        "Give the LoRA of a language model.",
        files=frozenset({"pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"}),
        key_parts=frozenset({"lora_linear_layer", ".lora.down.", ".lora.up."}),
    ),
    Kind(
        "PEFT before 0.3",
        "Load it with that PEFT, and save what its layers hold anew.",
        frozenset({"enable_lora", "merge_weights"}),
    ),
    Kind("LoHa", "Give a LoRA adapter.", key_parts=frozenset({"hada_"})),
    Kind("LoKr", "Give a LoRA adapter.", key_parts=frozenset({"lokr_"})),
    Kind("AdaLoRA", "Give a LoRA adapter.", key_parts=frozenset({".lora_E", ".ranknum"})),
    Kind("VeRA", "Give a LoRA adapter.", key_parts=frozenset({"vera_"})),
    Kind("IA3", "Give a LoRA adapter.", key_parts=frozenset({".ia3_"})),
    Kind("prompt learning", "Give a LoRA adapter.", key_parts=frozenset({"prompt_embeddings", "prompt_encoder"})),
)


def kind_of_setting(setting: str) -> Kind | None:
    """Whose a setting is, where it is another trainer's."""
    return next((kind for kind in _KINDS if setting in kind.settings), None)


def kind_of_config(config: Mapping[str, Any]) -> tuple[Kind, str] | None:
    """Whose a whole configuration is, by the first of its settings that tells."""
    return next(((kind, setting) for setting in config if (kind := kind_of_setting(setting))), None)


def kind_of_files(names: Collection[str]) -> tuple[Kind, str] | None:
    """Whose a directory is, by the first of its files that tells."""
    return next(((kind, name) for kind in _KINDS for name in sorted(names) if name in kind.files), None)


def kind_of_key(key: str) -> Kind | None:
    """Whose a tensor is, by its name."""
    return next((kind for kind in _KINDS if any(part in key for part in kind.key_parts)), None)

"""`adapter_config.json`: read, and refused where it describes what cannot be fused exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraflow.errors import AdapterError

if TYPE_CHECKING:  # PEFT is imported where it is used: it imports bitsandbytes, which takes a second and may print.
    from peft import LoraConfig

# Settings that decide the mathematics: they are part of the digest, so that a changed alpha is a changed adapter.
MATHS = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern")
# Settings that choose modules, describe the training, or only matter while training.
HARMLESS = frozenset(
    {
        *MATHS,
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        # Converting to plain LoRA, PEFT leaves these of CorDA, LoftQ and LoRA-GA; see `init_lora_weights`.
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_REMEDY_PLAIN = "Retrain it as plain LoRA, rsLoRA or DoRA."
_REMEDY_CONVERT = (
    "Convert it to plain LoRA with PEFT: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
)
REFUSED = {
    "alora_invocation_tokens": f"an aLoRA acts only after its invocation tokens. {_REMEDY_PLAIN}",
    "arrow_config": "it is a PEFT Arrow router, not an adapter. Give the adapters that it routes to.",
    "kasa_config": f"KaSA changed the base weights while training. {_REMEDY_PLAIN}",
    "layer_replication": f"it repeats decoder layers, so its layers are not the base's. {_REMEDY_PLAIN}",
    "megatron_config": f"Megatron's parallel layers are not supported. {_REMEDY_PLAIN}",
    "modules_to_save": "it replaces whole modules of the base. Retrain without `modules_to_save`.",
    "monteclora_config": f"MonteCLoRA samples its weights. {_REMEDY_PLAIN}",
    "target_parameters": "it adapts bare parameters, not linear modules. Retrain with `target_modules`.",
    "trainable_token_indices": "it replaces token embeddings. Retrain without `trainable_token_indices`.",
    "use_bdlora": f"BD-LoRA's block-diagonal factors are not supported. {_REMEDY_PLAIN}",
    "use_qalora": f"QALoRA pools its input by groups. {_REMEDY_PLAIN}",
    "velora_config": f"VeLoRA is not supported. {_REMEDY_PLAIN}",
}
# Initialisations that move part of W into B A, so that PEFT's W is no longer the base's.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(name: str, path: Path) -> LoraConfig:
    """PEFT's configuration of an adapter.

    Raises:
        AdapterError: if the file cannot be read, or describes what cannot be fused exactly.
    """
    from peft import LoraConfig

    raw_config = _read_object(name, path)
    _refuse_unfusable(name, path, raw_config)
    known = {f.name for f in fields(LoraConfig)}
    try:
        return LoraConfig(**{key: value for key, value in raw_config.items() if key in known})
    except (TypeError, ValueError) as error:
        raise AdapterError(f"Adapter {name!r}: PEFT cannot read {path}: {error}") from error


def _read_object(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"Adapter {name!r}: {path} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"Adapter {name!r}: {path} holds a {type(config).__name__}, not an object. Save the adapter again."
        )
    return config


def _refuse_unfusable(name: str, path: Path, config: Mapping[str, Any]) -> None:
    def refuse(key: str, why: str) -> AdapterError:
        return AdapterError(f"Adapter {name!r} cannot be fused: {path} has `{key}` = {config.get(key)!r}: {why}")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "only 'LORA' adapters can be fused. Give a LoRA adapter.")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "it replaces biases of the base. Retrain with `bias='none'`.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise refuse("init_lora_weights", f"this initialisation changed the base weights. {_REMEDY_CONVERT}")
    for key, value in config.items():
        if not value or key in HARMLESS:
            continue
        raise refuse(key, REFUSED.get(key, "this setting is unknown to this version of loraflow. Update loraflow."))

"""Adapters of every kind that directories hold: as PEFT writes them, as others do, and broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import ALL_LLAMA, edit_config, edit_tensors, save_adapter, tiny_model

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors, PreTrainedModel], object]

_PREFIX = "base_model.model."
_Q0 = f"{_PREFIX}model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        title: what it is, for the table.
        settings: PEFT's when it makes the adapter.
        changed: settings that are others in the file; `...` are removed.
        edit: what is done to the file's tensors then.
        targets: what is adapted.
        base: the architecture.
        configuration: what becomes of the configuration's text.
        same: whether the files still say what they said before they were changed.
    """

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    edit: Edit | None = None
    targets: list[str] | str = field(default_factory=lambda: list(ALL_LLAMA))
    base: str = "llama"
    configuration: Callable[[str], str] | None = None
    same: bool = False

    def save(self, directory: Path) -> PreTrainedModel:
        """Let PEFT write one there, as it is before it is changed; returns its base."""
        base = tiny_model(self.base, torch.float64)
        save_adapter(base, directory, self.targets, **self.settings)
        return base

    def change(self, directory: Path, base: PreTrainedModel) -> None:
        """Change the files to be of this kind."""
        if self.edit is not None:
            edit = self.edit
            edit_tensors(directory, lambda tensors: edit(tensors, base))
        if self.changed:
            edit_config(directory, **self.changed)
        if self.configuration is not None:
            path = directory / "adapter_config.json"
            path.write_text(self.configuration(path.read_text()), encoding="utf-8")


def _renamed(rename: Callable[[str], str]) -> Edit:
    def edit(tensors: Tensors, _: PreTrainedModel) -> None:
        for key in list(tensors):
            tensors[rename(key)] = tensors.pop(key)

    return edit


def _cast(dtype: torch.dtype) -> Edit:
    def edit(tensors: Tensors, _: PreTrainedModel) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    return edit


def _with_copy(name: str, difference: float = 0.0) -> Edit:
    def edit(tensors: Tensors, base: PreTrainedModel) -> None:
        tensors[f"{_PREFIX}{name}"] = base.get_parameter(name).detach() + difference

    return edit


def _twice(tensors: Tensors, _: PreTrainedModel) -> None:
    tensors[f"{_Q0}.lora_B.weight".removeprefix(_PREFIX)] = torch.randn_like(tensors[f"{_Q0}.lora_B.weight"])


def _not_a_number(tensors: Tensors, _: PreTrainedModel) -> None:
    tensors[f"{_Q0}.lora_A.weight"][0, 0] = torch.nan


def _zero(tensors: Tensors, _: PreTrainedModel) -> None:
    tensors.update({key: tensor * 0 for key, tensor in tensors.items() if "lora_B" in key})


def _without_some(tensors: Tensors, _: PreTrainedModel) -> None:
    for key in [key for key in tensors if "v_proj" in key]:
        del tensors[key]


def _named(key: str) -> str:
    return key.replace(".weight", ".default.weight")


def _set(**settings: Any) -> Callable[[str], str]:
    # json writes NaN and Infinity as Python reads them.
    return lambda text: json.dumps({**json.loads(text), **settings})


_HALF = {"q_proj": 2, "layers.1.mlp.down_proj": 6}

KINDS = (
    Kind("LoRA of all linears"),
    Kind("LoRA on q and v, rank 1", {"r": 1}, targets=["q_proj", "v_proj"]),
    Kind('`target_modules` "all-linear"', targets="all-linear"),
    Kind("`target_modules` a regular expression", targets=r".*\.layers\.[12]\..*(q_proj|up_proj)"),
    Kind("rsLoRA", {"use_rslora": True}),
    Kind("DoRA", {"use_dora": True}),
    Kind("DoRA with rsLoRA", {"use_dora": True, "use_rslora": True}),
    Kind("`lora_bias`", {"lora_bias": True}),
    Kind("`rank_pattern` and `alpha_pattern`", {"rank_pattern": _HALF, "alpha_pattern": {"v_proj": 3, "o_proj": 32}}),
    Kind("`layers_to_transform`", {"layers_to_transform": [0, 2]}),
    Kind("`exclude_modules`", {"exclude_modules": ["k_proj"]}),
    Kind("Conv1D (GPT-2)", {"fan_in_fan_out": True}, targets=["c_attn", "c_proj"], base="gpt2"),
    Kind("weights in bfloat16", edit=_cast(torch.bfloat16)),
    Kind("weights in float16", edit=_cast(torch.float16)),
    Kind("weights in float8_e4m3fn", edit=_cast(torch.float8_e4m3fn)),
    Kind("weights in float8_e5m2", edit=_cast(torch.float8_e5m2)),
    Kind("`target_modules` null", changed={"target_modules": None}, same=True),
    Kind("`target_modules` absent", changed={"target_modules": ...}, same=True),
    Kind("keys with `.default.`", edit=_renamed(_named), same=True),
    Kind("keys without `base_model.model.`", edit=_renamed(lambda key: key.removeprefix(_PREFIX)), same=True),
    Kind('`bias` "lora_only" without biases in the file', changed={"bias": "lora_only"}),
    Kind("`modules_to_save` with nothing saved", changed={"modules_to_save": ["score"]}),
    Kind("a copy of the base's `lm_head`", edit=_with_copy("lm_head.weight")),
    Kind("a copy of the base's `embed_tokens`", edit=_with_copy("model.embed_tokens.weight")),
    Kind("a byte-order mark before the configuration", configuration=lambda text: "\ufeff" + text, same=True),
    Kind("another `embed_tokens`", edit=_with_copy("model.embed_tokens.weight", 0.1)),
    Kind(
        "`modules_to_save` `lm_head`, trained", {"modules_to_save": ["lm_head"]}, edit=_with_copy("lm_head.weight", 0.1)
    ),
    Kind("`lm_head` in `target_modules`", targets=["q_proj", "lm_head"]),
    Kind("`embed_tokens` in `target_modules`", targets=["q_proj", "embed_tokens"]),
    Kind("`target_parameters`", {"target_parameters": ["mlp.experts.down_proj"]}, targets=["q_proj"], base="mixtral"),
    Kind("PiSSA", changed={"init_lora_weights": "pissa"}),
    Kind("OLoRA", changed={"init_lora_weights": "olora"}),
    Kind("`trainable_token_indices`", {"trainable_token_indices": [5, 6]}, targets=["q_proj"]),
    Kind("aLoRA", {"alora_invocation_tokens": [5]}),
    Kind("`layer_replication`", changed={"layer_replication": [[0, 2], [1, 3]]}),
    Kind("another `peft_type` (IA3)", changed={"peft_type": "IA3"}),
    Kind("a setting that nobody knows", changed={"use_new_lora": True}),
    Kind("one weight by two names", edit=_twice),
    Kind("a module of `target_modules` without weights", edit=_without_some),
    Kind("weights of a module that `target_modules` leaves out", changed={"target_modules": ["q_proj"]}),
    Kind("a value that is NaN", edit=_not_a_number),
    Kind("every B zero", edit=_zero),
    Kind("weights that are integers", edit=_cast(torch.int8)),
    Kind(
        "weights of another base's shapes",
        edit=lambda tensors, _: tensors.update(
            {key: tensor[:, :16].contiguous() for key, tensor in tensors.items() if "lora_A" in key}
        ),
    ),
    Kind("`lora_alpha` NaN", configuration=_set(lora_alpha=float("nan"))),
    Kind("`lora_alpha` Infinity", configuration=_set(lora_alpha=float("inf"))),
    Kind('`lora_alpha` "16"', changed={"lora_alpha": "16"}),
    Kind("`lora_alpha` null", changed={"lora_alpha": None}),
    Kind('`use_rslora` "false"', changed={"use_rslora": "false"}),
    Kind("`r` that is not the weights'", changed={"r": 5}),
    Kind("`alpha_pattern` a list", changed={"alpha_pattern": [1, 2]}),
    Kind("`target_modules` that does not compile", changed={"target_modules": "*["}),
    Kind("a configuration of brackets 10,000 deep", configuration=lambda _: "[" * 10_000),
    Kind("a configuration that is no object", configuration=lambda _: "[]"),
)

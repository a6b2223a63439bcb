r"""A gate file of LoRA-Flow's official code as a fusion of this library.

Their gate file ([thunlp/LoRAFlow](https://github.com/thunlp/LoRAFlow)) is a `.pt` state dict with, for each decoder
layer i, `encoder.layers.{i}.lora_fusion_gate.weight` `[k, d]` and `encoder.layers.{i}.weight_bias` `[1, k]`: the gate
$w = \operatorname{softmax}(W x / \tau) + b$ at layer granularity. Its rows are the adapters in the order language,
task; the temperature $\tau$ is not in the file (their code has 1.1 for the Chinese and the Russian math gate, else 1).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraflow.adapters import Adapter, AdapterSource
from loraflow.bases import BaseOptions, load_empty_base
from loraflow.core.architecture import find_decoder_layers
from loraflow.errors import FusionError
from loraflow.methods import LoraFlow
from loraflow.model import FusedModel
from loraflow.prompts import PromptFormat

_KEY = re.compile(r"encoder\.layers\.(?P<layer>\d+)\.(?P<part>lora_fusion_gate\.weight|weight_bias)")
_PARTS = {"lora_fusion_gate.weight": "weight", "weight_bias": "bias"}


def load_official(
    gate: str | Path,
    base: str | Path | PreTrainedModel,
    adapters: Mapping[str, str | Path | AdapterSource | Adapter],
    *,
    temperature: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: PromptFormat | None = None,
    options: BaseOptions | None = None,
) -> FusedModel:
    """Fuse adapters with a gate file of LoRA-Flow's official code.

    Args:
        gate: the gate file.
        base: the base model that it was trained on: Hub id, path, or the loaded model.
        adapters: the adapters in the order of the gate's rows, as PEFT adapters: language first, then task.
        temperature: divisor of the logits, which the file does not hold.
        tokenizer: by default the base's, where `base` is an id or path.
        prompt: how questions become prompts.
        options: precision, placement and quantisation of a base given by id or path.

    Returns:
        The fusion, as if it had been fitted here.

    Raises:
        FusionError: if the file is no such gate file, or not one for this base and these adapters.
    """
    path = Path(gate).expanduser()
    tensors = read_gates(path)
    # Shapes first: weights of a base take long to load.
    empty = base if isinstance(base, nn.Module) else load_empty_base(base, options or BaseOptions())
    layers = find_decoder_layers(empty)
    check_gates(path, tensors, len(layers.layers), layers.hidden_size, list(adapters))
    method = LoraFlow(granularity="layer", temperature=temperature)
    model = FusedModel.from_adapters(base, adapters, method, tokenizer=tokenizer, prompt=prompt, options=options)
    model.load_state_dict(tensors)
    return model


def read_gates(path: Path) -> dict[str, Tensor]:
    """`layers.{i}.weight` and `layers.{i}.bias` of a gate file in float32, read without running any code in it.

    Raises:
        FusionError: if it cannot be read, or holds anything else.
    """
    state = _read(path)
    if not isinstance(state, Mapping) or not state:
        raise FusionError(f"{path} holds {type(state).__name__}, and no state dict of gates. Give the gate file.")
    tensors = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(str(key))
        if match is None:
            raise FusionError(
                f"{path} holds '{key}', which is no part of a gate ('encoder.layers.0.lora_fusion_gate.weight', "
                "'encoder.layers.0.weight_bias'). Give a file that holds the gates alone."
            )
        if not isinstance(tensor, Tensor) or not torch.isfinite(tensor).all():
            raise FusionError(f"{path}: '{key}' is no tensor of finite numbers. Download the file again.")
        tensors[f"layers.{match['layer']}.{_PARTS[match['part']]}"] = _part(path, str(key), match["part"], tensor)
    return tensors


def _read(path: Path) -> object:
    if not path.is_file():
        raise FusionError(f"There is no file {path}. Give LoRA-Flow's gate file (.pt).")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise FusionError(
            f"{path} holds more than tensors, or is damaged: it cannot be read without running code in it "
            f"({type(error).__name__}). Give LoRA-Flow's gate file (.pt)."
        ) from error


def _part(path: Path, key: str, part: str, tensor: Tensor) -> Float[Tensor, "..."]:
    """A gate's weight as it is, or its bias without the axis of length 1.

    Raises:
        FusionError: if its shape is another.
    """
    is_bias = part == "weight_bias"
    if tensor.dim() != 2 or (is_bias and tensor.shape[0] != 1):
        expected = "(1, adapters)" if is_bias else "(adapters, hidden)"
        raise FusionError(
            f"{path}: '{key}' has the shape {tuple(tensor.shape)}, not {expected}. Is it a gate of LoRA-Flow's "
            "official code?"
        )
    return (tensor[0] if is_bias else tensor).float()


def check_gates(path: Path, tensors: Mapping[str, Tensor], layers: int, hidden_size: int, adapters: list[str]) -> None:
    """Check that what `read_gates` found is for a base of so many layers, and for these adapters.

    Raises:
        FusionError: if one is missing, is for a layer that is not there, or has another shape.
    """
    wanted = {f"layers.{i}.{part}" for i in range(layers) for part in _PARTS.values()}
    missing, unknown = wanted - tensors.keys(), tensors.keys() - wanted
    if missing or unknown:
        found = len({key.split(".")[1] for key in tensors})
        what = f"lacks the {_official(min(missing))}" if missing else f"has the {_official(min(unknown))}"
        raise FusionError(
            f"{path} {what}: it has gates for {found} layers, and the base has {layers}. "
            "Give the base that they were trained on, and a whole gate file."
        )
    for key, tensor in tensors.items():
        if tensor.shape[0] != len(adapters):
            raise FusionError(
                f"{path} weighs {tensor.shape[0]} adapters ({_official(key)}), but {len(adapters)} are given: "
                f"{', '.join(adapters)}. Give as many, in the order of its rows (language, then task)."
            )
        if tensor.dim() == 2 and tensor.shape[1] != hidden_size:
            raise FusionError(
                f"{path} reads {tensor.shape[1]} features ({_official(key)}), but the base's hidden size is "
                f"{hidden_size}. Give the base that it was trained on."
            )


def _official(key: str) -> str:
    """A tensor under its name in the official file."""
    _, layer, part = key.split(".")
    names = {ours: theirs for theirs, ours in _PARTS.items()}
    return f"tensor 'encoder.layers.{layer}.{names[part]}'"

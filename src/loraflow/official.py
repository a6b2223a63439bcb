"""A gate file of LoRA-Flow's official code as a fusion of this library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraflow.adapters import Adapter, AdapterSource
from loraflow.bases import BaseOptions, load_empty_base
from loraflow.core.architecture import find_decoder_layers
from loraflow.methods import LoraFlow
from loraflow.model import FusedModel
from loraflow.prompts import PromptFormat
from loraflow.saved.gate_file import check_gates, read_gates


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

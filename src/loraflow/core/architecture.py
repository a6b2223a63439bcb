"""Where the decoder layers of a transformers model are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from loraflow.adapters import Adapter
from loraflow.errors import AdapterError, ArchitectureError

_INPUT = "hidden_states"
# Modules of one parent that read the same tensor, under the names that decoder-only models use.
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model.

    Attributes:
        prefix: module name of their list (`model.layers`).
        layers: the layers, in order.
        hidden_size: width of the residual stream.
    """

    prefix: str
    layers: nn.ModuleList
    hidden_size: int

    def split(self, module_name: str) -> tuple[int, str] | None:
        """The layer index and the name within that layer of a module, or None where it is outside the layers."""
        match = re.match(rf"{re.escape(self.prefix)}\.(\d+)\.(.+)$", module_name)
        return (int(match[1]), match[2]) if match else None


def find_decoder_layers(model: nn.Module) -> DecoderLayers:
    """Find the decoder layers of a decoder-only transformers model.

    Raises:
        ArchitectureError: if the model is none; the message names its class.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ArchitectureError(
            f"{name} is not a transformers model. Load the base with AutoModelForCausalLM, or give its id or path."
        )
    if model.config.is_encoder_decoder:
        raise ArchitectureError(f"{name} is an encoder-decoder model; only decoder-only models can be fused.")
    if not model.can_generate():
        raise ArchitectureError(f"{name} cannot generate text. Load the base with AutoModelForCausalLM.")
    config = model.config.get_text_config(decoder=True)
    candidates = [
        (prefix, module)
        for prefix, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and _reads_stream(module)
    ]
    if len(candidates) > 1:
        # A vision tower may be as deep as the text model.
        inside = set(model.get_decoder().modules())
        candidates = [(prefix, module) for prefix, module in candidates if module in inside]
    if len(candidates) != 1:
        found = ", ".join(prefix for prefix, _ in candidates) or "none"
        raise ArchitectureError(
            f"{name} is not supported: it should have one list of {config.num_hidden_layers} decoder layers whose "
            f"`forward` takes `{_INPUT}` first (found: {found})."
        )
    prefix, layers = candidates[0]
    return DecoderLayers(prefix, layers, config.hidden_size)


def _reads_stream(layers: nn.ModuleList) -> bool:
    def first_argument(layer: nn.Module) -> str:
        return [*inspect.signature(type(layer).forward).parameters, "", ""][1]

    return all(first_argument(layer) == _INPUT for layer in layers)


def check_inside_layers(adapter: Adapter, layers: DecoderLayers) -> None:
    """Check that an adapter only targets modules inside the decoder layers, where fusion weights exist.

    Raises:
        AdapterError: if it targets another module, such as `lm_head`.
    """
    for module_name in adapter.modules:
        if layers.split(module_name) is None:
            raise AdapterError(
                f"Adapter {adapter.name!r} ({adapter.source.path}) targets '{module_name}', which is outside the "
                f"decoder layers ({layers.prefix}); fusion weights exist per layer. Retrain it without that target."
            )


def group_by_input(names: Sequence[str]) -> list[list[str]]:
    """Group one layer's module names into those that read the same input; the rest stay alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        siblings = next((family for family in _SHARED_INPUTS if leaf in family), (leaf,))
        groups.setdefault((parent, *siblings), []).append(name)
    return list(groups.values())

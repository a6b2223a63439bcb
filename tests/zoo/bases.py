"""Random models of any architecture that transformers has, small enough for milliseconds.

Their configurations are the architecture's own with sizes made small by the names of the fields, so that a new
architecture needs no line here unless it has sizes of its own; those are in `OVERRIDES`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.zoo.overrides import NEVER_NONE, OVERRIDES, SIZES

VOCAB = 128
FIRST_WORD = 64
"""Token ids below are special to one architecture or another: padding, beginnings and ends, images."""


@dataclass(frozen=True)
class Base:
    """A small random model.

    Attributes:
        architecture: its `model_type`.
        model: the model, in evaluation mode.
        precise: whether it computes in float64 up to its logits.
        unused: a copy of the model that has answered nothing: some keep what they saw of the last prompt.
    """

    architecture: str
    model: PreTrainedModel
    precise: bool
    unused: PreTrainedModel


class NotBuilt(Exception):  # noqa: N818 (an outcome, not an error)
    """An architecture that cannot be built here, or does not run by itself."""


def architectures() -> list[str]:
    """Every `model_type` that generates text, by itself or from images."""
    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]))


def class_name(architecture: str) -> str:
    """The class that transformers' auto classes choose for it."""
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return str(names[architecture])


def small_config(architecture: str) -> PreTrainedConfig:
    """The architecture's own configuration with small sizes."""
    config_class = CONFIG_MAPPING[architecture]
    changes = OVERRIDES.get(architecture, {})
    # Some have no default for a part of theirs; the changes have it then.
    needed = {key: value for key, value in changes.items() if key in config_class.sub_configs}
    try:
        default = config_class()
    except (TypeError, ValueError):
        default = config_class(**needed)
    return config_class(**_merge(_small_fields(default), changes))


def small_model(architecture: str, seed: int = 0) -> Base:
    """A random model of an architecture.

    Raises:
        NotBuilt: if it cannot be made, or its own forward fails.
    """
    torch.manual_seed(seed)
    try:
        with silent():
            config = small_config(architecture)
            # The grouped kernels of the experts know no float64.
            model = _auto_class(architecture).from_config(config, dtype=torch.float32, experts_implementation="eager")
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {first_line(error)}") from error
    _randomise(model)
    if model.can_generate():
        model.generation_config.pad_token_id = 0
    model.eval()
    with contextlib.suppress(Exception):
        unused = copy.deepcopy(model.double())
        # Some give float32 whatever they are in.
        return Base(architecture, model, _try_forward(model) == torch.float64, unused)
    try:
        unused = copy.deepcopy(model.float())
        _try_forward(model)
    except Exception as error:
        raise NotBuilt(f"its forward: {type(error).__name__}: {first_line(error)}") from error
    return Base(architecture, model, False, unused)


def _auto_class(architecture: str) -> type:
    return AutoModelForCausalLM if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText


def _small_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that are to be smaller, those of its parts below them."""
    fields = {key: value for key, value in config.to_dict().items() if key not in config.sub_configs}
    small: dict[str, Any] = {}
    specials = 3
    for key, value in fields.items():
        if isinstance(value, bool):
            continue
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
            known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            small[key] = known.get(key, specials)
            specials += key not in known
        elif key == "num_key_value_heads" and value == fields.get("num_attention_heads"):
            small[key] = SIZES["num_attention_heads"]
        elif key in NEVER_NONE or (key in SIZES and isinstance(value, int) and value):
            small[key] = SIZES[key]
        elif key in ("image_size", "patch_size") and isinstance(value, list | tuple):
            small[key] = [SIZES[key]] * len(value)
    if "is_decoder" in fields:
        small["is_decoder"] = True
    small |= _kinds_of_layers(fields)
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            small[key] = {"model_type": part.model_type, **_small_fields(part)}
    return small


def _kinds_of_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that say something of each layer, for one layer of each kind."""
    count = fields.get("num_hidden_layers")
    by_layer = {
        key: value
        for key, value in fields.items()
        if isinstance(value, list) and len(value) == count and isinstance(value[0], str | int | float)
    }
    if not by_layer:
        return {}
    kinds = list(zip(*by_layer.values(), strict=True))
    chosen = [index for index, kind in enumerate(kinds) if kinds.index(kind) == index]
    if len(chosen) == 1:
        chosen *= 2
    return {"num_hidden_layers": len(chosen)} | {
        key: [value[index] for index in chosen] for key, value in by_layer.items()
    }


def _merge(fields: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if inner else value
    # `...` leaves a field to the configuration itself.
    return {key: value for key, value in merged.items() if value is not ...}


def _randomise(model: PreTrainedModel) -> None:
    # Default initialisation is nearly zero at this size: logits that hardly differ would hide errors.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)


@torch.no_grad()
def _try_forward(model: PreTrainedModel) -> torch.dtype:
    ids = torch.arange(FIRST_WORD, FIRST_WORD + 10).view(2, 5)
    with silent():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")
    return logits.dtype


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without warnings, and without what libraries print."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return " ".join(line.strip() for line in lines)[:300]

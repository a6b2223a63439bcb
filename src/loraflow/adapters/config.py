"""`adapter_config.json`: read as a whole, each setting by its type, and refused where it cannot be fused exactly."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from loraflow.adapters.foreign import kind_of_config, kind_of_setting
from loraflow.errors import AdapterError, did_you_mean

if TYPE_CHECKING:  # PEFT is imported where it is used: it imports bitsandbytes, which takes a second and may print.
    from peft import LoraConfig

# Settings that decide the mathematics: they are part of the digest, so that a changed alpha is a changed adapter.
MATHS = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern")

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
    "monteclora_config": f"MonteCLoRA samples its weights. {_REMEDY_PLAIN}",
    "trainable_token_indices": "it replaces token embeddings. Retrain without `trainable_token_indices`.",
    "use_bdlora": f"BD-LoRA's block-diagonal factors are not supported. {_REMEDY_PLAIN}",
    "use_qalora": f"QALoRA pools its input by groups. {_REMEDY_PLAIN}",
    "velora_config": f"VeLoRA is not supported. {_REMEDY_PLAIN}",
}
# Initialisations that move part of W into B A, so that PEFT's W is no longer the base's; and those that leave it.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BASE_KEEPING_INITS = ("gaussian", "eva", "orthogonal", "mica")


def _finite(value: int | float) -> int | float:
    # Beyond float32 it becomes infinite as soon as it meets a tensor.
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError("it is not finite")
    return value


def _not_zero(value: int | float) -> int | float:
    if value == 0:
        raise ValueError("with 0 the adapter changes nothing")
    return value


def _fits_in(form: str) -> AfterValidator:
    """That a string is a regular expression as PEFT uses it, inside another one."""

    def check(pattern: str) -> str:
        try:
            re.compile(form.format(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    return AfterValidator(check)


_Alpha = Annotated[int | float, AfterValidator(_finite), AfterValidator(_not_zero)]
_Rank = Annotated[int, Field(ge=1)]
_Index = Annotated[int, Field(ge=0)]
_Whole = Annotated[str, _fits_in("{}")]
_OfModule = Annotated[str, _fits_in(r"(.*\.)?({})$")]
_OfLayers = Annotated[str, _fits_in(r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")]
_OfSaved = Annotated[str, _fits_in(r"(^|.*\.){}($|\..*)")]

_MODULES = "a list of module names, or one regular expression that fits them whole"
_FLAG = "true or false"
_TEXT = "a string, or null"
_OBJECT = "an object, or null"


class Settings(BaseModel):
    """PEFT's settings of a LoRA that can be fused, as they stand in the file; null is off, as PEFT takes it."""

    model_config = ConfigDict(strict=True, extra="allow")

    r: _Rank = Field(8, description="a whole number of at least 1")
    lora_alpha: _Alpha = Field(8, description="a finite number other than 0")
    use_rslora: bool | None = Field(None, description=_FLAG)
    use_dora: bool | None = Field(None, description=_FLAG)
    lora_bias: bool | None = Field(None, description=_FLAG)
    rank_pattern: dict[_OfModule, _Rank] | None = Field(
        None, description="an object of ranks, whole numbers of at least 1, by regular expressions for module names"
    )
    alpha_pattern: dict[_OfModule, _Alpha] | None = Field(
        None, description="an object of finite numbers other than 0, by regular expressions for module names"
    )

    # What chooses modules.
    target_modules: list[str] | _Whole | None = Field(None, description=_MODULES)
    target_parameters: list[str] | None = Field(None, description="a list of parameter names, or null")
    exclude_modules: list[str] | _Whole | None = Field(None, description=_MODULES)
    layers_to_transform: list[_Index] | _Index | None = Field(
        None, description="a layer's index, or a list of them, whole numbers from 0 on"
    )
    layers_pattern: list[_OfLayers] | _OfLayers | None = Field(
        None, description="the name of the list of layers, or a list of such names, as regular expressions"
    )
    modules_to_save: list[_OfSaved] | None = Field(None, description="a list of module names, or null")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="'none', 'all' or 'lora_only'")
    fan_in_fan_out: bool | None = Field(None, description=_FLAG)

    # What describes the training, or only matters in it. Converting to plain LoRA, PEFT leaves the settings of CorDA,
    # LoftQ and LoRA-GA; see `init_lora_weights`.
    init_lora_weights: bool | str | None = Field(None, description="true, false, or the name of an initialisation")
    lora_dropout: Annotated[int | float, Field(ge=0, le=1)] = Field(0.0, description="a number from 0 to 1")
    ensure_weight_tying: bool | None = Field(None, description=_FLAG)
    qalora_group_size: int | None = Field(None, description="a whole number")
    corda_config: dict[str, Any] | None = Field(None, description=_OBJECT)
    eva_config: dict[str, Any] | None = Field(None, description=_OBJECT)
    loftq_config: dict[str, Any] | None = Field(None, description=_OBJECT)
    lora_ga_config: dict[str, Any] | None = Field(None, description=_OBJECT)
    megatron_core: str | None = Field(None, description=_TEXT)
    runtime_config: dict[str, Any] | None = Field(None, description=_OBJECT)

    # What says whose it is.
    peft_type: str = Field("LORA", description="'LORA'")
    peft_version: str | None = Field(None, description=_TEXT)
    task_type: str | None = Field(None, description=_TEXT)
    auto_mapping: dict[str, Any] | None = Field(None, description=_OBJECT)
    base_model_name_or_path: str | None = Field(None, description=_TEXT)
    revision: str | None = Field(None, description=_TEXT)
    inference_mode: bool | None = Field(None, description=_FLAG)


def read_config(name: str, path: Path) -> LoraConfig:
    """PEFT's configuration of an adapter.

    Raises:
        AdapterError: if the file cannot be read, a setting is not of its type, or it describes what cannot be fused
            exactly.
    """
    from peft import LoraConfig

    raw = _read_object(name, path)
    _refuse_other_kinds(name, path, raw)
    _check_types(name, path, raw)
    _refuse_unfusable(name, path, raw)
    known = {f.name for f in fields(LoraConfig)}
    try:
        return LoraConfig(**{key: value for key, value in raw.items() if key in known})
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"Adapter {name!r}: PEFT cannot read {path}: {str(error).strip(' .')}. Correct it there, or save the "
            "adapter again."
        ) from error


def _read_object(name: str, path: Path) -> dict[str, Any]:
    try:
        # Editors on Windows put a byte-order mark before it.
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AdapterError(f"Adapter {name!r}: {path} cannot be read ({error}). Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"Adapter {name!r}: {path} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"Adapter {name!r}: {path} holds a {type(config).__name__}, not an object. Save the adapter again."
        )
    return config


def _refuse_other_kinds(name: str, path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") == "LORA":
        return
    found = kind_of_config(config)
    if "peft_type" not in config and found is not None:
        kind, setting = found
        raise AdapterError(
            f"Adapter {name!r} cannot be fused: {path} has `{setting}` = {_short(config[setting])}: it is of "
            f"{kind.name}, not of PEFT. {kind.remedy}"
        )
    raise AdapterError(
        f"Adapter {name!r} cannot be fused: {path} has `peft_type` = {_short(config.get('peft_type'))}: only 'LORA' "
        "adapters can be fused. Give a LoRA adapter."
    )


def _check_types(name: str, path: Path, config: Mapping[str, Any]) -> None:
    try:
        Settings.model_validate(config)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # Of a union, that alternative tells most whose type was right and whose value was not.
        first = next((entry for entry in found if entry["type"] == "value_error"), found[0])
        setting = str(first["loc"][0])
        reason = f" ({first['ctx']['error']})" if first["type"] == "value_error" else ""
        raise AdapterError(
            f"Adapter {name!r}: `{setting}` (={_short(config[setting])}) in {path} must be "
            f"{Settings.model_fields[setting].description}{reason}. Correct it there, or save the adapter again."
        ) from error


def _refuse_unfusable(name: str, path: Path, config: Mapping[str, Any]) -> None:
    def refuse(key: str, why: str) -> AdapterError:
        return AdapterError(f"Adapter {name!r} cannot be fused: {path} has `{key}` = {_short(config[key])}: {why}")

    init = config.get("init_lora_weights")
    if isinstance(init, str):
        if init.lower().startswith(_BASE_CHANGING_INITS):
            raise refuse("init_lora_weights", f"this initialisation changed the base weights. {_REMEDY_CONVERT}")
        if init.lower() not in _BASE_KEEPING_INITS:
            known = did_you_mean(init, (*_BASE_KEEPING_INITS, *_BASE_CHANGING_INITS))
            raise refuse(
                "init_lora_weights",
                f"whether this initialisation changed the base weights is unknown. {known} Set it to true if not.",
            )
    for key, value in config.items():
        if value and key not in Settings.model_fields:
            raise refuse(key, REFUSED.get(key) or _unknown(key))


def _unknown(setting: str) -> str:
    kind = kind_of_setting(setting)
    if kind is not None:
        return f"it is a setting of {kind.name}, not of PEFT's LoRA, and may change the mathematics. {kind.remedy}"
    import peft

    return (
        "this setting is unknown to this version of loraflow. If a PEFT newer than "
        f"{peft.__version__} wrote it, update loraflow and PEFT; if it is another trainer's and only describes the "
        "training, remove it from the file."
    )


def _short(value: Any) -> str:
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 120
    return shortened.repr(value)

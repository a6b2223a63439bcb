"""Adapters saved under other names than a base's modules have: renamed as PEFT renames them when it loads."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from loraflow.adapters.base import Adapter
from loraflow.adapters.keys import KEY_PREFIX, read_modules, write_keys
from loraflow.errors import AdapterError

if TYPE_CHECKING:
    from peft import LoraConfig


def renamed_for(adapter: Adapter, base: nn.Module) -> Adapter:
    """The adapter by the names that a base's modules have.

    transformers moves modules (the language model of multimodal models, in 4.52) and keeps tables of old names; PEFT
    goes by them. Patterns for ranks and alphas are taken by the new names, as PEFT takes them.

    Raises:
        AdapterError: if two modules fall onto one.
    """
    before = write_keys(adapter.modules)
    adapter = dataclasses.replace(adapter, config=_config_for(adapter, base))
    after = _converted(adapter, base, before)
    if after.keys() == before.keys():
        return adapter
    _check_none_lost(adapter, base, before, after)
    values = not any(tensor.is_meta for tensor in after.values())
    modules, _ = read_modules(adapter.name, adapter.source.path, adapter.config, after, values=values)
    return dataclasses.replace(adapter, modules=modules)


def _config_for(adapter: Adapter, base: nn.Module) -> LoraConfig:
    """The configuration as PEFT reads it for a base whose experts became one parameter since the adapter's time.

    Raises:
        AdapterError: if only a part of what became one parameter is adapted.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    # PEFT changes it in place; the adapter's own is for any base.
    config = copy.deepcopy(adapter.config)
    try:
        convert_peft_config_for_transformers(config, base, None)
    except ValueError as error:
        raise AdapterError(
            f"Adapter {adapter.name!r} ({adapter.source.path}): PEFT cannot read it for {type(base).__name__}, whose "
            f"experts are one parameter: {error} Retrain it with both, or with neither."
        ) from error
    return config


def _converted(adapter: Adapter, base: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    tensors = _by_own_table(adapter, base, tensors)
    try:
        return convert_peft_adapter_state_dict_for_transformers(base, adapter.config, tensors)
    except (ValueError, RuntimeError) as error:
        raise AdapterError(
            f"Adapter {adapter.name!r} ({adapter.source.path}): PEFT cannot rename its keys for {type(base).__name__}: "
            f"{str(error).strip(' .')}. Save it again with the transformers that the base is loaded with."
        ) from error


def _by_own_table(adapter: Adapter, base: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys renamed by the table that a model with code of its own may bring: the first entry that fits counts."""
    table: Mapping[str, str] = getattr(base, "_checkpoint_conversion_mapping", None) or {}
    renamed: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(KEY_PREFIX)
        found = (re.subn(old, new, bare) for old, new in table.items())
        new_key = KEY_PREFIX + next((name for name, count in found if count), bare)
        if new_key in origins:
            raise _collision(adapter, base, origins[new_key], key, new_key)
        renamed[new_key], origins[new_key] = tensor, key
    return renamed


def _check_none_lost(
    adapter: Adapter, base: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Check that no key fell onto another: PEFT takes the first of them, without a word."""
    names = {id(tensor): key for key, tensor in before.items()}
    kept = {id(tensor) for tensor in after.values()}
    lost = {key: tensor for key, tensor in before.items() if id(tensor) not in kept}
    for new_key, tensor in _converted(adapter, base, lost).items() if lost else ():
        # Tensors that were put together into a new one are not lost, and that one has no name in the file.
        if id(tensor) in names and id(after.get(new_key)) in names:
            raise _collision(adapter, base, names[id(after[new_key])], names[id(tensor)], new_key)


def _collision(adapter: Adapter, base: nn.Module, first: str, second: str, new_key: str) -> AdapterError:
    return AdapterError(
        f"Adapter {adapter.name!r} ({adapter.source.path}): '{first}' and '{second}' are both '{new_key}' of "
        f"{type(base).__name__}, and which of them counts is not said. Save the adapter again with one of them."
    )

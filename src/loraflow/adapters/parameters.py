"""Adapters of bare parameters (PEFT's `target_parameters`): the stacked experts of mixture models, and their routers.

PEFT wraps a module once for each of its adapted parameters, so a file names the depth of the wrapping and not the
parameter (`mlp.experts.base_layer.lora_A.weight`); and it has the experts' matrices in one: A by expert, B by rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from torch import nn

from loraflow.adapters.base import CONFIG_FILE, Adapter, LoraModule
from loraflow.adapters.keys import WRAPPED, rank_and_scaling
from loraflow.errors import AdapterError

if TYPE_CHECKING:
    from peft import LoraConfig


def place_parameters(adapter: Adapter, base: nn.Module, linears: Collection[str]) -> Adapter:
    """The adapter with updates of bare parameters by the parameters' names, and by the module's where it is a linear.

    Raises:
        AdapterError: if the file lacks a parameter that its own configuration targets, or has another rank for it.
    """
    modules = dict(adapter.modules)
    for module_name, names in _targeted(adapter.config, base):
        module = base.get_submodule(module_name)
        # The first parameter is wrapped first, so it lies deepest.
        for depth, name in enumerate(reversed(names)):
            parameter = f"{module_name}.{name}"
            where = module_name if module_name in linears and name == "weight" else parameter
            if adapter.placed and where in modules:
                continue
            update = modules.pop(module_name + WRAPPED * depth, None)
            if update is None and len(names) == 1:
                # PEFT names those of old files so whether or not the other parameter is adapted, and then loses them.
                update = modules.pop(module_name + WRAPPED, None)
            if update is None:
                raise AdapterError(
                    f"Adapter {adapter.name!r} ({adapter.source.path}): `target_parameters` of {CONFIG_FILE} includes "
                    f"'{parameter}', but the file has no weights for it. Save the adapter again."
                )
            shape = getattr(module, name).shape
            experts = shape[0] if len(shape) == 3 else 1
            modules[where] = _of_parameter(adapter, parameter, update, experts)
    return dataclasses.replace(adapter, modules=modules, placed=True)


def _targeted(config: LoraConfig, base: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Modules and those of their own parameters that are adapted, in PEFT's order."""
    targets = sorted(config.target_parameters or [])
    for module_name, module in base.named_modules() if targets else ():
        names = [
            name
            for name, _ in module.named_parameters(recurse=False)
            if f"{module_name}.{name}" in targets or f"{module_name}.{name}".endswith(tuple(f".{t}" for t in targets))
        ]
        if names:
            yield module_name, names


def _of_parameter(adapter: Adapter, parameter: str, update: LoraModule, experts: int) -> LoraModule:
    rank, scaling = rank_and_scaling(adapter.config, parameter)
    if update.lora_A.shape[0] != rank * experts or update.magnitude is not None or update.bias is not None:
        raise AdapterError(
            f"Adapter {adapter.name!r} ({adapter.source.path}): '{parameter}' has lora_A {tuple(update.lora_A.shape)} "
            f"and lora_B {tuple(update.lora_B.shape)}, but {CONFIG_FILE} says rank {rank} for each of {experts} "
            "experts, and of bare parameters there is plain LoRA only. Save the adapter again."
        )
    # By expert, as A is.
    lora_B = update.lora_B.unflatten(1, (rank, experts)).transpose(1, 2).flatten(1)
    return LoraModule(update.lora_A, lora_B, scaling, experts=experts)

"""An adapter against a base: every tensor has its place there, and none is missing."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from loraflow.adapters.base import CONFIG_FILE, WEIGHTS_FILE, Adapter, LoraModule
from loraflow.adapters.copies import check_copies
from loraflow.adapters.keys import KEY_PREFIX
from loraflow.adapters.parameters import place_parameters
from loraflow.adapters.renames import renamed_for
from loraflow.errors import AdapterError, did_you_mean


def match_adapter(adapter: Adapter, base: nn.Module) -> Adapter:
    """Check that every tensor of an adapter has its place in a base model, and that none is missing.

    The base may be on the meta device; copies of its parameters in the file are compared in shape alone then.

    Returns:
        The adapter, by the names that the base's modules have.

    Raises:
        AdapterError: if a key matches nothing, a shape differs, the file and its own configuration disagree about what
            is adapted, or parameters of the base that were saved with it are other than the base's.
    """
    linears = dict(_linears(base))
    adapter = place_parameters(renamed_for(adapter, base), base, linears)
    places = linears | _parameters(adapter, base)
    for module_name, module in adapter.modules.items():
        if module_name not in places:
            raise AdapterError(
                f"Adapter {adapter.name!r} ({adapter.source.path}): key '{KEY_PREFIX}{module_name}.lora_A.weight' "
                f"matches no linear module of {type(base).__name__}.{_nearest(module_name, linears)} "
                "Is it an adapter of another base model?"
            )
        _check_vectors(adapter, module_name, module)
        expected = places[module_name]
        found = (module.lora_A.shape[1], module.lora_B.shape[0])
        if found != expected:
            raise AdapterError(
                f"Adapter {adapter.name!r} ({adapter.source.path}): '{module_name}' maps {found[0]} to {found[1]} "
                f"features, but the base's maps {expected[0]} to {expected[1]}. It was trained on another base "
                f"({adapter.config.base_model_name_or_path!r}): give that base, or another adapter."
            )
    _check_targets(adapter, base, linears)
    check_copies(adapter, base)
    return adapter


def _check_targets(adapter: Adapter, base: nn.Module, linears: Collection[str]) -> None:
    """Check that the file has what its configuration targets, and no more: PEFT would leave the rest out."""
    from peft.tuners import tuners_utils

    if adapter.config.target_modules is None:
        return
    adapted = {name: None for name in adapter.modules if name in linears}
    # PEFT resolves "all-linear" in place; this adapter's own configuration is for any base.
    config = tuners_utils._maybe_include_all_linear_layers(copy.copy(adapter.config), base)
    targeted = {name for name in linears if tuners_utils.check_target_module_exists(config, name)}
    missing = [name for name in linears if name in targeted and name not in adapted]
    if missing:
        raise AdapterError(
            f"Adapter {adapter.name!r} ({adapter.source.path}): `target_modules` of {CONFIG_FILE} includes "
            f"'{missing[0]}' ({len(missing)} such), but {WEIGHTS_FILE} has no weights for it. Save the adapter again."
        )
    parameters = tuple(adapter.config.target_parameters or ())
    more = [name for name in adapted if name not in targeted and not f"{name}.weight".endswith(parameters)]
    if more:
        raise AdapterError(
            f"Adapter {adapter.name!r} ({adapter.source.path}): {WEIGHTS_FILE} has weights for '{more[0]}' "
            f"({len(more)} such), which the settings of {CONFIG_FILE} that choose modules leave out "
            f"(`target_modules` = {reprlib.repr(adapter.config.target_modules)}), and PEFT with them. Set "
            "`target_modules` to null there to fuse all that the file has."
        )


def _parameters(adapter: Adapter, base: nn.Module) -> dict[str, tuple[int, int]]:
    """The bare parameters among what an adapter updates, with (in_features, out_features) of each expert."""
    found = {}
    parameters = dict(base.named_parameters()) if adapter.config.target_parameters else {}
    for name in adapter.modules:
        if name in parameters:
            rows, columns = parameters[name].shape[-2:]
            # Experts are stored either way round; two-dimensional parameters as linears are.
            transposed = getattr(base.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
            found[name] = (rows, columns) if transposed and parameters[name].dim() == 3 else (columns, rows)
    return found


def _check_vectors(adapter: Adapter, module_name: str, module: LoraModule) -> None:
    out_features = module.lora_B.shape[0]
    for part, vector in (("lora_B.bias", module.bias), ("lora_magnitude_vector", module.magnitude)):
        if vector is not None and vector.numel() != out_features:
            raise AdapterError(
                f"Adapter {adapter.name!r} ({adapter.source.path}): '{module_name}.{part}' has {vector.numel()} values "
                f"for {out_features} output features. Save the adapter again."
            )


def _nearest(module_name: str, linears: Mapping[str, Any]) -> str:
    guess = did_you_mean(module_name, linears).partition("Did you mean ")[2]
    return f" The nearest is {guess.rstrip('?')}." if guess else ""


def _linears(base: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every linear module of a model, quantised ones included, with (in_features, out_features)."""
    from peft.tuners.tuners_utils import _get_in_out_features

    for name, module in base.named_modules():
        # PEFT's function warns about every module that is no linear; quantised linears have these attributes too.
        if isinstance(module, Conv1D) or hasattr(module, "in_features") or hasattr(module, "infeatures"):
            in_features, out_features = _get_in_out_features(module)
            if in_features is not None and out_features is not None:
                yield name, (in_features, out_features)

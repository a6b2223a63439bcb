"""What gives the fusion weights: the contract in `base`, and one small file for each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from loraflow.errors import MethodError, did_you_mean
from loraflow.methods.base import Method, Site
from loraflow.methods.lora_flow import LoraFlow
from loraflow.methods.static import Average, Base, Static

METHODS: dict[str, type[Method]] = {method.name: method for method in (Base, Average, Static, LoraFlow)}

__all__ = ["METHODS", "Average", "Base", "LoraFlow", "Method", "Site", "Static", "get_method"]


def get_method(method: str | Method, adapters: Sequence[str], parameters: Mapping[str, Any] | None = None) -> Method:
    """Resolve a method's name, an adapter's name (that adapter alone), or a method object, and check it.

    Args:
        method: the name or the object.
        adapters: names of the adapters that are to be fused, in order.
        parameters: parameters of a method given by name.

    Returns:
        The method.

    Raises:
        MethodError: if the name is unknown, or a parameter is.
    """
    if isinstance(method, str):
        method = _by_name(method, adapters, parameters or {})
    elif parameters:
        raise MethodError(f"Parameters {sorted(parameters)} were given beside a method object. Set them on the object.")
    method.check(adapters)
    return method


def _by_name(name: str, adapters: Sequence[str], parameters: Mapping[str, Any]) -> Method:
    if name in adapters:
        if parameters:
            raise MethodError(
                f"The adapter {name!r} alone takes no parameters, found {sorted(parameters)}. Leave them out."
            )
        return Static({name: 1.0})
    if name not in METHODS:
        raise MethodError(f"Unknown method {name!r}. {did_you_mean(name, [*METHODS, *adapters])}")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for parameter in parameters:
        if parameter not in known:
            raise MethodError(f"Method {name!r} has no parameter {parameter!r}. {did_you_mean(parameter, known)}")
    return METHODS[name](**parameters)

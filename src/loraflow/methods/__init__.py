"""What gives the fusion weights: the contract in `base`, and one small file for each method."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from loraflow.errors import MethodError, did_you_mean
from loraflow.methods.adapter_core import AdapterCore
from loraflow.methods.arrow import Arrow
from loraflow.methods.base import Method, QueryMethod, ScoredMethod, Site
from loraflow.methods.centroid import Centroid
from loraflow.methods.lag import Lag
from loraflow.methods.learned_static import LearnedStatic
from loraflow.methods.logo import Logo
from loraflow.methods.lora_flow import LoraFlow
from loraflow.methods.lora_retriever import LoraRetriever
from loraflow.methods.lorahub import LoraHub
from loraflow.methods.norm_max import NormMax
from loraflow.methods.on_top import PARAMETER, OnTop
from loraflow.methods.phatgoose import Phatgoose
from loraflow.methods.qa_flora import QaFlora
from loraflow.methods.ramole import Ramole
from loraflow.methods.spectr import SpectR
from loraflow.methods.static import Average, Base, Static

ENTRY_POINTS = "loraflow.methods"

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Base,
        Average,
        Static,
        LearnedStatic,
        LoraHub,
        QaFlora,
        Logo,
        Centroid,
        LoraRetriever,
        Arrow,
        SpectR,
        NormMax,
        Lag,
        Phatgoose,
        Ramole,
        LoraFlow,
        AdapterCore,
    )
}

__all__ = [
    "METHODS",
    "AdapterCore",
    "Arrow",
    "Average",
    "Base",
    "Centroid",
    "Lag",
    "LearnedStatic",
    "Logo",
    "LoraFlow",
    "LoraHub",
    "LoraRetriever",
    "Method",
    "NormMax",
    "OnTop",
    "Phatgoose",
    "QaFlora",
    "QueryMethod",
    "Ramole",
    "ScoredMethod",
    "Site",
    "SpectR",
    "Static",
    "get_method",
    "make_method",
    "method_names",
]


def method_names() -> list[str]:
    """Names of all methods that can be used here, those of other packages included."""
    return [*METHODS, *sorted({point.name for point in entry_points(group=ENTRY_POINTS)} - METHODS.keys())]


def make_method(name: str, parameters: Mapping[str, Any]) -> Method:
    """A method from its name and parameters, as they are saved.

    Raises:
        MethodError: if the name is unknown, or a parameter is.
    """
    found = _find(name)
    if PARAMETER in parameters:
        names = parameters[PARAMETER]
        rest = {key: value for key, value in parameters.items() if key != PARAMETER}
        return OnTop(make_method(name, rest), tuple(names) if isinstance(names, list) else names)
    known = [field.name for field in dataclasses.fields(found)]
    for parameter in parameters:
        if parameter not in known:
            raise MethodError(f"Method {name!r} has no parameter {parameter!r}. {did_you_mean(parameter, known)}")
    return found(**parameters)


def get_method(
    method: str | Method | Mapping[str, float], adapters: Sequence[str], parameters: Mapping[str, Any] | None = None
) -> Method:
    """Resolve a method's name, an adapter's name (that adapter alone), weights, or a method object, and check it.

    Args:
        method: the name, fusion weights by adapter name, or the object.
        adapters: names of the adapters that are to be fused, in order.
        parameters: parameters of a method given by name.

    Raises:
        MethodError: if the name is unknown, or a parameter is, or it is something else.
    """
    if isinstance(method, str):
        method = _by_name(method, adapters, parameters or {})
    elif parameters:
        raise MethodError(f"Parameters {sorted(parameters)} were given beside a method object. Set them on the object.")
    elif isinstance(method, Mapping):
        method = Static(method)
    elif not isinstance(method, Method):
        raise MethodError(f"{method!r} is no method. Give a name, weights by adapter name, or a method object.")
    method.check(adapters)
    return method


def _by_name(name: str, adapters: Sequence[str], parameters: Mapping[str, Any]) -> Method:
    if name in adapters:
        if parameters:
            raise MethodError(
                f"The adapter {name!r} alone takes no parameters, found {sorted(parameters)}. Leave them out."
            )
        return Static({name: 1.0})
    # Looking for other packages takes milliseconds.
    if name not in METHODS and name not in method_names():
        raise MethodError(f"Unknown method {name!r}. {did_you_mean(name, [*method_names(), *adapters])}")
    return make_method(name, parameters)


def _find(name: str) -> type[Method]:
    if name in METHODS:
        return METHODS[name]
    points = [point for point in entry_points(group=ENTRY_POINTS) if point.name == name]
    if not points:
        raise MethodError(f"Unknown method {name!r}. {did_you_mean(name, method_names())}")
    point = points[0]
    package = point.dist.name if point.dist is not None else point.value
    try:
        found = point.load()
    except Exception as error:
        raise MethodError(f"The method {name!r} of the package {package!r} cannot be imported: {error}.") from error
    if not (inspect.isclass(found) and issubclass(found, Method) and getattr(found, "name", None) == name):
        raise MethodError(
            f"The entry point {name!r} of the package {package!r} is {point.value}, which is no method of that name. "
            "It must be a subclass of `loraflow.Method` whose `name` is the entry point's."
        )
    return found

"""Several adapters merged into one ordinary adapter, of their weights alone.

A merge reads the adapters once and forgets them: what it gives is one LoRA, which costs what one LoRA costs and runs
wherever LoRAs run. A fusion keeps the adapters apart, and can weigh them anew for every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from loraflow.errors import MethodError, did_you_mean
from loraflow.merging.base import Merge, Update, truncated
from loraflow.merging.core_space import CoreIsoC, CoreSum, CoreTies
from loraflow.merging.knots import KnotsDareTies, KnotsTies
from loraflow.merging.lego import Lego
from loraflow.merging.merged import Loss, Merged, loss_from, merge_adapters
from loraflow.merging.parameters import DareLinear, DareTies, Linear, MagnitudePrune, Ties
from loraflow.merging.sum import Sum

MERGES: dict[str, type[Merge]] = {
    merge.name: merge
    for merge in (
        Sum,
        Linear,
        Ties,
        DareLinear,
        DareTies,
        MagnitudePrune,
        KnotsTies,
        KnotsDareTies,
        CoreSum,
        CoreTies,
        CoreIsoC,
        Lego,
    )
}

__all__ = [
    "MERGES",
    "CoreIsoC",
    "CoreSum",
    "CoreTies",
    "DareLinear",
    "DareTies",
    "KnotsDareTies",
    "KnotsTies",
    "Lego",
    "Linear",
    "Loss",
    "MagnitudePrune",
    "Merge",
    "Merged",
    "Sum",
    "Ties",
    "Update",
    "loss_from",
    "make_merge",
    "merge_adapters",
    "truncated",
]


def make_merge(name: str, options: Mapping[str, Any] | None = None) -> Merge:
    """A merge from its name and options.

    Raises:
        MethodError: if the name is unknown, or an option is.
    """
    if name not in MERGES:
        raise MethodError(f"Unknown merge {name!r}. {did_you_mean(name, MERGES)}")
    found = MERGES[name]
    known = [field.name for field in dataclasses.fields(found)]
    for option in options or {}:
        if option not in known:
            raise MethodError(f"The merge {name!r} has no option {option!r}. {did_you_mean(option, known)}")
    return found(**(options or {}))

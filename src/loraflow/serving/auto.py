"""The model `auto`, which picks adapters by the request; light, for the command line reads the defaults here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraflow.errors import LoraflowError, MethodError, did_you_mean

AUTO = "auto"
"""What requests call it."""

TOP_K = 3
"""How many adapters are picked where nobody says it: LoraRetriever's number (arXiv 2402.09997)."""


@dataclass(frozen=True)
class Picking:
    """What may be picked for one request.

    Attributes:
        adapters: the candidates.
        top_k: how many of them are picked at most; None where the method says it.
        floor: one that scores less is not picked; None for no floor.
    """

    adapters: tuple[str, ...]
    top_k: int | None
    floor: float | None


@dataclass(frozen=True)
class Auto:
    """What picks, where a request says nothing else.

    Attributes:
        method: name of a method that learns nothing, which picks from all adapters that are offered; or of a fusion
            that is, whose method picks from its own.
        options: parameters of a method given by name.
        top_k: how many adapters are picked at most; by default `TOP_K`, and of methods that weigh each token their own.
        floor: an adapter that scores less is not picked, and where all do, the base answers alone.

    Raises:
        LoraflowError: if a number cannot be what it is.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    top_k: int | None = None
    floor: float | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k < 1):
            raise LoraflowError(f"The `top_k` of `{AUTO}` (={self.top_k!r}) must be at least 1.")
        if self.floor is not None and not math.isfinite(self.floor):
            raise LoraflowError(f"The `floor` of `{AUTO}` (={self.floor}) must be a finite number. Leave it out.")

    def picking(
        self, known: Sequence[str], adapters: Sequence[str] | None, top_k: int | None, floor: float | None
    ) -> Picking:
        """What may be picked for one request.

        Args:
            known: the adapters that there are.
            adapters: those of them that the request allows; None for all.
            top_k: how many it wants at most; None for what the server says.
            floor: what they must score; None for what the server says.

        Raises:
            MethodError: if there are no adapters, or the request names one that is not there, or twice.
        """
        if not known:
            raise MethodError(f"There are no adapters that `{AUTO}` could pick. Load one, or ask for another model.")
        allowed = known if adapters is None else adapters
        there, chosen = set(known), set(allowed)
        unknown = next((name for name in allowed if name not in there), None)
        if unknown is not None:
            raise MethodError(f"`adapters` names the unknown adapter {unknown!r}. {did_you_mean(unknown, known)}")
        twice = (
            next((name for place, name in enumerate(allowed) if name in allowed[:place]), None) if adapters else None
        )
        if twice is not None:
            raise MethodError(f"`adapters` names {twice!r} twice. Name each once.")
        chosen = set(allowed)
        return Picking(
            tuple(name for name in known if name in chosen),
            self.top_k if top_k is None else top_k,
            self.floor if floor is None else floor,
        )

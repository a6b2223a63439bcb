"""Checks of methods' parameters, each with its message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraflow.errors import MethodError, did_you_mean


def check_weights(weights: Any, adapters: Sequence[str], parameter: str) -> None:
    """Check that weights by adapter name are for these adapters and finite.

    Raises:
        MethodError: if they are no mapping, a name is unknown, or a weight is not a finite number.
    """
    if not isinstance(weights, Mapping):
        raise MethodError(f'`{parameter}` (={weights!r}) must give weights by adapter name, such as {{"zh": 0.5}}.')
    for name, weight in weights.items():
        if name not in adapters:
            raise MethodError(f"`{parameter}` names the unknown adapter {name!r}. {did_you_mean(name, adapters)}")
        if not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise MethodError(f"`{parameter}` gives adapter {name!r} the weight {weight}; it must be a finite number.")


def check_choice(value: Any, known: Sequence[str], parameter: str) -> None:
    """Check that a parameter is one of a few words.

    Raises:
        MethodError: if it is not.
    """
    if value not in known:
        raise MethodError(f"`{parameter}` is unknown: {value!r}. {did_you_mean(str(value), known)}")


def check_count(value: Any, parameter: str) -> None:
    """Check that a parameter is a whole number of at least 1.

    Raises:
        MethodError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MethodError(f"`{parameter}` (={value!r}) must be a whole number of at least 1.")


def check_positive(value: Any, parameter: str) -> None:
    """Check that a parameter is a positive, finite number.

    Raises:
        MethodError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise MethodError(f"`{parameter}` (={value!r}) must be a positive number.")


def check_share(value: Any, parameter: str) -> None:
    """Check that a parameter is a number of at least 0 and less than 1.

    Raises:
        MethodError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise MethodError(f"`{parameter}` (={value!r}) must be at least 0 and less than 1.")


def check_top_k(top_k: Any, adapters: Sequence[str], parameter: str = "top_k") -> None:
    """Check a number of adapters to keep; None keeps all.

    Raises:
        MethodError: if it is no whole number from 1 to the number of adapters.
    """
    if top_k is None:
        return
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= len(adapters):
        raise MethodError(
            f"`{parameter}` (={top_k!r}) must be between 1 and the number of adapters (={len(adapters)})."
        )

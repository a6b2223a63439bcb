"""Checks the shapes that the library writes down, in every test: jaxtyping's import hook, kept to shapes.

beartype would check every annotation, but tests give bad input on purpose, to see the library's own error for it; and
wrapping every function would make the tests much slower.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import jaxtyping
from beartype import beartype

_SHAPE = re.compile(r"\b(Bool|Float|Int)\[")
_jaxtyped = jaxtyping.jaxtyped


def check_shapes(package: str) -> None:
    """Check the shapes of a package that is not imported yet."""
    jaxtyping.jaxtyped = _jaxtyped_where_shaped
    jaxtyping.install_import_hook(package, f"{__name__}.{_beartype_shapes.__name__}")


def _jaxtyped_where_shaped(*, typechecker: Any) -> Any:
    def decorate(item: Any) -> Any:
        shaped = any(_SHAPE.search(str(hint)) for hint in inspect.get_annotations(item).values())
        return _jaxtyped(item, typechecker=typechecker) if shaped else item

    return decorate


def _beartype_shapes(function: Any) -> Any:
    hints = function.__annotations__.items()
    function.__annotations__ = {name: hint for name, hint in hints if _SHAPE.search(str(hint))}
    return beartype(function)

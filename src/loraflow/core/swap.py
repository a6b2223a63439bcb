"""A module's class swapped for a subclass that does more, and back: names, parameters and hooks stay as they are."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, SupportsIndex

from torch import nn


def swap_class(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Put a mixin's methods in front of those of a module's own class."""
    _set_class(module, mixed_class(mixin, type(module)))


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`."""
    _set_class(module, type(module).__bases__[1])


_MIXED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def mixed_class(mixin: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's own class that a mixin's methods stand in front of."""
    if (mixin, own) not in _MIXED:
        # Under its own name: device maps and FSDP policies go by the names of classes.
        _MIXED[mixin, own] = type(own.__name__, (mixin, own), {"__module__": own.__module__, "__reduce_ex__": _reduce})
    return _MIXED[mixin, own]


def _reduce(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    """How such a module is pickled and copied: its class by the two that it is made of, for it stands nowhere."""
    mixin, own = type(self).__bases__
    return blank, (mixed_class, mixin, own), self.__getstate__()


def blank(make_class: Callable[..., type[nn.Module]], *made_of: type) -> nn.Module:
    """An empty module of a class that is made from others, for `pickle` to fill."""
    made = make_class(*made_of)
    return made.__new__(made)


def _set_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    module.__class__ = new_class
    if hasattr(module, "_hf_hook"):
        # accelerate (device_map) put a `forward` of its own on the instance, which calls the class's through this one.
        module._old_forward = types.MethodType(new_class.forward, module)  # type: ignore[assignment]

"""A module's class swapped for a subclass that does more, and back: names, parameters and hooks stay as they are."""

from __future__ import annotations

import types

from torch import nn


def swap_class(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Put a mixin's methods in front of those of a module's own class."""
    _set_class(module, _mixed(mixin, type(module)))


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`."""
    _set_class(module, type(module).__bases__[1])


_MIXED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _mixed(mixin: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    if (mixin, own) not in _MIXED:
        # Under its own name: device maps and FSDP policies go by the names of classes.
        _MIXED[mixin, own] = type(own.__name__, (mixin, own), {"__module__": own.__module__})
    return _MIXED[mixin, own]


def _set_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    module.__class__ = new_class
    if hasattr(module, "_hf_hook"):
        # accelerate (device_map) put a `forward` of its own on the instance, which calls the class's through this one.
        module._old_forward = types.MethodType(new_class.forward, module)  # type: ignore[assignment]

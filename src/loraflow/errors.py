"""Every error that this library raises on purpose.

```
LoraflowError
├── AdapterError          an adapter cannot be read, or cannot be fused exactly
├── ArchitectureError     a base model is of a kind that cannot be fused
├── DataError             a training or evaluation example is malformed
├── FusionError           a fusion on disk does not match what it is loaded with
├── MethodError           an unknown method, or a setting that it cannot take
├── SandboxError          generated code cannot be run safely here
├── StorageError          a file or folder cannot be written, or another process is at it
└── TrainingError         a training has diverged
```

All of them are `ValueError`s too, since each says that something handed to the library is not what it needs.
A message names the fact, the value and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names in one message; methods, scorers and settings are fewer, the adapters of a bank are more.
_SHOWN = 50


class LoraflowError(ValueError):
    """Base of all errors that this library raises on purpose."""


class AdapterError(LoraflowError):
    """An adapter cannot be read, or cannot be fused so that it gives what PEFT gives."""


class ArchitectureError(LoraflowError):
    """A base model is of a kind that cannot be fused."""


class DataError(LoraflowError):
    """A training or evaluation example is malformed; the message names the file and the line."""


class FusionError(LoraflowError):
    """A fusion on disk does not match the base, the adapters or the library that it is loaded with."""


class MethodError(LoraflowError):
    """A method is unknown, or a setting is outside what it can take."""


class SandboxError(LoraflowError):
    """Generated code cannot be run safely on this machine."""


class StorageError(LoraflowError):
    """A file or folder cannot be written: no space, no permission, something in its way, or another process at it."""


class TrainingError(LoraflowError):
    """A training has diverged: its loss is not finite, or has exploded; what was good is kept."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an "unknown name" message: the known names, and the nearest one if there is one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"Known: {', '.join(map(repr, names[:_SHOWN])) or 'none'}{more}.{guess}"

"""Dynamic fusion of existing LoRA adapters for large language models."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

# PEFT imports bitsandbytes where it is installed, and on the CPU that advises a kernel that has no backward, and that
# fused 4-bit bases are kept from.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    __version__: str
    from loraflow.adapters import AdapterBank, AdapterSource
    from loraflow.bases import BaseOptions
    from loraflow.methods import (
        AdapterCore,
        Arrow,
        Average,
        Base,
        Centroid,
        Lag,
        LearnedStatic,
        Logo,
        LoraFlow,
        LoraHub,
        LoraRetriever,
        Method,
        NormMax,
        Phatgoose,
        QaFlora,
        QueryMethod,
        Ramole,
        SpectR,
        Static,
    )
    from loraflow.model import FusedModel
    from loraflow.prompts import PromptFormat
    from loraflow.training import FitConfig, FitResult
    from loraflow.visual.trace import Trace

_HOMES = {
    "AdapterBank": "loraflow.adapters",
    "AdapterSource": "loraflow.adapters",
    "BaseOptions": "loraflow.bases",
    "FitConfig": "loraflow.training",
    "FitResult": "loraflow.training",
    "FusedModel": "loraflow.model",
    "PromptFormat": "loraflow.prompts",
    "Trace": "loraflow.visual.trace",
}
"""Where public names are; the others of `__all__` are of `loraflow.methods`."""

__all__ = [
    "AdapterBank",
    "AdapterCore",
    "AdapterSource",
    "Arrow",
    "Average",
    "Base",
    "BaseOptions",
    "Centroid",
    "FitConfig",
    "FitResult",
    "FusedModel",
    "Lag",
    "LearnedStatic",
    "Logo",
    "LoraFlow",
    "LoraHub",
    "LoraRetriever",
    "Method",
    "NormMax",
    "Phatgoose",
    "PromptFormat",
    "QaFlora",
    "QueryMethod",
    "Ramole",
    "SpectR",
    "Static",
    "Trace",
]


def __getattr__(name: str):
    """Import public names when they are first used: `import loraflow` loads neither torch nor transformers."""
    if name == "__version__":
        return _installed_version()
    if name not in __all__:
        raise AttributeError(f"module 'loraflow' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "loraflow.methods")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]


def _installed_version() -> str:
    """The version that was built from git's tags; that of no release where only the sources are on the path."""
    from importlib import metadata

    try:
        return metadata.version("loraflow")
    except metadata.PackageNotFoundError:
        return "0.0.0+unknown"

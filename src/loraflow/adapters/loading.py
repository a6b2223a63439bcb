"""One adapter from its files."""

from __future__ import annotations

import json
from pathlib import Path

from loraflow.adapters.base import Adapter, AdapterSource, tensors_digest
from loraflow.adapters.config import MATHS, read_config
from loraflow.adapters.files import locate_config, locate_weights, read_tensors
from loraflow.adapters.keys import read_modules


def load_adapter(name: str, source: str | Path | AdapterSource) -> Adapter:
    """Read one adapter from PEFT's files, and refuse what could not be fused exactly on any base.

    Args:
        name: the name it gets in the fusion.
        source: a directory, `user/repo`, `user/repo/subfolder`, each Hub id optionally `@revision`.

    Returns:
        The adapter, its tensors on the CPU in the precision of the file.

    Raises:
        AdapterError: if files are missing, are pickles, or hold what cannot be fused exactly.
    """
    # The configuration first: it tells what an adapter of another library is, which has no weights of PEFT's.
    config_path, resolved = locate_config(name, AdapterSource.parse(source))
    config = read_config(name, config_path)
    weights_path = locate_weights(name, resolved)
    tensors = read_tensors(name, weights_path)
    modules, copies = read_modules(name, weights_path, config, tensors)
    maths = json.dumps({key: getattr(config, key) for key in MATHS}, sort_keys=True)
    return Adapter(name, resolved, config, modules, tensors_digest(tensors, maths), copies)

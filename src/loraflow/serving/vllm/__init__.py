"""Fusions inside vLLM: a plug-in that vLLM finds by itself, and that does nothing until a fusion is asked for.

`vllm serve BASE --load-format loraflow --model-loader-extra-config '{"fusion": "DIRECTORY"}'` loads the base as ever,
then lets its decoder layers compute fusion weights and its linears add the adapters' weighted updates. Nothing in vLLM
is patched. The rest of loraflow imports neither this package nor vLLM.
"""

from __future__ import annotations

import logging

LOAD_FORMAT = "loraflow"


def register() -> None:
    """Make the load format known; vLLM calls this in each of its processes, whether a fusion is served or not."""
    try:
        from loraflow.serving.vllm.loader import FusionLoader
        from loraflow.serving.vllm.seam import register_model_loader
    except ImportError as error:
        # Raising would keep vLLM from starting at all; without the format, vLLM itself refuses it by name.
        logging.getLogger(__name__).warning("loraflow cannot serve fusions in this vLLM: %s", error)
        return
    register_model_loader(LOAD_FORMAT)(FusionLoader)

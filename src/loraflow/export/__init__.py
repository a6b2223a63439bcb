"""A fusion of constant weights, or a merge of its adapters, as other programs load it.

One PEFT adapter, a checkpoint of the base with it folded in, and both in GGUF for llama.cpp.
"""

from loraflow.export.checkpoint import CheckpointReport, export_merged
from loraflow.export.files import ExportReport, MeanCost
from loraflow.export.folding import Compression
from loraflow.export.fusion import Folded, constant_weights, export_peft
from loraflow.export.gguf import GgufReport, export_gguf, export_gguf_model

__all__ = [
    "CheckpointReport",
    "Compression",
    "ExportReport",
    "Folded",
    "GgufReport",
    "MeanCost",
    "constant_weights",
    "export_gguf",
    "export_gguf_model",
    "export_merged",
    "export_peft",
]

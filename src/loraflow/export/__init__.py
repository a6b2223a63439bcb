"""A fusion as one ordinary PEFT adapter."""

from loraflow.export.files import ExportReport, MeanCost
from loraflow.export.folding import Compression
from loraflow.export.fusion import constant_weights, export_peft

__all__ = ["Compression", "ExportReport", "MeanCost", "constant_weights", "export_peft"]

"""Fitting what a method learns."""

from loraflow.training.config import FitConfig, FitResult, search_grid
from loraflow.training.finetune import FinetuneResult, LoraSettings, finetune
from loraflow.training.fit import fit, search
from loraflow.training.loss import mean_loss
from loraflow.training.run import remove_checkpoints

__all__ = [
    "FinetuneResult",
    "FitConfig",
    "FitResult",
    "LoraSettings",
    "finetune",
    "fit",
    "mean_loss",
    "remove_checkpoints",
    "search",
    "search_grid",
]

"""Fitting what a method learns."""

from loraflow.training.config import SEARCH_GRID, FitConfig, FitResult
from loraflow.training.fit import fit, remove_checkpoints, search

__all__ = ["SEARCH_GRID", "FitConfig", "FitResult", "fit", "remove_checkpoints", "search"]

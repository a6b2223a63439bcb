"""Fitting what a method learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraflow.training.config import FitConfig, FitResult, LoraSettings, search_grid

if TYPE_CHECKING:
    from loraflow.training.checkpoints import remove_checkpoints
    from loraflow.training.fitting import fit, search
    from loraflow.training.learners.finetune import FinetuneResult, finetune
    from loraflow.training.loss import answer_loss, mean_loss
    from loraflow.training.rates import RateTest, find_learning_rate
    from loraflow.training.vectors import take_vectors, vectors_of

_HOMES = {
    "FinetuneResult": "learners.finetune",
    "RateTest": "rates",
    "answer_loss": "loss",
    "find_learning_rate": "rates",
    "finetune": "learners.finetune",
    "fit": "fitting",
    "mean_loss": "loss",
    "remove_checkpoints": "checkpoints",
    "search": "fitting",
    "take_vectors": "vectors",
    "vectors_of": "vectors",
}

__all__ = [
    "FinetuneResult",
    "FitConfig",
    "FitResult",
    "LoraSettings",
    "RateTest",
    "answer_loss",
    "find_learning_rate",
    "finetune",
    "fit",
    "mean_loss",
    "remove_checkpoints",
    "search",
    "search_grid",
    "take_vectors",
    "vectors_of",
]


def __getattr__(name: str):
    """Import what trains when it is first used: recipes are read without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraflow.training' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"loraflow.training.{_HOMES[name]}"), name)

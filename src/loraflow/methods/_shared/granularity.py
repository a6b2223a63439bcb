"""How finely weights differ: one axis, whose word everywhere else is `Place`; a method's parameter has its paper's.

The whole model is a `step` in LoRA-Flow's paper, whose gate weighs each decoding step once, and a `task` where weights
depend on nothing but the task.
"""

from __future__ import annotations

from typing import Literal

from loraflow.methods.base import Place, check_choice

Granularity = Literal["step", "task", "layer", "module"]
PLACES: dict[Granularity, Place] = {"step": "model", "task": "model", "layer": "layer", "module": "module"}


def check_granularity(granularity: str, whole_model: Literal["step", "task"]) -> None:
    """Check a method's parameter, which has this word for the whole model.

    Raises:
        MethodError: if it is another.
    """
    check_choice(granularity, (whole_model, "layer", "module"), "granularity")

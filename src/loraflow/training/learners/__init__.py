"""The ways to learn: the contract in `base`, and one file for each; `finetune` is what they are compared with."""

from __future__ import annotations

from loraflow.errors import MethodError, did_you_mean
from loraflow.methods import Method, OnTop
from loraflow.training.learners.base import Learner
from loraflow.training.learners.experts import Experts
from loraflow.training.learners.gradient import Gradient
from loraflow.training.learners.samples import Samples
from loraflow.training.learners.search import Search
from loraflow.training.learners.together import Together

LEARNERS: dict[str, Learner] = {
    learner.name: learner for learner in (Gradient(), Search(), Experts(), Together(), Samples())
}

__all__ = ["LEARNERS", "Learner", "learner_of"]


def learner_of(method: Method) -> Learner:
    """The learner of a method.

    Raises:
        MethodError: if the method learns nothing, in an unknown way, or has an adapter on top.
    """
    if isinstance(method, OnTop):
        raise MethodError(
            f"The fusion has {', '.join(map(repr, method.names))} on top of {method.name!r}, trained over its gates as "
            "they are: fitting those would move what it stands on. Fit a fusion without it, and train on top of that "
            "(`loraflow finetune`)."
        )
    if method.learns is None:
        raise MethodError(f"The method {method.name!r} learns nothing: there is nothing to fit. Use it as it is.")
    if method.learns not in LEARNERS:
        raise MethodError(
            f"The method {method.name!r} learns by {method.learns!r}. {did_you_mean(str(method.learns), LEARNERS)}"
        )
    return LEARNERS[method.learns]

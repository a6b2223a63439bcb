"""What the methods share that learn by gradient on examples: where weights differ, and where training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from loraflow.errors import MethodError, did_you_mean
from loraflow.methods.base import Place
from loraflow.methods.checks import check_weights


class FittedOnExamples:
    """Mixed into methods with the parameters `granularity` and `start`.

    Attributes:
        granularity: a place, with its paper's word for the whole model: a "step" in LoRA-Flow's, whose gate weighs each
            decoding step once, and a "task" where weights depend on nothing but the task.
        start: where training starts: "best" (the adapter that alone has the lowest loss on the training examples),
            "average", an adapter's name, or weights by adapter name.
    """

    granularity: str
    start: str | Mapping[str, float]

    @property
    def place(self) -> Place:
        """Where the weights differ, and gates stand."""
        return "model" if self.granularity in ("step", "task") else cast(Place, self.granularity)

    def starts(self, adapters: Sequence[str]) -> dict[str, list[float]]:
        """Each adapter alone, where training starts at the best one."""
        if self.start != "best":
            return {}
        return {name: [float(name == other) for other in adapters] for name in adapters}

    def start_weights(self, adapters: Sequence[str], best: str | None) -> list[float]:
        """The fusion weights at which training starts; while the best start is not known, "best" is the average."""
        if not isinstance(self.start, str):
            return [float(self.start.get(name, 0.0)) for name in adapters]
        if self.start == "best" and best is not None:
            return self.starts(adapters)[best]
        if self.start in ("average", "best"):
            return [1 / len(adapters)] * len(adapters)
        return [float(name == self.start) for name in adapters]

    def check(self, adapters: Sequence[str]) -> None:
        """Check `start` against the adapters that are to be fused.

        Raises:
            MethodError: if it names an unknown adapter.
        """
        known = ("best", "average", *adapters)
        if not isinstance(self.start, str):
            check_weights(self.start, adapters, "start")
        elif self.start not in known:
            raise MethodError(f"`start` is unknown: {self.start!r}. {did_you_mean(self.start, known)}")

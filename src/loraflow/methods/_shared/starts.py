"""Where training starts: the parameter `start` of the methods that learn on examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraflow.errors import MethodError, did_you_mean
from loraflow.methods.base import check_weights


class StartChoice:
    """Mixed into methods whose parameter `start` says where training starts."""

    start: str | Mapping[str, float]

    @property
    def starts_at_best(self) -> bool:
        """Whether training starts at the adapter that alone has the lowest loss on the examples."""
        return self.start == "best"

    def start_weights(self, adapters: Sequence[str], best: str | None) -> list[float]:
        """The fusion weights at which training starts, given the best adapter."""
        return start_weights(self.start, adapters, best)

    def check(self, adapters: Sequence[str]) -> None:
        """Check `start` against the adapters that are to be fused."""
        check_start(self.start, adapters)


def start_weights(start: str | Mapping[str, float], adapters: Sequence[str], best: str | None) -> list[float]:
    """The fusion weights at which training starts.

    Args:
        start: "best" (the adapter that alone has the lowest loss on the training examples), "average", an adapter's
            name, or weights by adapter name.
        adapters: names of the adapters, in order.
        best: the adapter that "best" stands for; None where it is not known yet, which gives the average.

    Returns:
        One weight for each adapter.
    """
    if not isinstance(start, str):
        return [float(start.get(name, 0.0)) for name in adapters]
    chosen = best if start == "best" and best is not None else start
    if chosen in ("average", "best"):
        return [1 / len(adapters)] * len(adapters)
    return [float(name == chosen) for name in adapters]


def check_start(start: str | Mapping[str, float], adapters: Sequence[str]) -> None:
    """Check a start against the adapters that are to be fused.

    Raises:
        MethodError: if it names an unknown adapter.
    """
    if not isinstance(start, str):
        check_weights(start, adapters, "start")
    elif start not in ("best", "average", *adapters):
        raise MethodError(f"`start` is unknown: {start!r}. {did_you_mean(start, ['best', 'average', *adapters])}")

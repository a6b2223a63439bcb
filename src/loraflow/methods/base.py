"""The contract of a method: it makes gates, and where it puts them is its granularity.

A *gate* is a module that reads an input `x` and gives the fusion weights, one for each adapter:

```python
gate(x: Float[Tensor, "batch seq features"]) -> Float[Tensor, "batch seq adapters"]
```

Weights that do not depend on the input may be given as `[adapters]`, those of whole rows as `[batch, adapters]`; they
are broadcast. A method says where its gates
stand (`place`), whether they are learned (`learns`), and makes one for each site.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from loraflow.errors import MethodError, did_you_mean

Place = Literal["model", "layer", "module"]


@dataclass(frozen=True)
class Site:
    """One place that a gate serves.

    Attributes:
        adapters: names of the adapters, in order.
        features: width of the input that the gate reads.
        layers: number of decoder layers of the model.
        layer: index of the decoder layer; 0 for a gate of the whole model.
        module: name within the layer, for a gate of one module.
    """

    adapters: tuple[str, ...]
    features: int
    layers: int
    layer: int = 0
    module: str | None = None


@dataclass(frozen=True)
class Method(ABC):
    """What gives the fusion weights. Subclasses are frozen dataclasses of their parameters, which are saved as JSON.

    Where gates stand decides what they read: at `"model"` (one gate) the input of the first decoder layer, the word
    embeddings; at `"layer"` the input of their decoder layer; at `"module"` the input of their linear module.
    """

    name: ClassVar[str]
    learns: ClassVar[bool]

    @property
    @abstractmethod
    def place(self) -> Place:
        """Where the gates stand."""

    @abstractmethod
    def gate(self, site: Site) -> nn.Module | None:
        """Make the gate of one site, or None for the base model alone."""

    @property
    def starts_at_best(self) -> bool:
        """Whether training starts at the adapter that alone has the lowest loss on the examples."""
        return False

    def start_weights(self, adapters: Sequence[str], best: str | None) -> list[float] | None:
        """The fusion weights at which training starts, given the best adapter; None where gates start as made.

        A method that gives some has gates with `start_at(weights)`.
        """
        return None

    def check(self, adapters: Sequence[str]) -> None:  # noqa: B027
        """Check the parameters against the adapters that are to be fused.

        Raises:
            MethodError: if a parameter names an unknown adapter, or has the wrong length.
        """

    def parameters(self) -> dict[str, Any]:
        """The parameters as JSON values; `type(self)(**parameters)` is an equal method."""
        return asdict(self)


def check_weights(weights: Any, adapters: Sequence[str], parameter: str) -> None:
    """Check that weights by adapter name are for these adapters and finite.

    Raises:
        MethodError: if they are no mapping, a name is unknown, or a weight is not a finite number.
    """
    if not isinstance(weights, Mapping):
        raise MethodError(f'`{parameter}` (={weights!r}) must give weights by adapter name, such as {{"zh": 0.5}}.')
    for name, weight in weights.items():
        if name not in adapters:
            raise MethodError(f"`{parameter}` names the unknown adapter {name!r}. {did_you_mean(name, adapters)}")
        if not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise MethodError(f"`{parameter}` gives adapter {name!r} the weight {weight}; it must be a finite number.")

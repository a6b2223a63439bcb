r"""Adapters on top of a fusion: each has the weight 1 everywhere, beside those that a method weighs as ever.

For the first k of the adapters, which the method weighs, and n on top of them,

$$y = W x + \sum_{i=1}^{k} w_i(x)\, s_i B_i A_i x + \sum_{j=k+1}^{k+n} s_j B_j A_j x$$

The method sees the first k alone. Any method whose weights are constant or come from gates takes the parameter
`on_top`, the names of the last n adapters; `loraflow finetune --on` trains such an adapter and writes it. Static
weights need no such thing: there, an adapter on top is one of weight 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.errors import MethodError
from loraflow.methods.base import FewWeights, KnownWeights, Learning, Method, Place, Site
from loraflow.methods.static import Base, ConstantGate, Static

PARAMETER = "on_top"
"""The parameter of any method that names the adapters on top."""

BELOW = "below."
"""What names of learned tensors begin with where a method has adapters on top."""


class OnTopGate(nn.Module):
    """The weights of a method's own gate, and 1 for each adapter on top."""

    def __init__(self, below: nn.Module, count: int) -> None:
        super().__init__()
        self.below = below
        self.count = count

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*weights adapters"]:
        """The weights of all adapters, of the shape that the method's gate gives them in."""
        return self.widened(self.below(x))

    def widened(self, weights: Float[Tensor, "*weights own"]) -> Float[Tensor, "*weights adapters"]:
        """The method's weights with those on top behind them."""
        return F.pad(weights, (0, self.count), value=1.0)


class KnownOnTop(OnTopGate):
    """One whose weights depend on no input."""

    def known_weights(self) -> Float[Tensor, "*requests adapters"]:
        """The weights, before anything is read."""
        return self.widened(cast(KnownWeights, self.below).known_weights())


class FewOnTop(OnTopGate):
    """One that gives each position a few weights."""

    @property
    def most(self) -> int:
        """How many adapters have a weight at one position, at most."""
        return cast(FewWeights, self.below).most + self.count


@dataclass(frozen=True)
class OnTop(Method):
    """A method with adapters on top; name, level and place are the method's own.

    Attributes:
        below: what weighs the other adapters.
        names: the adapters on top, the last of all.
    """

    below: Method
    names: tuple[str, ...]

    learns: ClassVar[Learning | None] = None

    def __post_init__(self) -> None:
        _check_below(self.below, self.names)
        for fact in ("name", "paper", "level"):
            object.__setattr__(self, fact, getattr(self.below, fact))
        if self.below.learns is not None:
            object.__setattr__(self, "learns", "below")

    @property
    def place(self) -> Place:  # noqa: D102
        return self.below.place

    def gate(self, site: Site) -> nn.Module:
        """The gate of the method below with the weights on top.

        A linear that none of its adapters updates has those on top alone.
        """
        count, first = len(self.names), len(site.adapters) - len(self.names)
        updates = {name: of_site[:first] for name, of_site in site.updates.items()}
        weighed = dataclasses.replace(site, adapters=site.adapters[:first], updates=updates)
        idle = site.module is not None and site.module in updates and not any(updates[site.module])
        gate = None if idle else self.below.gate(weighed)
        if gate is None:
            return ConstantGate([0.0] * first + [1.0] * count)
        if isinstance(gate, KnownWeights):
            return KnownOnTop(gate, count)
        return (FewOnTop if isinstance(gate, FewWeights) else OnTopGate)(gate, count)

    def check(self, adapters: Sequence[str]) -> None:
        """Check that those on top are the last of the adapters, and the method below against the others.

        Raises:
            MethodError: if they are not, or none is left to weigh.
        """
        first = len(adapters) - len(self.names)
        if first < 1 or tuple(adapters[first:]) != self.names:
            raise MethodError(
                f"`{PARAMETER}` (={list(self.names)}) must name the last of the adapters, and leave one to weigh. The "
                f"adapters are {list(adapters)}, in this order."
            )
        self.below.check(adapters[:first])

    def parameters(self) -> dict[str, Any]:
        """Those of the method below, and the names on top: `make_method` makes an equal one of them."""
        return {**self.below.parameters(), PARAMETER: list(self.names)}


def put_on_top(method: Method, name: str) -> Method:
    """The method with one more adapter, which comes after all others, on top.

    Raises:
        MethodError: if nothing can be put on top of it.
    """
    if isinstance(method, Static):
        if isinstance(method.weights, Mapping):
            return Static({**method.weights, name: 1.0})
        return Static([{**layer, name: 1.0} for layer in method.weights])
    if isinstance(method, OnTop):
        return OnTop(method.below, (*method.names, name))
    return OnTop(method, (name,))


def learned_below(method: Method, parameter: str) -> str:
    """The name of a learned parameter of a method's gate, once an adapter is on top of it."""
    return parameter if isinstance(method, OnTop) else f"{BELOW}{parameter}"


def _check_below(method: Method, names: Sequence[str]) -> None:
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise MethodError(f"`{PARAMETER}` (={names!r}) must be a list of adapters' names, at least one.")
    if len(set(names)) < len(names):
        raise MethodError(f"`{PARAMETER}` (={list(names)}) names one twice. Leave one out.")
    if isinstance(method, Static):
        raise MethodError(f"Static weights take no `{PARAMETER}` (={list(names)}). Give those adapters the weight 1.")
    if isinstance(method, Base):
        raise MethodError(
            f"The method {method.name!r} has no adapters at work, so nothing can be on top of them "
            f"(`{PARAMETER}` = {list(names)}). An adapter for the base alone is what `loraflow finetune` trains."
        )
    if method.reads_prompt:
        raise MethodError(
            f"The method {method.name!r} reads whole prompts before they are answered, and takes no adapter on top "
            f"(`{PARAMETER}` = {list(names)}). Take one whose weights are constant, or come from gates at each token."
        )
    if method.adds or method.mixing == "parameters":
        why = "adds updates of its own" if method.adds else "mixes parameters"
        raise MethodError(
            f"The method {method.name!r} {why}, and takes no adapter on top (`{PARAMETER}` = {list(names)}). Export "
            "the fusion as one adapter (`loraflow export`), which is exact, and put it on top of that."
        )

r"""LoRA-Flow: a gate gives each token its own weight for each adapter.

$$w = \operatorname{softmax}(W_{gate}\, x / \tau) + b$$

with one gate for the whole model (step), for each decoder layer (layer, the default), or for each linear module
(module). The bias is added after the softmax: weights may be negative and need not sum to one.

Paper: Wang et al. 2024, "LoRA-Flow: Dynamic LoRA Fusion for Large Language Models in Generative Tasks",
[arXiv 2402.11455](https://arxiv.org/abs/2402.11455). Cost: one low-rank pass and k(d + 1) values for each gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.errors import MethodError, did_you_mean
from loraflow.methods.base import Method, Place, Site, check_weights

Granularity = Literal["step", "layer", "module"]
_PLACES: dict[Granularity, Place] = {"step": "model", "layer": "layer", "module": "module"}


class GateLogits(torch.autograd.Function):
    """`x @ weight.T` in the gate's precision, keeping `x` in its own.

    Plain autograd would keep a float32 copy of every gate's input, twice the size of a bfloat16 residual stream that
    is kept anyway.
    """

    @staticmethod
    def forward(ctx, x, weight):  # noqa: D102
        ctx.save_for_backward(x, weight)
        return _logits(x, weight)

    @staticmethod
    def backward(ctx, grad_output):  # noqa: D102
        x, weight = ctx.saved_tensors
        grad_output = grad_output.to(weight.dtype)
        grad_x = (grad_output @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad_output.flatten(0, -2).T @ x.flatten(0, -2).to(weight.dtype)
        return grad_x, grad_weight


def _logits(x: Float[Tensor, "*batch features"], weight: Float[Tensor, "adapters features"]) -> Tensor:
    if x.dtype != weight.dtype:
        x = x.to(weight.dtype)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight)
    return F.linear(x, weight)


class FlowGate(nn.Module):
    """One gate of LoRA-Flow.

    Attributes:
        weight: W_gate, `[adapters, features]`; zero before training.
        bias: b, `[adapters]`; before training the start weights less 1/k, so that training starts at exactly those.
        temperature: the divisor of the logits.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    temperature: float

    def __init__(self, features: int, adapters: int, temperature: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(adapters, features))
        self.bias = nn.Parameter(torch.zeros(adapters))
        self.temperature = temperature

    def start_at(self, weights: Sequence[float]) -> None:
        """Forget what was learned and give exactly these fusion weights for every input."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(torch.tensor(weights) - 1 / len(weights))

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """Fusion weights of each position."""
        weight = self.weight
        learning = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
        logits = GateLogits.apply(x, weight) if learning else _logits(x, weight)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return torch.softmax(logits, dim=-1) + self.bias


@dataclass(frozen=True)
class LoraFlow(Method):
    """LoRA-Flow's gates.

    Attributes:
        granularity: one gate for the model ("step"), for each layer ("layer", the paper's choice), or for each linear
            module ("module").
        temperature: divisor of the logits before the softmax. The official code has 1.1 for two of its gates, else 1.
        start: where training starts: "best" (the adapter that alone has the lowest loss on the training examples,
            found when fitting; the paper starts at the task adapter), "average", an adapter's name, or weights by
            adapter name.
    """

    granularity: Granularity = "layer"
    temperature: float = 1.0
    start: str | Mapping[str, float] = "best"

    name: ClassVar[str] = "lora-flow"
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.granularity not in _PLACES:
            raise MethodError(
                f"`granularity` is unknown: {self.granularity!r}. {did_you_mean(self.granularity, _PLACES)}"
            )
        if not isinstance(self.temperature, int | float) or not 0 < self.temperature < float("inf"):
            raise MethodError(f"`temperature` (={self.temperature!r}) must be a positive number.")

    @property
    def place(self) -> Place:  # noqa: D102
        return _PLACES[self.granularity]

    def gate(self, site: Site) -> FlowGate:  # noqa: D102
        gate = FlowGate(site.features, len(site.adapters), self.temperature)
        # "best" is known only once there are examples; until then the average is the neutral choice.
        gate.start_at(self.start_weights(site.adapters, best=None))
        return gate

    @property
    def starts_at_best(self) -> bool:  # noqa: D102
        return self.start == "best"

    def start_weights(self, adapters: Sequence[str], best: str | None) -> list[float]:
        """The fusion weights at which training starts.

        Args:
            adapters: names of the adapters, in order.
            best: the adapter that "best" stands for; None where it is not known yet, which gives the average.

        Returns:
            One weight for each adapter.
        """
        if not isinstance(self.start, str):
            return [float(self.start.get(name, 0.0)) for name in adapters]
        chosen = best if self.start == "best" and best is not None else self.start
        if chosen in ("average", "best"):
            return [1 / len(adapters)] * len(adapters)
        return [float(name == chosen) for name in adapters]

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        if not isinstance(self.start, str):
            check_weights(self.start, adapters, "start")
        elif self.start not in ("best", "average", *adapters):
            raise MethodError(
                f"`start` is unknown: {self.start!r}. {did_you_mean(self.start, ['best', 'average', *adapters])}"
            )

r"""LoRA-Flow's gate, and gates beyond the paper for its open questions.

All of them give $w = \phi(s(x) / \tau) + b$, and start at exactly given weights, since their scores are zero at first:

- scores $s(x)$: linear, $W x$ (the paper); low-rank, $W V x$; two-layer, $W \operatorname{silu}(V x + c)$; attention,
  $(Q x)^T (K e_i) / \sqrt m$ with a frozen vector $e_i$ for each adapter, the input direction that it answers most
  strongly, so that the number of learned values does not grow with the number of adapters;
- input: raw (the paper), or $x / \operatorname{rms}(x)$: the residual stream's scale grows from layer to layer and
  differs between tokens, and a raw gate's logits with it;
- $\phi$: softmax (the paper), or sigmoid;
- optionally only the weights of largest magnitude are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.errors import MethodError
from loraflow.methods._shared.scores import linear_scores, main_input_direction
from loraflow.methods.base import Site

INPUTS = ("raw", "normalized")
ACTIVATIONS = ("softmax", "sigmoid")

_EPSILON = 1e-6


@dataclass(frozen=True)
class GateShape:
    """What gates have in common.

    Attributes:
        temperature: divisor of the scores.
        normalizes: whether the input is divided by its root mean square.
        activation: what makes weights of scores.
        top_k: how many weights are kept; None keeps all.
        width: of what lies between input and scores, where something does.
    """

    temperature: float = 1.0
    normalizes: bool = False
    activation: Literal["softmax", "sigmoid"] = "softmax"
    top_k: int | None = None
    width: int = 16


class FlowGate(nn.Module):
    """One gate of LoRA-Flow, with linear scores.

    Attributes:
        weight: W_gate, `[adapters, features]`; zero before training.
        bias: b, `[adapters]`; before training the start weights less those of zero scores, so that training starts at
            exactly the start weights.
        shape: the rest of its formula.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    shape: GateShape

    def __init__(self, site: Site, shape: GateShape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.zeros(len(site.adapters), self._inner_features(site)))
        self.bias = nn.Parameter(torch.zeros(len(site.adapters)))

    @property
    def most(self) -> int:
        """How many adapters have a weight at one position, at most."""
        return self.shape.top_k or len(self.bias)

    def _inner_features(self, site: Site) -> int:
        return site.features

    def start_at(self, weights: Sequence[float]) -> None:
        """Forget what was learned and give exactly these fusion weights for every input."""
        neutral = 1 / len(weights) if self.shape.activation == "softmax" else 0.5
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(torch.tensor(weights) - neutral)

    def scores(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """Scores of the adapters at each position."""
        return self._read(x, self.weight)

    def _read(self, x: Float[Tensor, "*batch features"], matrix: Tensor) -> Float[Tensor, "*batch rows"]:
        """A matrix times the input as the gate reads it."""
        product = linear_scores(x, matrix)
        if not self.shape.normalizes:
            return product
        # Scaling the product is scaling the input, without a copy of it and in the gate's precision.
        return product * torch.rsqrt(x.to(matrix.dtype).square().mean(-1, keepdim=True) + _EPSILON)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """Fusion weights of each position."""
        shape = self.shape
        scores = self.scores(x)
        if shape.temperature != 1.0:
            scores = scores / shape.temperature
        weights = torch.softmax(scores, dim=-1) if shape.activation == "softmax" else torch.sigmoid(scores)
        weights = weights + self.bias
        if shape.top_k is not None and shape.top_k < weights.shape[-1]:
            kept = weights.abs().topk(shape.top_k, dim=-1).indices
            weights = torch.zeros_like(weights).scatter(-1, kept, weights.gather(-1, kept))
        return weights


class LowRankGate(FlowGate):
    """Scores through a narrow linear map: $W V x$.

    Attributes:
        down: V, `[width, features]`.
    """

    down: nn.Parameter

    def __init__(self, site: Site, shape: GateShape) -> None:
        super().__init__(site, shape)
        self.down = nn.Parameter(_random(shape.width, site.features))

    def _inner_features(self, site: Site) -> int:
        return self.shape.width

    def scores(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """Scores of the adapters at each position."""
        return linear_scores(self._read(x, self.down), self.weight)


class TwoLayerGate(LowRankGate):
    r"""Scores from a hidden layer: $W \operatorname{silu}(V x + c)$.

    Attributes:
        down_bias: c, `[width]`.
    """

    down_bias: nn.Parameter

    def __init__(self, site: Site, shape: GateShape) -> None:
        super().__init__(site, shape)
        self.down_bias = nn.Parameter(torch.zeros(shape.width))

    def scores(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """Scores of the adapters at each position."""
        return linear_scores(F.silu(self._read(x, self.down) + self.down_bias), self.weight)


class AttentionGate(FlowGate):
    r"""Scores by attention over the adapters: $(Q x)^T (K e_i) / \sqrt m$.

    Attributes:
        weight: Q, `[width, features]`, zero before training.
        key: K, `[width, features]`.
        embeddings: e, the adapters' main input directions, `[adapters, features]`, not saved.
    """

    weight: nn.Parameter
    key: nn.Parameter
    embeddings: Tensor

    def __init__(self, site: Site, shape: GateShape) -> None:
        super().__init__(site, shape)
        self.weight = nn.Parameter(torch.zeros(shape.width, site.features))
        # The embeddings have length one: a key's entries are then of the order of one.
        self.key = nn.Parameter(_random(shape.width, site.features) * site.features**0.5)
        self.register_buffer("embeddings", _embeddings(site), persistent=False)

    def scores(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """Scores of the adapters at each position."""
        keys = linear_scores(self.embeddings, self.key)
        return linear_scores(self._read(x, self.weight), keys) / self.key.shape[0] ** 0.5


def _random(rows: int, features: int) -> Tensor:
    return torch.randn(rows, features) / features**0.5


def _embeddings(site: Site) -> Float[Tensor, "adapters features"]:
    """One unit vector for each adapter: the mean direction of its updates that read an input of the gate's width.

    Raises:
        MethodError: if an adapter has no such update.
    """
    rows = []
    for position, name in enumerate(site.adapters):
        updates = [found[position] for found in site.updates.values()]
        directions = [
            main_input_direction(update)
            for update in updates
            if update is not None and update.lora_A.shape[1] == site.features
        ]
        if not directions:
            where = site.module or f"layer {site.layer}"
            raise MethodError(
                f"Attention over adapters needs an update of each at {where}; {name!r} has none there. "
                "Take another `scorer` or `granularity`."
            )
        # Singular vectors have no sign: the mean is the main axis of all of them.
        axis = torch.linalg.svd(torch.stack(directions), full_matrices=False).Vh[0]
        # Nor has that one, and scores are linear in it: it must be the same wherever the gate is made again.
        rows.append(axis * axis[axis.abs().argmax()].sign())
    return torch.stack(rows)


SCORERS: dict[str, type[FlowGate]] = {
    "linear": FlowGate,
    "low-rank": LowRankGate,
    "two-layer": TwoLayerGate,
    "attention": AttentionGate,
}

"""The weights that requests bring, by place, and where each token's request is in them; needs no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loraflow.serving.vllm.request_weights import parse_weights

# Batches may be padded for the graphs of a GPU.
_PADDING = 1024


class RequestTable(nn.Module):
    """The weights that requests bring, by their place; the last place is nobody's.

    All writing is in place: graphs that a GPU has captured read the same memory.

    Attributes:
        weights: `[places, layers, adapters]`.
        brings: whether the request of a place brings weights, `[places]`.
        places: the place of each token's request, `[tokens]`.
    """

    weights: Tensor
    brings: Tensor
    places: Tensor
    _counting: Tensor

    def __init__(self, requests: int, tokens: int, layers: int, adapters: Sequence[str]) -> None:
        super().__init__()
        self.layers = layers
        self.adapters = tuple(adapters)
        self.register_buffer("weights", torch.zeros(requests + 1, layers, len(adapters)), persistent=False)
        self.register_buffer("brings", torch.zeros(requests + 1, dtype=torch.bool), persistent=False)
        self.register_buffer("places", torch.full((tokens + _PADDING,), requests), persistent=False)
        self.register_buffer("_counting", torch.arange(tokens + _PADDING), persistent=False)

    def settle(
        self, weights: Float[Tensor, "*tokens adapters"], layer: int, tokens: int
    ) -> Float[Tensor, "tokens adapters"]:
        """The weights of each token: its request's own where that has some, else those given."""
        places = self.places[:tokens]
        return torch.where(self.brings[places].unsqueeze(-1), self.weights[places, layer], weights)

    def put(self, place: int, value: Any) -> None:
        """Note what a request brings, or that it brings nothing."""
        self.brings[place] = value is not None
        if value is not None:
            self.weights[place] = torch.tensor(parse_weights(value, self.adapters, self.layers))

    def swap(self, one: int, other: int) -> None:
        """Exchange two places."""
        for tensor in (self.weights, self.brings):
            tensor[[one, other]] = tensor[[other, one]]

    def move(self, source: int, target: int) -> None:
        """Move a request to another place."""
        self.weights[target], self.brings[target] = self.weights[source], self.brings[source]
        self.brings[source] = False

    def locate(
        self,
        starts: Int[Tensor, " requests_and_one"],
        tokens: int,
        places: Int[Tensor, " requests"] | None = None,
    ) -> None:
        """Note where each token's request is; tokens behind the last request are padding, and nobody's.

        Args:
            starts: where the tokens of each request in the batch start, and where those of the last end.
            tokens: how many tokens there are, padding included.
            places: the place of each request in the batch; its position there by default.
        """
        nobody = self.brings.shape[0] - 1
        ends = starts[1:].contiguous().to(self._counting.dtype)
        found = torch.searchsorted(ends, self._counting[:tokens], right=True)
        if places is not None:
            found = torch.cat([places.to(found), found.new_tensor([nobody])])[found.clamp_(max=len(places))]
        self.places[:tokens] = found.clamp_(max=nobody)

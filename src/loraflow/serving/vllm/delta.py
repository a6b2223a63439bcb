r"""The fused update of a linear of vLLM, and how its weights come to it, in operations that compile in one graph.

$$y = W x + B\,(E w \odot A x)$$

as in `loraflow.core.linear`, for tokens of any number of requests laid one behind the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.core.stack import StackedLora
from loraflow.errors import ArchitectureError
from loraflow.serving.overflow import finite
from loraflow.serving.vllm.request_table import RequestTable
from loraflow.serving.vllm.shards import Part

# Up to so many slots, one product with the B of all packed linears, zeros between them, takes less time than a product
# with each and putting the results together.
_TOGETHER = 128

Gather = Callable[[Tensor], Tensor]
"""Makes a rank's columns of an input the whole input."""


class ForwardWeights:
    """What the decoder layers and linears of a model share during a forward.

    Attributes:
        given: what the method gives, `[tokens, adapters]` or `[adapters]`; for one layer, or for all from the first on.
        weights: the running layer's fusion weights, in the same shape.
        applied: how many linears of the running layer have added their update.
        requests: weights that requests bring with them, where they may.
    """

    given: Tensor | None
    weights: Tensor | None
    applied: int
    requests: RequestTable | None

    def __init__(self, requests: RequestTable | None = None) -> None:
        self.given = self.weights = None
        self.applied = 0
        self.requests = requests

    def settle(
        self, given: Float[Tensor, "*tokens adapters"], layer: int, tokens: int
    ) -> Float[Tensor, "*tokens adapters"]:
        """The fusion weights to use, given those of the method."""
        return given if self.requests is None else self.requests.settle(given, layer, tokens)

    def guard(self, states: Tensor) -> Tensor:
        """States that end in the cache; where requests bring weights, none can spoil it for the others."""
        return states if self.requests is None else finite(states)


class LayerWeights(nn.Module):
    """Gives a decoder layer's fusion weights, and sees to it that all of its linears use them.

    Attributes:
        gate: reads the layer's input; None where linears have gates of their own, or the first layer's is for all.
        keeps: whether what the method gives is for the next layer too.
        linears: how many of its linears are fused.
    """

    gate: nn.Module | None
    keeps: bool
    linears: int

    def __init__(self, shared: ForwardWeights, layer: int, gate: nn.Module | None, *, keeps: bool) -> None:
        super().__init__()
        self.shared = shared
        self.layer = layer
        self.gate = gate
        self.keeps = keeps
        self.linears = 0

    def open(self, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Compute the fusion weights from the residual stream, of which vLLM may hand over two summands."""
        shared = self.shared
        shared.applied = 0
        if self.gate is not None:
            x = hidden_states if residual is None else hidden_states + residual
            shared.given = self.gate(x.reshape(-1, x.shape[-1]))
        if shared.given is not None:
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).shape[0]
            shared.weights = shared.settle(shared.given, self.layer, tokens)

    def close(self) -> None:
        """Forget the weights after the layer.

        Raises:
            ArchitectureError: if the layer went past one of its linears, whose update is missing then.
        """
        shared = self.shared
        applied, shared.applied = shared.applied, 0
        shared.weights = None
        if not self.keeps:
            shared.given = None
        if applied != self.linears:
            raise ArchitectureError(
                f"Decoder layer {self.layer} called {applied} of its {self.linears} fused linears: vLLM computes the "
                "others some other way, without the adapters. This base cannot be served fused."
            )


class FusedDelta(nn.Module):
    """All adapters' weighted updates of one linear of vLLM, for each of the linears that it packs.

    Attributes:
        lora_A: their stacked A, one below the other, `[slots, in_features]`.
        owner: which fusion weight each slot is for, `[slots]`.
        gates: the gates of the packed linears, where each has its own.
    """

    lora_A: Tensor
    owner: Tensor
    gates: nn.ModuleList

    def __init__(
        self, shared: ForwardWeights, layer: int, stacks: Sequence[StackedLora], parts: Sequence[Part]
    ) -> None:
        super().__init__()
        self.shared = shared
        self.layer = layer
        self.gates = nn.ModuleList()
        self.gather: Gather | None = None
        self.sizes = [stack.lora_A.shape[0] for stack in stacks]
        self.widths, self.spans = self.sizes, [(part.start, part.stop) for part in parts]
        matrices = [stack.lora_B for stack in stacks]
        adjacent = all(one.stop == other.start for one, other in itertools.pairwise(parts))
        if adjacent and sum(self.sizes) <= _TOGETHER:
            self.widths, self.spans = [sum(self.sizes)], [(parts[0].start, parts[-1].stop)]
            matrices = [torch.block_diag(*matrices)]
        self.adapters = len(stacks[0].slots)
        self.register_buffer("lora_A", torch.cat([stack.lora_A for stack in stacks]).contiguous(), persistent=False)
        self.register_buffer("owner", torch.cat([_owner(stack) for stack in stacks]), persistent=False)
        for position, matrix in enumerate(matrices):
            self.register_buffer(f"lora_B{position}", matrix.contiguous(), persistent=False)

    def add_gates(self, gates: Sequence[nn.Module], gather: Gather | None) -> None:
        """Let each packed linear have a gate of its own, which reads the linear's whole input."""
        self.gates.extend(gates)
        self.gather = gather
        owners = self.owner.split(self.sizes)
        self.owner = torch.cat([owner + index * self.adapters for index, owner in enumerate(owners)])

    def forward(
        self, x: Float[Tensor, "*batch in_features"], base_output: Float[Tensor, "*batch out_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """The base's output plus the weighted sum of the adapters' updates."""
        self.shared.applied += 1
        flat = base_output.reshape(-1, base_output.shape[-1])
        x = x.reshape(-1, x.shape[-1])
        weights = self._weights(x)
        product = F.linear(x, self.lora_A)
        # In the gate's precision, then rounded once.
        product = product * weights[..., self.owner].to(product.dtype)
        return self.shared.guard(self._add(flat, product.split(self.widths, dim=-1)).view(base_output.shape))

    def _weights(self, x: Float[Tensor, "tokens in_features"]) -> Float[Tensor, "*tokens gates"]:
        shared = self.shared
        if not len(self.gates):
            assert shared.weights is not None
            return shared.weights
        if self.gather is not None:
            x = self.gather(x)
        weights = [shared.settle(gate(x), self.layer, x.shape[0]) for gate in self.gates]
        return torch.cat(weights, dim=-1) if len(weights) > 1 else weights[0]

    def _add(self, flat: Float[Tensor, "tokens out_features"], products: Sequence[Tensor]) -> Tensor:
        """The products with B, each added where its linears' output is."""
        pieces, done = [], 0
        for position, (product, (start, stop)) in enumerate(zip(products, self.spans, strict=True)):
            if start > done:
                pieces.append(flat[:, done:start])
            lora_B = getattr(self, f"lora_B{position}")
            whole = start == 0 and stop == flat.shape[-1]
            pieces.append(torch.addmm(flat if whole else flat[:, start:stop], product, lora_B))
            done = stop
        if done < flat.shape[-1]:
            pieces.append(flat[:, done:])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _owner(stack: StackedLora) -> Tensor:
    return torch.tensor([adapter for adapter, count in enumerate(stack.slots) for _ in range(count)])


class GivenWeights(nn.Module):
    """Weights of requests that each bring their own: zero for every other token, which is padding."""

    zeros: Tensor

    def __init__(self, adapters: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(adapters), persistent=False)

    def forward(self, x: Tensor) -> Float[Tensor, " adapters"]:
        """No adapter at all."""
        return self.zeros

"""How a fusion weight comes from its gate to the linears of its decoder layer.

Each decoder layer has one `LayerContext`. The layer `open`s it with its input: the gate is called, and its weights are
brought into one shape, `[tokens, adapters]`, or `[adapters]` where all tokens have the same. Each fused linear asks for
its `weights_for` its input, which are those of the layer, or of the linear's own gate where it has one; the product of
weights and adapters is in `linear.py`. `close` drops it all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.core.lanes import Lane, Lanes
from loraflow.errors import ArchitectureError, MethodError


@dataclass(slots=True, init=False, eq=False, repr=False)
class LayerContext:
    """What one decoder layer's gates and linears share; no module, for those are slow to read from and to write to.

    Attributes:
        index: the layer's place in the model.
        adapters: how many there are.
        own: those of the method in use: one lane of all rows.
        lanes: who weighs the rows of the call that runs; `own` unless rows differ.
        alone: for each row, the position of the one adapter that it uses, or None for the base; None where rows have
            fusion weights.
        embeddings: the input of the first layer, kept there for the others while a gate of the whole model reads it; a
            forward that was given up leaves it to the next.
        recorded: where the weights of a forward are noted, by linear ("" for the layer), while a trace is taken.
        shape: batch and seq of the running forward.
        running: the lanes of the running forward.
        weights: its fusion weights, `[tokens, adapters]` or `[adapters]`; None for the base alone.
        mixes: whether parameters are mixed instead of outputs; a mask `[tokens, 1]` where tokens differ.
        group: the group of linears (`linear.InputGroup`) that was projected last.
        seen: the input that it was projected from.
        products: its weighted slots, `[tokens, slots]` for each linear.
        member_weights: the fusion weights of each of its linears.
    """

    index: int
    adapters: int
    own: Lanes
    lanes: Lanes
    alone: Sequence[int | None] | None
    embeddings: Tensor | None
    recorded: dict[str, Tensor] | None
    shape: Sequence[int]
    running: Lanes
    weights: Tensor | None
    mixes: bool | Tensor
    group: Any
    seen: Tensor | None
    products: Sequence[Tensor]
    member_weights: Sequence[Tensor]
    _first: LayerContext
    _is_last: bool

    def __init__(self, index: int, layers: int, adapters: int, first: LayerContext | None) -> None:
        self.index = index
        self.adapters = adapters
        self.alone = self.embeddings = self.recorded = None
        self._first = first or self
        self._is_last = index == layers - 1
        self.set_own(Lanes(None, (Lane(None, "layer", {}),)))
        self.close()

    def set_own(self, lanes: Lanes) -> None:
        """Let a method weigh every row of every call from now on, unless a call says otherwise."""
        self.own = self.lanes = lanes

    def carried(self, hidden_states: Float[Tensor, "batch seq hidden"]) -> dict[str, Any]:
        """What the running call of the model has for this layer beside its input, as arguments of its forward.

        Handed over so, a recomputation for gradient checkpointing sees those of its own forward.
        """
        carried: dict[str, Any] = {"fusion_lanes": self.lanes}
        if self.lanes.reads_embeddings:
            first = self._first
            if first is self:
                self.embeddings = hidden_states.detach()
            carried["fusion_embeddings"] = first.embeddings
            if self._is_last:
                first.embeddings = None
        return carried

    def open(
        self, hidden_states: Float[Tensor, "batch seq hidden"], embeddings: Tensor | None, lanes: Lanes | None
    ) -> None:
        """Call the layer's gates on its input, and keep their weights for its linears."""
        self.running = lanes = lanes or self.own
        if lanes.flat:
            hidden_states = hidden_states.transpose(0, 1)
            embeddings = None if embeddings is None else embeddings.transpose(0, 1)
        self.shape = hidden_states.shape[:-1]
        if self.alone is not None:
            return
        lanes.check_batch(self.shape[0])
        self.mixes = lanes.mixes(self.shape, hidden_states.device)
        weights = self._weights_of_layer(lanes, hidden_states, embeddings)
        if weights is not None and self.recorded is not None:
            self._record("", weights)
        self.weights = weights

    def weights_for(
        self, names: Sequence[str], x: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*tokens gates"] | None:
        """The fusion weights for linears that read one input, side by side where each has its own; None for the base.

        Raises:
            ArchitectureError: if the linears read only some of the layer's tokens.
        """
        weights = self._weights_of_modules(names, x) if self.running.reads_modules else self.weights
        if x.dim() == 2 and weights is not None and weights.dim() == 2 and weights.shape[0] != x.shape[0]:
            raise ArchitectureError(
                some_tokens(f"'{names[0]}' of decoder layer {self.index}", x.shape[0], weights.shape[0])
            )
        return weights

    def close(self) -> None:
        """Drop everything of the layer's forward, so that its activations do not outlive it."""
        self.shape, self.products, self.member_weights = (), (), ()
        self.weights = self.group = self.seen = None
        self.running = self.own
        self.mixes = False

    def _weights_of_layer(
        self, lanes: Lanes, hidden_states: Float[Tensor, "batch seq hidden"], embeddings: Tensor | None
    ) -> Float[Tensor, "*tokens adapters"] | None:
        """The weights of the layer, or of the whole model; zero where the base answers or linears have gates."""
        only = lanes.only
        if only is not None:
            gate = None if only.place == "module" else only.gate(self.index)
            return None if gate is None else self._by_token(self._ask(only, gate, hidden_states, embeddings))
        dtype = torch.promote_types(torch.float32, hidden_states.dtype)
        weights = hidden_states.new_zeros(*self.shape, self.adapters, dtype=dtype)
        for lane in lanes.lanes:
            gate = None if lane.place == "module" else lane.gate(self.index)
            if gate is None:
                continue
            rows = lanes.rows_of(lane, self.shape[0], hidden_states.device)
            source = None if embeddings is None else embeddings[rows.to(embeddings.device)]
            weights[rows] = _by_row(self._ask(lane, gate, hidden_states[rows], source), len(rows)).to(weights)
        return weights.flatten(0, 1)

    def _weights_of_modules(
        self, names: Sequence[str], x: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*tokens gates"] | None:
        """The weights of linears, some or all of which have gates of their own."""
        lanes, only = self.running, self.running.only
        if only is None or lanes.flat:
            x = x.reshape(*self.shape, -1)
        if only is not None:
            gates = [only.gate(self.index, name) for name in names]
            if all(gate is None for gate in gates):
                # The base alone, or a fusion of some of the model's adapters, none of which targets these.
                return None
            found = [
                x.new_zeros(self.adapters) if gate is None else self._by_token(only.spread(gate(x), self.adapters))
                for gate in gates
            ]
        else:
            assert self.weights is not None
            found = [self._weights_of_module(lanes, name, x, self.weights) for name in names]
        if self.recorded is not None:
            for name, weights in zip(names, found, strict=True):
                self._record(name, weights)
        if len(found) == 1:
            return found[0]
        if len({weights.dim() for weights in found}) > 1:
            found = list(torch.broadcast_tensors(*found))
        return torch.cat(found, dim=-1)

    def _weights_of_module(
        self, lanes: Lanes, name: str, x: Float[Tensor, "batch seq features"], shared: Float[Tensor, "tokens adapters"]
    ) -> Float[Tensor, "tokens adapters"]:
        """The weights of one linear where lanes differ: the layer's, but for rows that have a gate for it."""
        weights = shared.view(*self.shape, -1).clone()
        for lane in lanes.lanes:
            gate = lane.gate(self.index, name) if lane.place == "module" else None
            if gate is not None:
                rows = lanes.rows_of(lane, self.shape[0], x.device)
                weights[rows] = _by_row(lane.spread(gate(x[rows]), self.adapters), len(rows)).to(weights)
        return weights.flatten(0, 1)

    def _ask(self, lane: Lane, gate: nn.Module, hidden_states: Tensor, embeddings: Tensor | None) -> Tensor:
        """Call a gate on what it reads, for all adapters of the model."""
        if lane.place == "model":
            assert embeddings is not None
            # The one gate of a whole model may live on another device than this layer.
            device = next((t.device for t in itertools.chain(gate.parameters(), gate.buffers())), embeddings.device)
            weights = gate(embeddings.to(device)).to(hidden_states.device)
        else:
            weights = gate(hidden_states)
        return lane.spread(weights, self.adapters)

    def _by_token(self, weights: Float[Tensor, "*weights gates"]) -> Float[Tensor, "*tokens gates"]:
        """Weights of rows and positions in one axis of tokens, as some models (OPT) hand them to their linears.

        Raises:
            MethodError: if a gate gave weights of another shape.
        """
        if weights.dim() == 1:
            return weights
        shape, given = self.shape, weights.shape[:-1]
        if given != shape:
            # A model that flattened its tokens hands them to a linear's gate so.
            if given == (math.prod(shape),):
                return weights
            rows = (shape[0], self.running.requests)
            if given[0] not in rows or tuple(given[1:]) not in ((), (1,)):
                raise MethodError(
                    f"A gate of decoder layer {self.index} gave weights of shape {tuple(weights.shape)} for inputs of "
                    f"{tuple(shape)} (batch, seq). Give (adapters), (batch, adapters) or (batch, seq, adapters)."
                )
            weights = _by_row(weights.reshape(given[0], -1), shape[0]).expand(*shape, -1)
        return weights.reshape(-1, weights.shape[-1])

    def _record(self, name: str, weights: Float[Tensor, "*tokens adapters"]) -> None:
        assert self.recorded is not None
        noted = weights.detach().float()
        self.recorded[name] = noted.reshape(*self.shape, -1) if noted.dim() > 1 else noted.expand(*self.shape, -1)

    def __getstate__(self) -> tuple[Any, ...]:
        # A call that runs meanwhile is not copied.
        return self.index, self.adapters, self.own, self._first, self._is_last

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.index, self.adapters, own, self._first, self._is_last = state
        self.alone = self.embeddings = self.recorded = None
        self.set_own(own)
        self.close()


def _by_row(weights: Float[Tensor, "*weights adapters"], rows: int) -> Float[Tensor, "*rows adapters"]:
    """Weights to be put into rows; those of requests are repeated for the rows that generation made of them."""
    if weights.dim() != 2:
        return weights
    return weights.repeat_interleave(rows // weights.shape[0], dim=0)[:, None]


def some_tokens(name: str, found: int, of: int) -> str:
    """What is wrong with a linear that reads only some of its layer's tokens."""
    return (
        f"{name} got {found} tokens of the layer's {of}: modules that see only some tokens (routed experts) cannot be "
        "fused. Leave them out of `target_modules`."
    )

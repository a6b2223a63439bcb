"""Fused decoder layers: their gates, and how a forward's fusion weights come to their linears.

A decoder layer keeps its place, name and parameters. Its class is swapped for a subclass whose `forward` first computes
the layer's fusion weights, and a `LayerFusion` submodule holds what it shares with its fused linears. The gate is
computed inside the layer's own `forward`, so that gradient checkpointing recomputes it with the rest of the layer in
every version of transformers.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.core.linear import LayerForward, SharedInput, some_tokens
from loraflow.errors import ArchitectureError, LoraflowError, MethodError
from loraflow.methods.base import Mixing, Place

Gates = dict[str, nn.Module]
"""The gates of one method by site: `model`, `layers.3`, or `layers.3.self_attn.q_proj`."""


class RowGate(nn.Module):
    """Fusion weights that are given, for each request its own."""

    def __init__(self, weights: Float[Tensor, "requests adapters"]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Float[Tensor, "batch seq features"]) -> Float[Tensor, "requests adapters"]:
        """The weights; each request's are for all rows that generation makes of it."""
        return self.weights


@dataclass(frozen=True)
class Lane:
    """Requests of a batch that are weighed alike.

    Attributes:
        requests: their positions in the batch.
        place: where the gates stand.
        gates: by site; none for the base alone.
        mixing: what is mixed.
        among: positions of the adapters that the gates weigh; None for all of them.
    """

    requests: tuple[int, ...]
    place: Place
    gates: Gates
    mixing: Mixing = "outputs"
    among: tuple[int, ...] | None = None

    def gate(self, layer: int, module: str | None = None) -> nn.Module | None:
        """The gate of a layer, or of one of its linears; None for the base alone."""
        site = "model" if self.place == "model" else f"layers.{layer}"
        return self.gates.get(site if module is None else f"{site}.{module}")

    def spread(self, weights: Float[Tensor, "*weights own"], adapters: int) -> Float[Tensor, "*weights adapters"]:
        """The weights that a gate gave, each at its adapter's place among all; the others get zero."""
        if self.among is None:
            return weights
        everywhere = weights.new_zeros(*weights.shape[:-1], adapters)
        everywhere[..., list(self.among)] = weights
        return everywhere


@dataclass(frozen=True)
class Lanes:
    """Who weighs which rows of a batch, where one method does not weigh them all.

    Generation repeats each request for its beams or returned sequences, one after the other; a forward of more rows
    than requests is read so. Continuous batching lays all requests one behind the other in one row; each token of that
    row then counts as a request.

    Attributes:
        requests: size of the batch.
        lanes: every request is in one of them.
        flat: whether they are the tokens of one row.
    """

    requests: int
    lanes: tuple[Lane, ...]
    flat: bool = False
    _rows: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def only(self) -> Lane | None:
        """The one lane, where there are no others: its requests are all rows, in order."""
        return self.lanes[0] if len(self.lanes) == 1 else None

    @property
    def reads_embeddings(self) -> bool:
        """Whether a gate of the whole model is among them."""
        return any(lane.place == "model" for lane in self.lanes)

    def rows_of(self, lane: Lane, batch: int, device: torch.device) -> Tensor:
        """The rows of a forward that are a lane's requests."""
        key = (id(lane), batch, device)
        if key not in self._rows:
            repeats = batch // self.requests
            rows = [request * repeats + repeat for request in lane.requests for repeat in range(repeats)]
            self._rows[key] = torch.tensor(rows, device=device)
        return self._rows[key]

    def check_batch(self, batch: int) -> None:
        """Check that a forward's rows are the requests, or several for each.

        Raises:
            LoraflowError: if their number is no multiple of the requests.
        """
        if batch % self.requests:
            raise LoraflowError(
                f"A forward of {batch} rows came where {self.requests} requests have weights of their own. Give one "
                "method, or one row of weights, for each row of `input_ids`."
            )

    def mixes(self, shape: Sequence[int], device: torch.device) -> bool | Tensor:
        """Whether parameters are mixed instead of outputs; for each token, where lanes differ."""
        mixing = {lane.mixing for lane in self.lanes}
        if len(mixing) == 1:
            return mixing == {"parameters"}
        mask = torch.zeros(*shape, 1, dtype=torch.bool, device=device)
        for lane in self.lanes:
            if lane.mixing == "parameters":
                mask[self.rows_of(lane, shape[0], device)] = True
        return mask.view(-1, 1)


class Turn:
    """Lets one thread at a time through: what a call keeps on its way, it keeps on the model.

    Like a lock, which could be neither copied nor pickled with the model.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


@dataclass
class Stream:
    """What the layers of one model share during a forward.

    Attributes:
        layers: number of layers.
        adapters: number of adapters.
        turn: held by each call of the fused model.
        embeddings: the input of the first layer, where a gate of the whole model reads it.
        lanes: who weighs which rows; None where the method in use weighs all.
        alone: for each row, the position of the one adapter that it uses, or None for the base; None where rows have
            fusion weights.
    """

    layers: int
    adapters: int
    turn: Turn = field(default_factory=Turn)
    embeddings: Tensor | None = None
    lanes: Lanes | None = None
    alone: Sequence[int | None] | None = None


class LayerFusion(nn.Module):
    """One decoder layer's gates, its fusion weights during a forward, and its groups of fused linears.

    Attributes:
        index: the layer's place in the model.
        stream: what the model's layers share.
        shared_inputs: the groups of fused linears.
        gates: the gates that this layer owns.
        place: where the method's gates stand.
        gate: the one that gives this layer's weights, unless each linear has its own.
        mixes: whether the method mixes parameters instead of outputs.
        now: what the running forward keeps.
        recorded: where the weights of a forward are noted, by linear ("" for the layer), while a trace is taken.
    """

    index: int
    stream: Stream
    shared_inputs: nn.ModuleList
    gates: nn.ModuleDict
    place: Place
    gate: nn.Module | None
    mixes: bool
    now: LayerForward
    recorded: dict[str, Tensor] | None

    def __init__(self, index: int, stream: Stream) -> None:
        super().__init__()
        self.index = index
        self.shared_inputs = nn.ModuleList()
        self.gates = nn.ModuleDict()
        self.place = "layer"
        self.mixes = False
        self.recorded = None
        # Plain references: neither is this layer's own.
        self.__dict__["stream"] = stream
        self.__dict__["gate"] = None
        self._names: dict[SharedInput, list[str]] = {}
        self.now = LayerForward()

    def add_group(self, shared: SharedInput, names: Sequence[str]) -> None:
        """Take over the group of linears of these names, which read one input."""
        self.shared_inputs.append(shared)
        self._names[shared] = list(names)

    def set_dropout(self, probability: float) -> None:
        """Drop inputs of the adapters with this probability while training."""
        for shared in self._names:
            shared.dropout = probability

    def install(self, place: Place, gates: Mapping[str, nn.Module], mixing: Mixing) -> None:
        """Take over gates: one under the key "" for the layer, or one for each of its linears by name."""
        self.place = place
        self.mixes = mixing == "parameters"
        # The gate of a whole model belongs to its first layer; the others only call it.
        owned = {} if place == "model" and self.index > 0 else gates
        self.gates = nn.ModuleDict({_key(name): gate for name, gate in owned.items()})
        self.__dict__["gate"] = gates.get("")

    def open(
        self, hidden_states: Float[Tensor, "batch seq hidden"], embeddings: Tensor | None, lanes: Lanes | None
    ) -> None:
        """Compute the layer's fusion weights for this forward."""
        now = self.now
        if lanes is not None and lanes.flat:
            hidden_states = hidden_states.transpose(0, 1)
            embeddings = None if embeddings is None else embeddings.transpose(0, 1)
        now.shape = hidden_states.shape[:-1]
        now.lanes = lanes
        if self.stream.alone is not None:
            now.alone = self.stream.alone
            return
        if lanes is None:
            now.mixes = self.mixes
            weights = None if self.gate is None else self._call(self.gate, hidden_states, embeddings)
        else:
            lanes.check_batch(now.shape[0])
            now.mixes = lanes.mixes(now.shape, hidden_states.device)
            weights = self._weights_of_lanes(lanes, hidden_states, embeddings)
        if weights is None:
            return
        if self.recorded is not None:
            self._record("", weights)
        now.weights = self._by_token(weights)

    def weights_for(
        self, shared: SharedInput, x: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*tokens gates"] | None:
        """The fusion weights for a group of the layer's linears and its input; None for the base alone.

        Raises:
            ArchitectureError: if a linear reads only some of the layer's tokens.
        """
        lanes, names = self.now.lanes, self._names[shared]
        if lanes is not None:
            weights = self._weights_of_module_lanes(lanes, names, x)
        else:
            weights = self.now.weights if self.place != "module" else self._weights_of_each(names, x)
        if x.dim() == 2 and weights is not None and weights.dim() == 2 and weights.shape[0] != x.shape[0]:
            raise ArchitectureError(
                some_tokens(f"'{names[0]}' of decoder layer {self.index}", x.shape[0], weights.shape[0])
            )
        return weights

    def _call(self, gate: nn.Module, hidden_states: Tensor, embeddings: Tensor | None) -> Tensor:
        if embeddings is None:
            return gate(hidden_states)
        # The one gate of a whole model may live on another device than this layer.
        device = next((t.device for t in itertools.chain(gate.parameters(), gate.buffers())), embeddings.device)
        return gate(embeddings.to(device)).to(hidden_states.device)

    def _spread(self, lane: Lane, weights: Tensor) -> Tensor:
        return lane.spread(weights, self.stream.adapters)

    def _weights_of_each(self, names: Sequence[str], x: Float[Tensor, "*batch features"]) -> Tensor | None:
        """The weights of linears with gates of their own, side by side."""
        if not self.gates:
            return None
        weights = [self.gates[_key(name)](x) for name in names]
        if self.recorded is not None:
            for name, found in zip(names, weights, strict=True):
                self._record(name, found)
        return self._by_token(torch.cat(weights, dim=-1) if len(weights) > 1 else weights[0])

    def _weights_of_lanes(
        self, lanes: Lanes, hidden_states: Float[Tensor, "batch seq hidden"], embeddings: Tensor | None
    ) -> Float[Tensor, "batch *seq adapters"] | None:
        """The weights of rows with different methods; zero where the base answers, and where each linear has a gate."""
        only = lanes.only
        if only is not None and only.place != "module":
            gate = only.gate(self.index)
            if gate is None:
                return None
            return _by_row(self._spread(only, self._call(gate, hidden_states, embeddings)), len(hidden_states))
        dtype = torch.promote_types(torch.float32, hidden_states.dtype)
        weights = hidden_states.new_zeros(*hidden_states.shape[:-1], self.stream.adapters, dtype=dtype)
        for lane in lanes.lanes:
            gate = lane.gate(self.index) if lane.place != "module" else None
            if gate is None:
                continue
            rows = lanes.rows_of(lane, hidden_states.shape[0], hidden_states.device)
            source = None
            if lane.place == "model":
                assert embeddings is not None
                source = embeddings[rows.to(embeddings.device)]
            given = self._spread(lane, self._call(gate, hidden_states[rows], source))
            weights[rows] = _by_row(given, len(rows)).to(weights)
        return weights

    def _weights_of_module_lanes(
        self, lanes: Lanes, names: Sequence[str], x: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "tokens gates"] | None:
        """The same for a group of linears, where a lane has gates for each of them."""
        shared = self.now.weights
        if all(lane.place != "module" for lane in lanes.lanes):
            return shared
        assert shared is not None
        shape = self.now.shape
        x = x.reshape(*shape, -1)
        weights = shared.view(*shape, -1).repeat(1, 1, len(names))
        for lane in lanes.lanes:
            if lane.place != "module":
                continue
            rows = lanes.rows_of(lane, shape[0], x.device)
            for position, name in enumerate(names):
                gate = lane.gate(self.index, name)
                if gate is None:
                    # A fusion of some of the model's adapters, none of which targets this linear.
                    continue
                of_module = slice(position * self.stream.adapters, (position + 1) * self.stream.adapters)
                weights[rows, :, of_module] = _by_row(self._spread(lane, gate(x[rows])), len(rows)).to(weights)
        if self.recorded is not None:
            for name, found in zip(names, weights.split(self.stream.adapters, dim=-1), strict=True):
                self._record(name, found)
        return weights.flatten(0, 1)

    def _by_token(self, weights: Float[Tensor, "*weights gates"]) -> Float[Tensor, "*tokens gates"]:
        """Weights of rows and positions in one axis of tokens, as some models (OPT) hand them to their linears.

        Raises:
            MethodError: if a gate gave weights of another shape.
        """
        if weights.dim() == 1:
            return weights
        shape, given = self.now.shape, weights.shape[:-1]
        if given != shape:
            # A model that flattened its tokens hands them to a linear's gate so; other weights are for whole rows.
            if given == (math.prod(shape),):
                return weights
            if given not in ((shape[0],), (shape[0], 1)):
                raise MethodError(
                    f"A gate of decoder layer {self.index} gave weights of shape {tuple(weights.shape)} for inputs of "
                    f"{tuple(shape)} (batch, seq). Give (adapters), (batch, adapters) or (batch, seq, adapters)."
                )
            weights = weights.reshape(shape[0], 1, -1).expand(*shape, -1)
        return weights.reshape(-1, weights.shape[-1])

    def _record(self, name: str, weights: Tensor) -> None:
        assert self.recorded is not None
        noted = self._by_token(weights.detach().float())
        shape = self.now.shape
        self.recorded[name] = noted.reshape(*shape, -1) if noted.dim() > 1 else noted.expand(*shape, -1)


def _by_row(weights: Float[Tensor, "*weights adapters"], rows: int) -> Float[Tensor, "*rows adapters"]:
    """Weights to be put into rows; those of requests are repeated for the rows that generation made of them."""
    if weights.dim() != 2:
        return weights
    return weights.repeat_interleave(rows // weights.shape[0], dim=0)[:, None]


def _key(name: str) -> str:
    # nn.ModuleDict takes neither dots nor the empty string.
    return name.replace(".", "/") or "layer"


class FusedDecoderLayer(nn.Module):
    """Mixed into a decoder layer's class: computes the fusion weights before anything else in the layer."""

    fusion: LayerFusion

    def __call__(self, *args, **kwargs):
        """Run the layer, inside gradient checkpointing where that is on."""
        fusion, stream = self.fusion, self.fusion.stream
        lanes = stream.lanes
        if lanes is None and fusion.place != "model" and not self.training:
            return super().__call__(*args, **kwargs)
        hidden_states, args, kwargs = _take_stream(args, kwargs)
        if self._checkpoints_without_gradient(hidden_states):
            # Reentrant checkpointing gives no gradient to a segment none of whose inputs requires one.
            hidden_states = hidden_states.detach().requires_grad_()
        # Handed over as arguments, so that a recomputation sees those of its own forward.
        if lanes is not None:
            kwargs["fusion_lanes"] = lanes
        if lanes.reads_embeddings if lanes is not None else fusion.place == "model" and fusion.gate is not None:
            if fusion.index == 0:
                stream.embeddings = hidden_states.detach()
            kwargs["fusion_embeddings"] = stream.embeddings
            if fusion.index == stream.layers - 1:
                stream.embeddings = None
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, *args, fusion_embeddings: Tensor | None = None, fusion_lanes: Lanes | None = None, **kwargs):
        """The decoder layer's own forward, with its fusion weights in place."""
        fusion = self.fusion
        fusion.open(args[0] if args else kwargs["hidden_states"], fusion_embeddings, fusion_lanes)
        try:
            return super().forward(*args, **kwargs)
        finally:
            fusion.now.clear()

    def _checkpoints_without_gradient(self, hidden_states: Tensor) -> bool:
        return (
            self.training
            and getattr(self, "gradient_checkpointing", False)
            and torch.is_grad_enabled()
            and not hidden_states.requires_grad
        )


def _take_stream(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], args, {key: value for key, value in kwargs.items() if key != "hidden_states"}

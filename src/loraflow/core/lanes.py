"""Who weighs which rows of a batch: a *lane* is a set of requests that one method weighs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loraflow.errors import ArchitectureError, FusionError, LoraflowError
from loraflow.methods.base import Mixing, Place

Gates = dict[str, nn.Module]
"""The gates of one method by site: `model`, `layers.3`, or `layers.3.self_attn.q_proj`."""

KEEPER = "model"
"""Where, among gates of layers or linears, is what their method keeps to read prompts by, if it does."""


def learned_of(gates: Gates) -> dict[str, Tensor]:
    """What gates have learned: `site.parameter` to tensor."""
    return {f"{site}.{name}": tensor for site, gate in gates.items() for name, tensor in gate.state_dict().items()}


def load_gates(gates: Gates, learned: Mapping[str, Tensor], of: str, *, assign: bool = False) -> None:
    """Load what `learned_of` gave; all of it, for a gate left out would change the model.

    Raises:
        FusionError: if tensors are missing, unknown, or of another shape.
    """
    mine = learned_of(gates)
    wrong = sorted(mine.keys() ^ learned.keys())
    wrong += sorted(name for name in mine.keys() & learned.keys() if mine[name].shape != learned[name].shape)
    if wrong:
        raise FusionError(
            f"The learned tensors do not match {of}: '{wrong[0]}' is missing, unknown or of another shape "
            f"({len(wrong)} such). Use the fusion's own method and adapters."
        )
    for site, gate in gates.items():
        gate.load_state_dict({name: learned[f"{site}.{name}"] for name in gate.state_dict()}, assign=assign)


def constant_weights_of(gate: nn.Module, features: int) -> Float[Tensor, " adapters"]:
    """The weights that a gate that ignores its input gives for any."""
    like = next((t for t in chain(gate.parameters(), gate.buffers()) if t.is_floating_point()), torch.zeros(()))
    was_training = gate.training
    try:
        weights = gate.eval()(like.new_zeros(1, 1, features))
    finally:
        gate.train(was_training)
    return weights.detach().double().cpu().reshape(-1, weights.shape[-1])[0]


class RowGate(nn.Module):
    """Fusion weights that are given, for each request its own."""

    def __init__(self, weights: Float[Tensor, "requests adapters"]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Float[Tensor, "batch seq features"]) -> Float[Tensor, "requests adapters"]:
        """The weights; each request's are for all rows that generation makes of it."""
        return self.weights

    def known_weights(self) -> Float[Tensor, "requests adapters"]:
        """The weights, before anything is read."""
        return self.weights


@dataclass(frozen=True, eq=False)
class Heard:
    """What whole prompts say of the adapters, for each request of its own.

    Attributes:
        prior: minus infinity where an adapter is excluded.
    """

    prior: Float[Tensor, "requests adapters"]

    @functools.cached_property
    def candidates(self) -> tuple[int, ...]:
        """The adapters that some request does not exclude."""
        return tuple(self.prior.isfinite().any(dim=0).nonzero().flatten().tolist())

    @functools.cached_property
    def most(self) -> int:
        """How many adapters a request does not exclude, at most."""
        return int(self.prior.isfinite().sum(dim=-1).max())


class Informed(nn.Module):
    """A gate of one lane, with what the prompts of its requests say of the adapters."""

    def __init__(self, gate: nn.Module, heard: Heard) -> None:
        super().__init__()
        self.gate, self.heard = gate, heard

    @property
    def most(self) -> int:
        """How many adapters have a weight at one position, at most."""
        return max(1, min(self.heard.most, getattr(self.gate, "most", self.heard.most)))

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """The weights; all rows that are one request's stand together, whether they are beams, positions, or both."""
        prior, positions = self.heard.prior.to(x.device), x.shape[:-1].numel()
        prior = prior.repeat_interleave(positions // len(prior), dim=0)
        return self.gate(x, prior.reshape(*x.shape[:-1], -1))


def check_apart(gates: Iterable[nn.Module | None], where: str) -> None:
    """Check that gates are not to weigh several prompts, each by what it says, where they cannot be told apart.

    Raises:
        ArchitectureError: if one is.
    """
    if any(isinstance(gate, Informed) and len(gate.heard.prior) > 1 for gate in gates):
        raise ArchitectureError(
            f"{where} reads rows of which it cannot be told whose they are, so a method that weighs each prompt's "
            "tokens by what that prompt says cannot answer several together. Answer them one at a time."
        )


def inform(gates: Gates, prior: Float[Tensor, "requests adapters"]) -> Gates:
    """A method's gates with what prompts say; what it keeps for the whole model has done its part."""
    heard = Heard(prior)
    return {site: Informed(gate, heard) for site, gate in gates.items() if site != KEEPER}


@dataclass(frozen=True)
class Lane:
    """Requests of a batch that are weighed alike.

    Attributes:
        requests: their positions in the batch; None for all there are.
        place: where the gates stand.
        gates: by site; none for the base alone.
        mixing: what is mixed.
        among: positions of the adapters that the gates weigh; None for all of them.
        adds: whether the gates add updates of their own.
    """

    requests: tuple[int, ...] | None
    place: Place
    gates: Gates
    mixing: Mixing = "outputs"
    among: tuple[int, ...] | None = None
    adds: bool = False

    def gate(self, layer: int, module: str | None = None) -> nn.Module | None:
        """The gate of a layer, or of one of its linears; None for the base alone."""
        if not self.gates:
            return None
        site = "model" if self.place == "model" else f"layers.{layer}"
        return self.gates.get(site if module is None else f"{site}.{module}")

    @property
    def reads_slots(self) -> bool:
        """Whether its gates, which are all of one kind, can weigh by what the adapters have read."""
        first = next(iter(self.gates.values()), None) if self.place == "module" else None
        return hasattr(first, "weigh_slots")

    def spread(self, weights: Float[Tensor, "*weights own"], adapters: int) -> Float[Tensor, "*weights adapters"]:
        """The weights that a gate gave, each at its adapter's place among all."""
        return spread(weights, self.among, adapters)


def spread(
    weights: Float[Tensor, "*weights own"], among: Sequence[int] | None, adapters: int
) -> Float[Tensor, "*weights adapters"]:
    """Weights of the adapters at these positions, each at its place among all; the others get zero."""
    if among is None:
        return weights
    everywhere = weights.new_zeros(*weights.shape[:-1], adapters)
    everywhere[..., list(among)] = weights
    return everywhere


@dataclass(frozen=True)
class Lanes:
    """All lanes of a batch.

    Generation repeats each request for its beams or returned sequences, one after the other; a forward of more rows
    than requests is read so. Continuous batching lays all requests one behind the other in one row; each token of that
    row then counts as a request.

    Attributes:
        requests: size of the batch; None where one method weighs a batch of any size.
        lanes: every request is in one of them.
        flat: whether they are the tokens of one row.
        only: the one lane, where there are no others: its requests are all rows, in order.
        reads_embeddings: whether a gate of the whole model is among them.
        reads_modules: whether linears have gates of their own.
        reads_slots: whether such gates can weigh by what the adapters have read.
        adds: whether gates among them add updates of their own.
        all_mix: whether all lanes mix parameters; None where some do and others mix outputs.
        uses: which adapters they use (`active.Use`), with gradients and without; found by the forwards.
    """

    requests: int | None
    lanes: tuple[Lane, ...]
    flat: bool = False
    only: Lane | None = field(init=False, repr=False)
    reads_embeddings: bool = field(init=False, repr=False)
    reads_modules: bool = field(init=False, repr=False)
    reads_slots: bool = field(init=False, repr=False)
    adds: bool = field(init=False, repr=False)
    all_mix: bool | None = field(init=False, repr=False)
    uses: dict[bool, Any] = field(default_factory=dict, repr=False, compare=False)
    _rows: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Every layer asks, at every token.
        object.__setattr__(self, "only", self.lanes[0] if len(self.lanes) == 1 else None)
        object.__setattr__(self, "reads_embeddings", any(one.place == "model" and one.gates for one in self.lanes))
        object.__setattr__(self, "reads_modules", any(one.place == "module" and one.gates for one in self.lanes))
        object.__setattr__(self, "reads_slots", any(one.reads_slots for one in self.lanes))
        object.__setattr__(self, "adds", any(one.adds and one.gates for one in self.lanes))
        mixing = {one.mixing == "parameters" for one in self.lanes}
        object.__setattr__(self, "all_mix", mixing.pop() if len(mixing) == 1 else None)

    def rows_of(self, lane: Lane, batch: int, device: torch.device) -> Int[Tensor, " rows"]:
        """The rows of a forward that are a lane's requests."""
        key = (id(lane), batch, device)
        if key not in self._rows:
            if lane.requests is None or self.requests is None:
                return torch.arange(batch, device=device)
            repeats = batch // self.requests
            rows = [request * repeats + repeat for request in lane.requests for repeat in range(repeats)]
            self._rows[key] = torch.tensor(rows, device=device)
        return self._rows[key]

    def check_batch(self, batch: int) -> None:
        """Check that a forward's rows are the requests, or several for each.

        Raises:
            LoraflowError: if their number is no multiple of the requests.
        """
        if self.requests is not None and batch % self.requests:
            raise LoraflowError(
                f"A forward of {batch} rows came where {self.requests} requests have weights of their own. Give one "
                "method, or one row of weights, for each row of `input_ids`."
            )

    def mixes(self, shape: Sequence[int], device: torch.device) -> bool | Tensor:
        """Whether parameters are mixed instead of outputs; for each token, where lanes differ."""
        if self.all_mix is not None:
            return self.all_mix
        mask = torch.zeros(*shape, 1, dtype=torch.bool, device=device)
        for lane in self.lanes:
            if lane.mixing == "parameters":
                mask[self.rows_of(lane, shape[0], device)] = True
        return mask.view(-1, 1)


def by_row(weights: Float[Tensor, "*weights adapters"], rows: int) -> Float[Tensor, "*rows adapters"]:
    """Weights to be put into rows; those of requests are repeated for the rows that generation made of them."""
    if weights.dim() != 2:
        return weights
    return weights.repeat_interleave(rows // weights.shape[0], dim=0)[:, None]

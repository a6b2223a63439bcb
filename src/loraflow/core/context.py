"""How a fusion weight comes from its gate to the linears of its decoder layer.

Each decoder layer has one `LayerContext`. The layer `open`s it with its input: the gate is called, and its weights are
brought into one shape, `[tokens, adapters]`, or `[adapters]` where all tokens have the same. Each fused linear asks for
its `weights_for` its input, which are those of the layer, or of the linear's own gate where it has one; the product of
weights and adapters is in `linear.py`. `close` drops it all.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from loraflow.core.active import EVERYTHING, Active, use_of
from loraflow.core.lanes import Lane, Lanes, by_row, check_apart
from loraflow.core.rows import LayerRows, Rows
from loraflow.core.slots import Slots, weigh
from loraflow.core.stock import Stock
from loraflow.errors import ArchitectureError, MethodError


@dataclass(slots=True, init=False, eq=False, repr=False)
class LayerContext:
    """What one decoder layer's gates and linears share; no module, for those are slow to read from and to write to.

    Attributes:
        index: the layer's place in the model.
        adapters: how many there are.
        stock: those that are loaded when they are used; None where the matrices of all are in the linears.
        own: those of the method in use: one lane of all rows.
        lanes: who weighs the rows of the call that runs; `own` unless rows differ.
        alone: for each row, the position of the one adapter that it uses, or None for the base; None where rows have
            fusion weights.
        embeddings: the input of the first layer, kept there for the others while a gate of the whole model reads it; a
            forward that was given up leaves it to the next.
        recorded: where the weights of a forward are noted, by linear ("" for the layer), while a trace is taken.
        rows: which positions the layer's input and the inputs of its linears hold.
        keeps: whether a linear reads cached positions, so that their weights are kept in the cache.
        shape: batch and seq of the running forward.
        running: the lanes of the running forward.
        active: the adapters whose matrices take part in it; None for all of them.
        most: how many of those have a weight at one position, at most; None for as many as there are.
        by_row: whether all positions of a row use the same ones.
        weights: its fusion weights, `[tokens, adapters]` or `[adapters]`; None for the base alone.
        used: those of the active adapters.
        cached: those of all cached positions and its own, `[rows, adapters]`; None without a cache.
        mixes: whether parameters are mixed instead of outputs; a mask `[tokens, 1]` where tokens differ.
        group: the group of linears (`linear.InputGroup`) that was projected last.
        slots: what adapters have read of that input, where gates weigh by it.
        seen: the input that it was projected from.
        products: its weighted slots, `[tokens, slots]` for each linear; or what picked adapters read (`group.Picked`).
        member_weights: the fusion weights of each of its linears.
    """

    index: int
    adapters: int
    stock: Stock | None
    own: Lanes
    lanes: Lanes
    alone: Sequence[int | None] | None
    embeddings: Tensor | None
    recorded: dict[str, Tensor] | None
    rows: LayerRows
    keeps: bool
    shape: Sequence[int]
    running: Lanes
    active: Active | None
    most: int | None
    by_row: bool
    weights: Tensor | None
    used: Tensor | None
    cached: Tensor | None
    mixes: bool | Tensor
    group: Any
    slots: Slots | None
    seen: Tensor | None
    products: Sequence[Any]
    member_weights: Sequence[Tensor]
    _first: LayerContext
    _is_last: bool
    _index: Tensor | None

    def __init__(
        self, index: int, layers: int, adapters: int, first: LayerContext | None, rows: LayerRows | None = None
    ) -> None:
        self.index, self.adapters, self.stock = index, adapters, None
        self.rows = rows or LayerRows()
        self.keeps = False
        self.alone = self.embeddings = self.recorded = None
        self._first = first or self
        self._is_last = index == layers - 1
        self.set_own(Lanes(None, (Lane(None, "layer", {}),)))
        self.close()

    def set_own(self, lanes: Lanes) -> None:
        """Let a method weigh every row of every call from now on, unless a call says otherwise."""
        self.own = self.lanes = lanes

    def own_gates(self) -> list[nn.Module]:
        """The gates that weigh in this layer, in the call that runs."""
        here = f"layers.{self.index}"
        sites = [(site, gate) for lane in self.lanes.lanes for site, gate in lane.gates.items()]
        return [gate for site, gate in sites if site in (here, "model") or site.startswith(f"{here}.")]

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
        if self.rows.streams:
            assert self.rows.axes is not None
            hidden_states = hidden_states.movedim(self.rows.axes, (0, 1))
        if lanes.flat:
            hidden_states = hidden_states.transpose(0, 1)
            embeddings = None if embeddings is None else embeddings.transpose(0, 1)
        self.shape = hidden_states.shape[:2]
        if self.alone is not None:
            return
        lanes.check_batch(self.shape[0])
        self.mixes = lanes.mixes(self.shape, hidden_states.device)
        # Cached positions may have been weighed by others.
        use = EVERYTHING if self.keeps else use_of(lanes, self.adapters, first=self._first is self)
        self.active, self.most, self.by_row = use.active, use.most, use.by_row
        if self.stock is not None:
            self.active = self.stock.bring(use.active)
        self._index = None if use.active is None else use.index(hidden_states.device)
        weights = self._weights_of_layer(lanes, hidden_states, embeddings)
        if weights is not None and self.recorded is not None:
            self._record("", weights)
        self.weights = weights
        self.used = None if weights is None or use.active == () else self._of_active(weights)

    def weights_for(
        self, names: Sequence[str], rows: Rows, x: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*rows gates"] | None:
        """The fusion weights for linears that read one input, side by side where each has its own; None for the base.

        Args:
            names: of the linears, within the layer.
            rows: what the rows of their input are.
            x: that input.

        Returns:
            One row of weights for each row of the input, or one for all.

        Raises:
            ArchitectureError: if the weights differ where it cannot be told which rows they are for.
        """
        # Positions before keep what they had, whoever weighs now.
        weights = self.weights if self.running.reads_modules else self.used
        if rows == "cached" and self.cached is not None:
            weights = self.cached
        if weights is not None and weights.dim() > 1:
            weights = self._weights_of_rows(names[0], weights, rows, x.shape[:-1].numel())
        return self._weights_of_modules(names, rows, x, weights) if self.running.reads_modules else weights

    def _of_active(self, weights: Float[Tensor, "*tokens adapters"]) -> Float[Tensor, "*tokens active"]:
        return weights if self._index is None else weights.index_select(-1, self._index)

    def _weights_of_rows(
        self, name: str, weights: Float[Tensor, "tokens adapters"], rows: Rows, count: int
    ) -> Float[Tensor, "*rows adapters"]:
        """The layer's weights, for this many rows of a linear's input.

        Raises:
            ArchitectureError: if it cannot be told which rows they are for.
        """
        if rows in ("prompts", "unknown"):
            # Methods whose weights differ within a prompt were refused.
            of_prompts = weights.view(*self.shape, -1)[:, 0]
            if len(of_prompts) == 1:
                return of_prompts[0]
            if rows == "prompts" and not self.running.flat:
                return of_prompts.repeat_interleave(count // len(of_prompts), dim=0)
            raise ArchitectureError(
                f"'{name}' of decoder layer {self.index} reads rows of which it cannot be told whose they are, so "
                "prompts with weights of their own cannot be answered together. Answer them one at a time."
            )
        if len(weights) != count:
            raise ArchitectureError(
                f"'{name}' of decoder layer {self.index} got {count} rows where {len(weights)} positions have weights. "
                "Leave it out of `target_modules`."
            )
        return weights

    @property
    def weighs(self) -> bool:
        """Whether the running forward may have fusion weights at all."""
        return self.weights is not None or self.alone is not None or self.running.reads_modules

    def weights_for_routed(
        self,
        name: str,
        rows: Rows,
        tokens: Int[Tensor, " routed"],
        count: int,
        x: Float[Tensor, "routed features"],
    ) -> Float[Tensor, "*routed adapters"] | None:
        """The fusion weights where a router has sent tokens to experts; None for the base.

        Args:
            name: of the experts' parameter, within the layer.
            rows: what the tokens are.
            tokens: which of them each row is.
            count: how many of them there are.
            x: what is multiplied with the parameter.

        Returns:
            Those of each row, or one for all.
        """
        if self.alone is not None:
            chosen = x.new_zeros(len(self.alone), self.adapters)
            for row, adapter in enumerate(self.alone):
                if adapter is not None:
                    chosen[row, adapter] = 1
            return chosen[tokens // (count // len(self.alone))]
        weights = self.weights
        if weights is not None and weights.dim() > 1:
            weights = self._weights_of_rows(name, weights, rows, count)
            weights = weights if weights.dim() == 1 else weights[tokens]
        if not self.running.reads_modules:
            return weights
        own = [(lane, lane.gate(self.index, name)) for lane in self.running.lanes if lane.place == "module"]
        check_apart((gate for _, gate in own), f"'{name}' of decoder layer {self.index}")
        if self.running.only is not None:
            ((lane, gate),) = own
            found = None if gate is None else lane.spread(gate(x), self.adapters)
        else:
            assert weights is not None
            found = weights.expand(len(x), -1).clone()
            of_prompt = torch.div(tokens, count // self.shape[0], rounding_mode="floor")
            for lane, gate in own:
                if gate is not None:
                    here = torch.isin(of_prompt, self.running.rows_of(lane, self.shape[0], x.device))
                    found[here] = lane.spread(gate(x[here]), self.adapters).to(found)
        if found is not None and self.recorded is not None and count == math.prod(self.shape):
            # A token has the mean of what it has at its experts.
            each = found.expand(len(x), -1).float()
            of_tokens = each.new_zeros(count, self.adapters).index_add(0, tokens, each)
            self._record(name, of_tokens / (len(x) // count))
        return found

    def mixes_for(self, count: int) -> bool | Tensor:
        """Whether parameters are mixed, for this many rows of an input; a mask `[rows, 1]` where they differ."""
        if isinstance(self.mixes, bool) or len(self.mixes) == count:
            return self.mixes
        of_prompts = self.mixes.view(*self.shape)[:, :1]
        return of_prompts.expand(-1, count // len(of_prompts)).reshape(-1, 1)

    def keeping(self, values: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
        """Keep the weights of this forward's positions in the cache among a layer's arguments, inside the block.

        They are a part of its keys, so that whatever is done to those (cropping, reordering, beams, a fixed size) is
        done to them, and come back with those of all positions before.
        """
        cache = next((value for value in values if isinstance(value, Cache)), None)
        return contextlib.nullcontext() if cache is None else self._keeping(cache)

    @contextlib.contextmanager
    def _keeping(self, cache: Cache) -> Iterator[None]:
        own, adapters = cache.update, self.adapters
        before = vars(cache).get("update")

        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.running.flat:
                raise ArchitectureError(
                    f"A linear of decoder layer {self.index} reads all cached positions, whose weights continuous "
                    "batching has no place for. Use `generate`."
                )
            weights = keys.new_zeros(adapters) if self.weights is None else self.weights.to(keys)
            if weights.dim() > 1:
                weights = weights.view(len(keys), 1, -1, adapters)
            keys = torch.cat([keys, weights.expand(*keys.shape[:-1], adapters)], dim=-1)
            keys, values = own(keys, values, *args, **kwargs)
            cached = keys[:, 0, :, -adapters:].reshape(-1, adapters)
            self.cached = cached.to(torch.promote_types(torch.float32, cached.dtype))
            return keys[..., :-adapters], values

        cache.update = update  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del cache.update
            if before is not None:
                vars(cache)["update"] = before

    def close(self) -> None:
        """Drop everything of the layer's forward, so that its activations do not outlive it."""
        self.shape, self.products, self.member_weights = (), (), ()
        self.weights = self.used = self.cached = self.group = self.slots = self.seen = self._index = None
        self.active, self.most, self.by_row = None, None, False
        self.running = self.own
        self.mixes = False

    def _weights_of_layer(
        self, lanes: Lanes, hidden_states: Float[Tensor, "batch seq hidden"], embeddings: Tensor | None
    ) -> Float[Tensor, "*tokens adapters"] | None:
        """The weights of the layer, or of the whole model; zero where the base answers or linears have gates."""
        only = lanes.only
        if only is not None:
            gate = None if only.place == "module" else only.gate(self.index)
            return (
                None if gate is None else self._by_token(self._ask(only, gate, hidden_states, embeddings), self.shape)
            )
        dtype = torch.promote_types(torch.float32, hidden_states.dtype)
        weights = hidden_states.new_zeros(*self.shape, self.adapters, dtype=dtype)
        for lane in lanes.lanes:
            gate = None if lane.place == "module" else lane.gate(self.index)
            if gate is None:
                continue
            rows = lanes.rows_of(lane, self.shape[0], hidden_states.device)
            source = None if embeddings is None else embeddings[rows.to(embeddings.device)]
            weights[rows] = by_row(self._ask(lane, gate, hidden_states[rows], source), len(rows)).to(weights)
        return weights.flatten(0, 1)

    def _weights_of_modules(
        self, names: Sequence[str], rows: Rows, x: Float[Tensor, "*batch features"], shared: Tensor | None
    ) -> Float[Tensor, "*rows gates"] | None:
        """The weights of linears, some or all of which have gates of their own; the others have the shared ones.

        Raises:
            ArchitectureError: if prompts differ, and it cannot be told which rows are whose.
        """
        lanes, only = self.running, self.running.only
        if rows in ("cached", "prompts") or (rows == "tokens" and (only is None or lanes.flat)):
            x = x.reshape(self.shape[0], -1, x.shape[-1])
        shape = self.shape if rows == "tokens" else x.shape[:-1]
        if only is not None:
            gates = [only.gate(self.index, name) for name in names]
            if rows == "unknown" or self.rows.streams:
                check_apart(gates, f"'{names[0]}' of decoder layer {self.index}")
            if all(gate is None for gate in gates):
                # The base alone, or a fusion of some of the model's adapters, none of which targets these.
                return None
            found = [
                x.new_zeros(self.adapters)
                if gate is None
                else self._by_token(only.spread(weigh(self.slots, only, gate, member, x, None), self.adapters), shape)
                for member, gate in enumerate(gates)
            ]
        elif rows == "unknown":
            raise ArchitectureError(
                f"'{names[0]}' of decoder layer {self.index} reads rows of which it cannot be told whose they are, so "
                "a method with gates of single modules cannot answer beside others. Answer with one method at a time."
            )
        else:
            assert shared is not None
            shared = shared.expand(x.shape[:-1].numel(), -1)
            found = [self._weights_of_module(name, member, x, shared) for member, name in enumerate(names)]
        if self.recorded is not None and math.prod(shape) == math.prod(self.shape):
            for name, weights in zip(names, found, strict=True):
                self._record(name, weights)
        if self.active == ():
            return None
        found = [self._of_active(weights) for weights in found]
        if len(found) == 1:
            return found[0]
        if len({weights.dim() for weights in found}) > 1:
            found = list(torch.broadcast_tensors(*found))
        return torch.cat(found, dim=-1)

    def _weights_of_module(
        self, name: str, member: int, x: Float[Tensor, "batch seq features"], shared: Float[Tensor, "rows adapters"]
    ) -> Float[Tensor, "rows adapters"]:
        """The weights of one linear where lanes differ: the layer's, but for rows that have a gate for it."""
        weights = shared.reshape(*x.shape[:-1], -1).clone()
        for lane in self.running.lanes:
            gate = lane.gate(self.index, name) if lane.place == "module" else None
            if gate is not None:
                rows = self.running.rows_of(lane, self.shape[0], x.device)
                given = lane.spread(weigh(self.slots, lane, gate, member, x, rows), self.adapters)
                weights[rows] = by_row(given, len(rows)).to(weights)
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

    def _by_token(
        self, weights: Float[Tensor, "*weights gates"], shape: Sequence[int]
    ) -> Float[Tensor, "*tokens gates"]:
        """Weights of an input of this shape (batch, seq) in one axis of tokens, as some models (OPT) use for states.

        Raises:
            MethodError: if a gate gave weights of another shape.
        """
        given = weights.shape[:-1]
        if weights.dim() == 1 or given == (math.prod(shape),):
            return weights
        if given != tuple(shape):
            requests = (shape[0], self.running.requests)
            if given[0] not in requests or tuple(given[1:]) not in ((), (1,)):
                raise MethodError(
                    f"A gate of decoder layer {self.index} gave weights of shape {tuple(weights.shape)} for inputs of "
                    f"{tuple(shape)} (batch, seq). Give (adapters), (batch, adapters) or (batch, seq, adapters)."
                )
            weights = by_row(weights.reshape(given[0], -1), shape[0]).expand(*shape, -1)
        return weights.reshape(-1, weights.shape[-1])

    def _record(self, name: str, weights: Float[Tensor, "*tokens adapters"]) -> None:
        assert self.recorded is not None
        noted = weights.detach().float()
        self.recorded[name] = noted.reshape(*self.shape, -1) if noted.dim() > 1 else noted.expand(*self.shape, -1)

    def __getstate__(self) -> tuple[Any, ...]:
        # A call that runs meanwhile is not copied.
        return self.index, self.adapters, self.stock, self.rows, self.keeps, self.own, self._first, self._is_last

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.index, self.adapters, self.stock, self.rows, self.keeps, own, self._first, self._is_last = state
        self.alone = self.embeddings = self.recorded = None
        self.set_own(own)
        self.close()

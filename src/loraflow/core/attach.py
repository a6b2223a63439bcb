"""Adapters put into a transformers model, and out of it again: fused linears, fused layers, and the gates' sites."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraflow.adapters import Adapter
from loraflow.bases import BaseOptions, check_sharding, find_tokenizer, load_base
from loraflow.core.architecture import DecoderLayers, find_decoder_layers
from loraflow.core.context import LayerContext
from loraflow.core.fuse import (
    BuiltLayer,
    Fused,
    Group,
    build_layers,
    check_room,
    device_of,
    dtype_of,
    find_sites,
    gate_dtype,
    is_target,
    make_keeper,
    make_stock,
    match_inside,
    prepare,
    site_among,
    unfuse_layers,
)
from loraflow.core.lanes import KEEPER, Gates, Lane, Lanes, RowGate
from loraflow.core.layers import FusedDecoderLayer, LayerFusion
from loraflow.core.quantized import allow_packing, keep_differentiable
from loraflow.core.rows import probe_rows
from loraflow.core.stock import Stock
from loraflow.core.turn import Turn
from loraflow.errors import ArchitectureError, LoraflowError
from loraflow.methods.base import Method, Mixing, Place, Site


@dataclass(frozen=True)
class Built:
    """Adapters with all that they bring to a model, before they come into it."""

    adapters: tuple[Adapter, ...]
    layers: Sequence[BuiltLayer] = field(repr=False)
    stock: Stock | None = field(default=None, repr=False)


@dataclass
class Attachment:
    """Adapters in a model: what other rooms need of a fusion at work.

    Attributes:
        model: the base model.
        adapters: the fused adapters, in order.
        layers: where its decoder layers are.
        sites: every place that a gate can stand, by place, then by site name.
        keeps: whether a linear reads cached positions, so that weights are kept in the cache.
        stock: the adapters whose matrices are made as they are used, if a bank's are among them.
    """

    model: PreTrainedModel
    adapters: tuple[Adapter, ...]
    layers: DecoderLayers
    sites: dict[Place, dict[str, Site]] = field(default_factory=dict)
    keeps: bool = False
    stock: Stock | None = None
    _turn: Turn = field(default_factory=Turn)
    # Held while the model's modules are gone through, or exchanged; taken after the turn, never before it.
    _modules_lock: Turn = field(default_factory=Turn)
    _trained: list[nn.Parameter] = field(default_factory=list)
    _packing: list[nn.Module] = field(default_factory=list)
    _slots: list[tuple[nn.Module, str, Fused]] = field(default_factory=list)
    _detached: bool = False

    @property
    def fusions(self) -> list[LayerFusion]:
        """Each decoder layer's fusion, in order.

        Raises:
            LoraflowError: if the adapters have been taken out.
        """
        self.check_attached()
        return [cast(FusedDecoderLayer, layer).fusion for layer in self.layers.layers]

    @property
    def is_attached(self) -> bool:
        """Whether the adapters are in the model, and have not been taken out."""
        return not self._detached

    @property
    def layer_count(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers.layers)

    @property
    def contexts(self) -> list[LayerContext]:
        """Each decoder layer's context, in order."""
        return [fusion.context for fusion in self.fusions]

    @property
    def groups(self) -> list[Group]:
        """What is fused in all layers, by the input that it reads."""
        return [cast(Group, group) for fusion in self.fusions for group in fusion.groups]

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Held by whoever calls the model, or changes who weighs; other threads wait for theirs."""
        # A compiled forward is traced once, and cannot hold a lock.
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._turn

    def weighing(self, lanes: Lanes) -> contextlib.AbstractContextManager[None]:
        """Let these lanes weigh the rows of all calls inside the block."""
        return self._with_contexts("lanes", [lanes] * len(self.contexts))

    def alone(self, owners: Sequence[int | None]) -> contextlib.AbstractContextManager[None]:
        """Let each row use one adapter alone, by its position, or none, inside the block."""
        return self._with_contexts("alone", [owners] * len(self.contexts))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[dict[str, Float[Tensor, "batch seq adapters"]]]]:
        """Note the weights of each layer's last forward inside the block, by linear ("" for the layer)."""
        recorded: list[dict[str, Tensor]] = [{} for _ in self.contexts]
        with self._with_contexts("recorded", recorded):
            yield recorded

    @contextlib.contextmanager
    def _with_contexts(self, name: str, values: Sequence[Any]) -> Iterator[None]:
        """An attribute of each layer's context set inside the block, and as it was before afterwards."""
        contexts = self.contexts
        before = [getattr(context, name) for context in contexts]
        try:
            for context, value in zip(contexts, values, strict=True):
                setattr(context, name, value)
            yield
        finally:
            for context, value in zip(contexts, before, strict=True):
                setattr(context, name, value)
                # A forward that was given up may have left them.
                context.embeddings = None

    @contextlib.contextmanager
    def dropping(self, probability: float) -> Iterator[None]:
        """Drop inputs of the adapters with this probability, in training mode, inside the block."""
        try:
            for fusion in self.fusions:
                fusion.set_dropout(probability)
            yield
        finally:
            for fusion in self.fusions:
                fusion.set_dropout(0.0)

    def make_gates(self, method: Method, among: Sequence[int] | None = None, names: Sequence[str] = ()) -> Gates:
        """Make a method's gates, each on the device of its layer, in float32 at least.

        Where it is to weigh only some of the adapters, by names of its own perhaps, linears that none targets get none.
        """
        gates = {}
        if method.level == "token":
            check_room(self.stock, among)
        with self.turn():
            # No adapters may come or leave while the layers are gone through; gates may take a while to make.
            homes = [(device_of(layer), dtype_of(layer, self.model)) for layer in self.layers.layers]
        for name, site in self.sites[_gate_place(method)].items():
            site = site_among(site, among, names)
            if site.module is not None and not is_target(site.updates[site.module]):
                continue
            gate = method.gate(site)
            if gate is not None:
                device, own = homes[site.layer]
                gates[name] = gate.to(device, torch.promote_types(torch.float32, own))
                if method.adds:
                    _match_precision(gate, own)
        (whole,) = self.sites["model"].values()
        return {**gates, **make_keeper(method, site_among(whole, among, names), *homes[0])}

    def install(self, method: Method, gates: Gates) -> None:
        """Let a method's gates give the fusion weights from now on, as modules of the model.

        Without any, the base answers alone.
        """
        lanes = self.ready(method, gates)
        with self._modules_lock:
            for index, fusion in enumerate(self.fusions):
                # What is the whole model's belongs to its first layer; the others only call it.
                mine = (f"layers.{index}", KEEPER)[: 2 if index == 0 else 1]
                fusion.install(lanes, {n: gate for n, gate in gates.items() if any(_owns(one, n) for one in mine)})

    def use(self, method: Method, gates: Gates) -> None:
        """Let a method's gates give the fusion weights from now on; the modules of the model stay as they are."""
        lanes = self.ready(method, gates)
        for context in self.contexts:
            context.set_own(lanes)

    def ready(self, method: Method, gates: Gates) -> Lanes:
        """Make and load what a method's gates are known to use, before anything is changed: that may fail."""
        lanes = self._lanes_of(method, gates)
        prepare(self._slots, lanes, len(self.adapters), self.stock)
        return lanes

    @contextlib.contextmanager
    def using(self, method: Method, gates: Gates) -> Iterator[None]:
        """Let a method's gates give the fusion weights inside the block, also where lanes weigh around it."""
        lanes = [self._lanes_of(method, gates)] * self.layer_count
        with self._with_contexts("own", lanes), self._with_contexts("lanes", lanes):
            yield

    def _lanes_of(self, method: Method, gates: Gates) -> Lanes:
        return Lanes(None, (self.lane(None, method, gates),))

    def positions(self, names: Sequence[str]) -> list[int]:
        """The positions of adapters among the fused ones.

        Raises:
            LoraflowError: if one is not among them.
        """
        fused = [adapter.name for adapter in self.adapters]
        missing = [name for name in names if name not in fused]
        if missing:
            raise LoraflowError(f"The adapter {missing[0]!r} is not in the model (any more). It has {fused}.")
        return [fused.index(name) for name in names]

    def lane(
        self, requests: Sequence[int] | None, method: Method, gates: Gates, among: Sequence[int] | None = None
    ) -> Lane:
        """Requests of a batch, weighed by a method; None for all of them, and for gates of all adapters.

        Raises:
            ArchitectureError: if its weights differ from token to token where the base does not let them.
        """
        if gates and method.level == "token":
            self._check_tokens(method)
        if _gate_place(method) != "model":
            gates = {site: gate for site, gate in gates.items() if site != KEEPER}
        if among is not None and list(among) == list(range(len(self.adapters))):
            among = None
        rows = None if requests is None else tuple(requests)
        return Lane(
            rows, _gate_place(method), gates, method.mixing, None if among is None else tuple(among), method.adds
        )

    def _check_tokens(self, method: Method) -> None:
        """Check that weights that differ from token to token find those tokens everywhere.

        Raises:
            ArchitectureError: if they do not.
        """
        if method.place == "module":
            return
        model, remedy = type(self.model).__name__, "Take one whose weights are the same for a whole prompt"
        for fusion in self.fusions:
            context = fusion.context
            if context.rows.streams:
                raise ArchitectureError(
                    f"The decoder layers of {model} hand on several streams, so the method {method.name!r} has no one "
                    f"input of each layer to weigh tokens by. {remedy}, or one with gates of single modules."
                )
            for group in (cast(Group, group) for group in fusion.groups):
                if group.rows in ("prompts", "unknown"):
                    raise ArchitectureError(
                        f"'{group.names[0]}' of decoder layer {context.index} of {model} does not read the layer's "
                        f"tokens one by one, so the method {method.name!r}, which weighs each token, cannot weigh it. "
                        f"{remedy}, or one with gates of single modules; or leave it out of `target_modules`."
                    )

    def given_lane(
        self, requests: Sequence[int], weights: Float[Tensor, "requests layers adapters"], mixing: Mixing = "outputs"
    ) -> Lane:
        """Requests of a batch, each with weights of its own for every layer."""
        gates: Gates = {
            f"layers.{index}": RowGate(weights[:, index].to(device_of(layer), gate_dtype(layer, self.model)))
            for index, layer in enumerate(self.layers.layers)
        }
        return Lane(tuple(requests), "layer", gates, mixing)

    def check_attached(self) -> None:
        """Check that the adapters have not been taken out, and that nothing was put around them.

        Raises:
            LoraflowError: if they have, or something was, such as another adapter of PEFT's.
        """
        if self._detached:
            raise LoraflowError("The adapters were taken out of this model with `unload()`. Fuse them again.")
        if torch.compiler.is_compiling():
            return
        for parent, name, part in self._slots:
            found = parent._modules.get(name)
            if found is not part:
                raise LoraflowError(
                    f"The fused '{part.fused.name}' is inside a {type(found).__name__} now: something was put around "
                    "it after the adapters were fused (PEFT's `get_peft_model`, transformers' `load_adapter`?), and "
                    "speaks past the fusion weights. Name all adapters when the fusion is made, with a base as it was."
                )

    @property
    def reads_aside(self) -> bool:
        """Whether the base's weights can be read while it runs: nothing brings them in for a call, or unpacks them."""
        if getattr(self.model, "is_quantized", False) or self._packing:
            return False
        return not any(hasattr(module, "_hf_hook") for module in self.model.modules())

    def build(self, adapters: Sequence[Adapter]) -> Built:
        """Check other adapters and build all that they bring, beside those in the model; it may run meanwhile.

        Raises:
            AdapterError: if an adapter does not fit the base.
            ArchitectureError: if one updates what cannot be fused.
        """
        with self._modules_lock:
            return _build(self.model, self.layers, match_inside(self.model, self.layers, adapters))

    def again(self, built: Built) -> Attachment:
        """Put adapters into the model once more after `detach`; callers that wait for their turn then see these."""
        attached = Attachment(
            self.model, built.adapters, self.layers, _turn=self._turn, _modules_lock=self._modules_lock
        )
        with self._modules_lock:
            attached._put_in(lambda: built)
        return attached

    def _put_in(self, make: Callable[[], Built]) -> None:
        """Put what was built into a base that is as it was; where that fails, it is so again."""
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)
        self._packing = keep_differentiable(self.model)
        try:
            built = make()
            for layer in built.layers:
                layer.fuse()
        except BaseException:
            self.detach()
            raise
        self.stock = built.stock
        self.sites = find_sites(self.layers, self.adapters)
        self.keeps = any(context.keeps for context in self.contexts)
        self._slots = [
            (parent, name, child)
            for layer in self.layers.layers
            for parent in layer.modules()
            for name, child in parent.named_children()
            if isinstance(child, Fused)
        ]

    def detach(self) -> None:
        """Give the base model back as it was before, bit for bit; also one that was attached to only in part."""
        self.check_attached()
        self._detached, self._slots = True, []
        with self._modules_lock:
            unfuse_layers(self.layers)
        allow_packing(self._packing)
        for parameter in self._trained:
            parameter.requires_grad_(True)


def _gate_place(method: Method) -> Place:
    # A method that weighs whole queries keeps what it has in one place, wherever its weights differ.
    return "model" if method.level == "query" else method.place


def _match_precision(gate: nn.Module, dtype: torch.dtype) -> None:
    """Bring the matrices of a gate's own update into the precision of the base's activations."""
    for name, buffer in list(gate.named_buffers()):
        if buffer.dim() > 1:
            setattr(gate, name, buffer.to(dtype))


def _owns(prefix: str, site_name: str) -> bool:
    return site_name == prefix or site_name.startswith(f"{prefix}.")


def check_plain(model: nn.Module) -> None:
    """Check that a model is a base alone: nothing is fused into it, and PEFT has put no adapters into it.

    Raises:
        LoraflowError: if it is not.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, Fused):
            raise LoraflowError("The base model is fused already. Take that fusion out first, with its `unload()`.")
        if isinstance(module, BaseTunerLayer):
            raise LoraflowError(
                f"The base model has PEFT adapters in it already (at '{name}'), which would speak beside the fusion. "
                "Give the base as it was (PEFT's `unload()`, or a freshly loaded one) and name the adapters in "
                "`adapters`; or merge them first (`merge_and_unload()`)."
            )


def open_base(
    base: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: BaseOptions | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A base model of a kind that can be fused, as it is before anything is attached, and its tokenizer, if it has one.

    Raises:
        LoraflowError: if options are given for a loaded model, or it has adapters in it.
    """
    if isinstance(base, nn.Module):
        if options is not None:
            raise LoraflowError("`options` say how a base is loaded, but `base` is a loaded model. Leave them out.")
        check_plain(base)
        find_decoder_layers(base)
        return base, tokenizer
    options = options or BaseOptions()
    model = load_base(base, options)
    find_decoder_layers(model)
    return model, tokenizer or find_tokenizer(base, options)


def attach(model: PreTrainedModel, layers: DecoderLayers, adapters: Sequence[Adapter]) -> Attachment:
    """Put all adapters into a model, in one fused pass for each of its target modules; it answers as the base for now.

    The model is changed in place, and all of its parameters are frozen. `install` makes gates active, and `detach`
    undoes everything.

    Raises:
        AdapterError: if an adapter does not fit the base.
        ArchitectureError: if the base cannot be tried, or an adapter updates what cannot be fused.
    """
    check_plain(model)
    check_sharding(model)
    attachment = Attachment(model, matched := match_inside(model, layers, adapters), layers)
    attachment._put_in(lambda: _build(model, layers, matched))
    return attachment


def _build(model: PreTrainedModel, layers: DecoderLayers, matched: tuple[Adapter, ...]) -> Built:
    stock = make_stock(matched)
    return Built(matched, build_layers(model, layers, matched, probe_rows(model, layers), stock), stock)

"""Fused linears and gates inside a transformers model, and out of it again.

A decoder layer and its linears keep their places, names and parameters. The layer's class is swapped for a subclass
whose `forward` first computes the layer's fusion weights, those of its target linears for subclasses that add the
adapters' updates (`FusedLinear`), and a `LayerFusion` submodule holds what both share. The gate is computed inside the
layer's own `forward`, so that gradient checkpointing recomputes it with the rest of the layer in every version of
transformers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraflow.adapters import Adapter, match_adapter
from loraflow.architecture import DecoderLayers, check_inside_layers, group_by_input
from loraflow.errors import ArchitectureError, LoraflowError, MethodError
from loraflow.linear import (
    FusedLinear,
    FusedState,
    LayerForward,
    SharedInput,
    fuse_linear,
    stack_adapters,
    unfuse_linear,
)
from loraflow.methods.base import Method, Place, Site
from loraflow.quantized import allow_packing, keep_differentiable
from loraflow.swap import restore_class, swap_class

Gates = dict[str, nn.Module]
"""The gates of one method by site: `model`, `layers.3`, or `layers.3.self_attn.q_proj`."""


@dataclass
class Stream:
    """What the layers of one model share during a forward.

    Attributes:
        layers: number of layers.
        embeddings: the input of the first one, where a gate of the whole model reads it.
    """

    layers: int
    embeddings: Tensor | None = None


class LayerFusion(nn.Module):
    """One decoder layer's gates, its fusion weights during a forward, and its groups of fused linears.

    Attributes:
        index: the layer's place in the model.
        stream: what the model's layers share.
        shared_inputs: the groups of fused linears.
        gates: the gates that this layer owns.
        place: where the method's gates stand.
        gate: the one that gives this layer's weights, unless each linear has its own.
        now: what the running forward keeps.
        recorded: where the weights of a forward are noted, by linear ("" for the layer), while a trace is taken.
    """

    index: int
    stream: Stream
    shared_inputs: nn.ModuleList
    gates: nn.ModuleDict
    place: Place
    gate: nn.Module | None
    now: LayerForward
    recorded: dict[str, Tensor] | None

    def __init__(self, index: int, stream: Stream) -> None:
        super().__init__()
        self.index = index
        self.shared_inputs = nn.ModuleList()
        self.gates = nn.ModuleDict()
        self.place = "layer"
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

    def install(self, place: Place, gates: Mapping[str, nn.Module]) -> None:
        """Take over gates: one under the key "" for the layer, or one for each of its linears by name."""
        self.place = place
        # The gate of a whole model belongs to its first layer; the others only call it.
        owned = {} if place == "model" and self.index > 0 else gates
        self.gates = nn.ModuleDict({_key(name): gate for name, gate in owned.items()})
        self.__dict__["gate"] = gates.get("")

    def open(self, hidden_states: Float[Tensor, "*batch hidden"], embeddings: Tensor | None) -> None:
        """Compute the layer's fusion weights for this forward."""
        self.now.shape = hidden_states.shape[:-1]
        if self.gate is None:
            return
        if embeddings is None:
            weights = self.gate(hidden_states)
        else:
            # The one gate of a whole model may live on another device than this layer.
            device = next(itertools.chain(self.gate.parameters(), self.gate.buffers())).device
            weights = self.gate(embeddings.to(device)).to(hidden_states.device)
        if self.recorded is not None:
            self._record("", weights)
        self.now.weights = self._by_token(weights)

    def weights_for(
        self, shared: SharedInput, x: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*tokens gates"] | None:
        """The fusion weights for a group of the layer's linears and its input; None for the base alone.

        Raises:
            ArchitectureError: if a linear reads only some of the layer's tokens.
        """
        weights = self.now.weights if self.place != "module" else self._weights_of_each(self._names[shared], x)
        if x.dim() == 2 and weights is not None and weights.dim() == 2 and weights.shape[0] != x.shape[0]:
            raise ArchitectureError(
                f"A linear of decoder layer {self.index} got {x.shape[0]} tokens of the layer's {weights.shape[0]}: "
                "modules that see only some tokens (routed experts) cannot be fused. Leave them out of "
                "`target_modules`."
            )
        return weights

    def _weights_of_each(self, names: Sequence[str], x: Float[Tensor, "*batch features"]) -> Tensor | None:
        """The weights of linears with gates of their own, side by side."""
        if not self.gates:
            return None
        weights = [self.gates[_key(name)](x) for name in names]
        if self.recorded is not None:
            for name, found in zip(names, weights, strict=True):
                self._record(name, found)
        return self._by_token(torch.cat(weights, dim=-1) if len(weights) > 1 else weights[0])

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


def _key(name: str) -> str:
    # nn.ModuleDict takes neither dots nor the empty string.
    return name.replace(".", "/") or "layer"


class FusedDecoderLayer(nn.Module):
    """Mixed into a decoder layer's class: computes the fusion weights before anything else in the layer."""

    fusion: LayerFusion

    def __call__(self, *args, **kwargs):
        """Run the layer, inside gradient checkpointing where that is on."""
        fusion = self.fusion
        if fusion.place != "model" and not self.training:
            return super().__call__(*args, **kwargs)
        hidden_states, args, kwargs = _take_stream(args, kwargs)
        if self._checkpoints_without_gradient(hidden_states):
            # Reentrant checkpointing gives no gradient to a segment none of whose inputs requires one.
            hidden_states = hidden_states.detach().requires_grad_()
        if fusion.place == "model" and fusion.gate is not None:
            stream = fusion.stream
            if fusion.index == 0:
                stream.embeddings = hidden_states.detach()
            # Handed over as an argument, so that a recomputation sees the embeddings of its own forward.
            kwargs["fusion_embeddings"] = stream.embeddings
            if fusion.index == stream.layers - 1:
                stream.embeddings = None
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, *args, fusion_embeddings: Tensor | None = None, **kwargs):
        """The decoder layer's own forward, with its fusion weights in place."""
        fusion = self.fusion
        fusion.open(args[0] if args else kwargs["hidden_states"], fusion_embeddings)
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


@dataclass
class Attachment:
    """Fused linears in a model, and what is needed to take them out again.

    Attributes:
        model: the base model.
        adapters: the fused adapters, in order.
        layers: where its decoder layers are.
        sites: every place that a gate can stand, by place, then by site name.
    """

    model: PreTrainedModel
    adapters: tuple[Adapter, ...]
    layers: DecoderLayers
    sites: dict[Place, dict[str, Site]] = field(default_factory=dict)
    _trained: list[nn.Parameter] = field(default_factory=list)
    _packing: list[nn.Module] = field(default_factory=list)
    _detached: bool = False

    @property
    def fusions(self) -> list[LayerFusion]:
        """Each decoder layer's fusion, in order."""
        return [cast(FusedDecoderLayer, layer).fusion for layer in self.layers.layers]

    def make_gates(self, method: Method) -> Gates:
        """Make a method's gates, each on the device of its layer, in float32 at least."""
        gates = {}
        for name, site in self.sites[method.place].items():
            gate = method.gate(site)
            if gate is not None:
                layer = self.layers.layers[site.layer]
                gates[name] = gate.to(
                    _device_of(layer), torch.promote_types(torch.float32, _dtype_of(layer, self.model))
                )
        return gates

    def install(self, place: Place, gates: Gates) -> None:
        """Let these gates give the fusion weights from now on; without any, the base answers alone."""
        for fusion in self.fusions:
            prefix = "model" if place == "model" else f"layers.{fusion.index}"
            mine = {name.removeprefix(prefix).lstrip("."): gate for name, gate in gates.items() if _owns(prefix, name)}
            fusion.install(place, mine)

    def check_attached(self) -> None:
        """Check that the adapters have not been taken out.

        Raises:
            LoraflowError: if they have.
        """
        if self._detached:
            raise LoraflowError("The adapters were taken out of this model with `unload()`. Fuse them again.")

    def detach(self) -> None:
        """Give the base model back as it was before, bit for bit; also one that was attached to only in part."""
        self.check_attached()
        self._detached = True
        for layer in self.layers.layers:
            for linear in fused_linears(layer):
                unfuse_linear(linear)
            if isinstance(layer, FusedDecoderLayer):
                restore_class(layer)
                del layer.fusion
        allow_packing(self._packing)
        for parameter in self._trained:
            parameter.requires_grad_(True)


def _owns(prefix: str, site_name: str) -> bool:
    return site_name == prefix or site_name.startswith(f"{prefix}.")


def check_unfused(model: nn.Module) -> None:
    """Check that no adapters are fused into a model yet.

    Raises:
        LoraflowError: if there are.
    """
    if any(isinstance(module, FusedLinear) for module in model.modules()):
        raise LoraflowError("The base model is fused already. Take that fusion out first, with its `unload()`.")


def attach(model: PreTrainedModel, layers: DecoderLayers, adapters: Sequence[Adapter]) -> Attachment:
    """Put all adapters into a model, in one fused pass for each of its target modules; it answers as the base for now.

    Args:
        model: the base model, changed in place; all of its parameters are frozen.
        layers: where its decoder layers are.
        adapters: the adapters, in the order of their fusion weights.

    Returns:
        The attachment, whose `install` makes gates active and whose `detach` undoes everything.

    Raises:
        AdapterError: if an adapter does not fit the base.
    """
    for adapter in adapters:
        match_adapter(adapter, model)
        check_inside_layers(adapter, layers)
    attachment = Attachment(model, tuple(adapters), layers)
    attachment._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    attachment._packing = keep_differentiable(model)
    try:
        _fuse_layers(model, layers, adapters)
    except BaseException:
        attachment.detach()
        raise
    attachment.sites = _sites(attachment)
    return attachment


def _fuse_layers(model: PreTrainedModel, layers: DecoderLayers, adapters: Sequence[Adapter]) -> None:
    stream = Stream(len(layers.layers))
    for index, layer in enumerate(layers.layers):
        fusion = LayerFusion(index, stream)
        for names in group_by_input(_target_names(layer, layers, index, adapters)):
            _fuse_group(model, layers, index, fusion, names, adapters)
        layer.fusion = fusion.train(layer.training)
        swap_class(layer, FusedDecoderLayer)


def _target_names(layer: nn.Module, layers: DecoderLayers, index: int, adapters: Sequence[Adapter]) -> list[str]:
    targeted = {layers.split(name) for adapter in adapters for name in adapter.modules}
    # In the layer's own order, not that of a set.
    return [name for name, _ in layer.named_modules() if (index, name) in targeted]


def _fuse_group(
    model: PreTrainedModel,
    layers: DecoderLayers,
    index: int,
    fusion: LayerFusion,
    names: Sequence[str],
    adapters: Sequence[Adapter],
) -> None:
    layer = layers.layers[index]
    base_layers = [layer.get_submodule(name) for name in names]
    stacks = []
    for name, base_layer in zip(names, base_layers, strict=True):
        updates = [adapter.modules.get(f"{layers.prefix}.{index}.{name}") for adapter in adapters]
        stacks.append(stack_adapters(updates, base_layer, _dtype_of(base_layer, model)))
    shared = SharedInput(stacks, _device_of(base_layers[0]))
    fusion.add_group(shared, names)
    for member, (name, base_layer, stack) in enumerate(zip(names, base_layers, stacks, strict=True)):
        uses_dora = stack.output_scale is not None
        fuse_linear(base_layer, stack, FusedState(name, shared, member, fusion.now, fusion.weights_for, uses_dora))


def _sites(attachment: Attachment) -> dict[Place, dict[str, Site]]:
    adapters = tuple(adapter.name for adapter in attachment.adapters)
    hidden, count = attachment.layers.hidden_size, len(attachment.layers.layers)
    modules = {
        f"layers.{index}.{linear.fused.name}": Site(
            adapters, linear.fused.shared.lora_A.shape[1], count, index, linear.fused.name
        )
        for index, layer in enumerate(attachment.layers.layers)
        for linear in fused_linears(layer)
    }
    return {
        "model": {"model": Site(adapters, hidden, count)},
        "layer": {f"layers.{index}": Site(adapters, hidden, count, index) for index in range(count)},
        "module": modules,
    }


def fused_linears(layer: nn.Module) -> list[FusedLinear]:
    """The fused linears of a decoder layer, in its order."""
    return [module for module in layer.modules() if isinstance(module, FusedLinear)]


def _device_of(module: nn.Module) -> torch.device:
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def _dtype_of(module: nn.Module, model: PreTrainedModel) -> torch.dtype:
    dtypes = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    # A quantised weight is no float; its activations have the model's precision.
    return dtypes[0] if dtypes else model.dtype

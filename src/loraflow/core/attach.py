"""Adapters put into a transformers model, and out of it again: fused linears, fused layers, and the gates' sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraflow.adapters import Adapter, LoraModule, match_adapter
from loraflow.core.architecture import DecoderLayers, check_inside_layers, group_by_input
from loraflow.core.layers import FusedDecoderLayer, Gates, Lane, LayerFusion, RowGate, Stream
from loraflow.core.linear import FusedLinear, FusedState, SharedInput, fuse_linear, stack_adapters, unfuse_linear
from loraflow.core.quantized import allow_packing, keep_differentiable
from loraflow.core.swap import restore_class, swap_class
from loraflow.errors import LoraflowError
from loraflow.methods.base import Method, Place, Site

Updates = dict[str, tuple[LoraModule | None, ...]]


@dataclass
class Attachment:
    """Fused linears in a model, and what is needed to take them out again.

    Attributes:
        model: the base model.
        adapters: the fused adapters, in order.
        layers: where its decoder layers are.
        stream: what the layers share during a forward.
        sites: every place that a gate can stand, by place, then by site name.
    """

    model: PreTrainedModel
    adapters: tuple[Adapter, ...]
    layers: DecoderLayers
    stream: Stream
    sites: dict[Place, dict[str, Site]] = field(default_factory=dict)
    _trained: list[nn.Parameter] = field(default_factory=list)
    _packing: list[nn.Module] = field(default_factory=list)
    _detached: bool = False

    @property
    def fusions(self) -> list[LayerFusion]:
        """Each decoder layer's fusion, in order."""
        return [cast(FusedDecoderLayer, layer).fusion for layer in self.layers.layers]

    def make_gates(self, method: Method, among: Sequence[int] | None = None) -> Gates:
        """Make a method's gates, each on the device of its layer, in float32 at least.

        Args:
            method: the method.
            among: positions of the adapters that it is to weigh; all by default. Linears that none of them targets get
                no gates of their own.
        """
        gates = {}
        for name, site in self.sites[_gate_place(method)].items():
            site = site if among is None else _site_of(site, among)
            if site.module is not None and not any(site.updates[site.module]):
                continue
            gate = method.gate(site)
            if gate is not None:
                layer = self.layers.layers[site.layer]
                gates[name] = gate.to(_device_of(layer), _gate_dtype(layer, self.model))
        return gates

    def install(self, method: Method, gates: Gates) -> None:
        """Let a method's gates give the fusion weights from now on; without any, the base answers alone."""
        place = _gate_place(method)
        for fusion in self.fusions:
            prefix = "model" if place == "model" else f"layers.{fusion.index}"
            mine = {name.removeprefix(prefix).lstrip("."): gate for name, gate in gates.items() if _owns(prefix, name)}
            fusion.install(place, mine, method.mixing)

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

    def lane(self, requests: Sequence[int], method: Method, gates: Gates, among: Sequence[int] | None = None) -> Lane:
        """Requests of a batch, weighed by a method whose gates are for the adapters at these positions (or all)."""
        if among is not None and list(among) == list(range(len(self.adapters))):
            among = None
        return Lane(tuple(requests), _gate_place(method), gates, method.mixing, None if among is None else tuple(among))

    def given_lane(self, requests: Sequence[int], weights: Float[Tensor, "requests layers adapters"]) -> Lane:
        """Requests of a batch, each with weights of its own for every layer."""
        gates: Gates = {
            f"layers.{index}": RowGate(weights[:, index].to(_device_of(layer), _gate_dtype(layer, self.model)))
            for index, layer in enumerate(self.layers.layers)
        }
        return Lane(tuple(requests), "layer", gates)

    def check_attached(self) -> None:
        """Check that the adapters have not been taken out.

        Raises:
            LoraflowError: if they have.
        """
        if self._detached:
            raise LoraflowError("The adapters were taken out of this model with `unload()`. Fuse them again.")

    def again(self, adapters: Sequence[Adapter]) -> Attachment:
        """Put adapters into the model once more after `detach`; callers that wait for their turn then see these.

        Args:
            adapters: the adapters, in the order of their fusion weights.

        Returns:
            Their attachment.
        """
        attached = attach(self.model, self.layers, adapters)
        attached.stream.turn = self.stream.turn
        return attached

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


def _site_of(site: Site, among: Sequence[int]) -> Site:
    """The same site for some of the adapters."""
    return dataclasses.replace(
        site,
        adapters=tuple(site.adapters[i] for i in among),
        updates={name: tuple(updates[i] for i in among) for name, updates in site.updates.items()},
    )


def _gate_place(method: Method) -> Place:
    # A method that weighs whole queries keeps what it has in one place, wherever its weights differ.
    return "model" if method.level == "query" else method.place


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
    stream = Stream(len(layers.layers), len(adapters))
    attachment = Attachment(model, tuple(adapters), layers, stream)
    attachment._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    attachment._packing = keep_differentiable(model)
    try:
        _fuse_layers(model, layers, adapters, stream)
    except BaseException:
        attachment.detach()
        raise
    attachment.sites = _sites(attachment)
    return attachment


def _fuse_layers(model: PreTrainedModel, layers: DecoderLayers, adapters: Sequence[Adapter], stream: Stream) -> None:
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
    everywhere: Updates = {}
    sites: dict[Place, dict[str, Site]] = {"layer": {}, "module": {}}
    for index, layer in enumerate(attachment.layers.layers):
        of_layer: Updates = {}
        for linear in fused_linears(layer):
            name, full = linear.fused.name, f"layers.{index}.{linear.fused.name}"
            key = f"{attachment.layers.prefix}.{index}.{name}"
            updates = tuple(adapter.modules.get(key) for adapter in attachment.adapters)
            of_layer[name] = everywhere[full] = updates
            features = linear.fused.shared.lora_A.shape[1]
            sites["module"][full] = Site(adapters, features, count, index, name, {name: updates})
        sites["layer"][f"layers.{index}"] = Site(adapters, hidden, count, index, updates=of_layer)
    sites["model"] = {"model": Site(adapters, hidden, count, updates=everywhere)}
    return sites


def fused_linears(layer: nn.Module) -> list[FusedLinear]:
    """The fused linears of a decoder layer, in its order."""
    return [module for module in layer.modules() if isinstance(module, FusedLinear)]


def _device_of(module: nn.Module) -> torch.device:
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def _gate_dtype(layer: nn.Module, model: PreTrainedModel) -> torch.dtype:
    # Weights are computed in float32 at least.
    return torch.promote_types(torch.float32, _dtype_of(layer, model))


def _dtype_of(module: nn.Module, model: PreTrainedModel) -> torch.dtype:
    dtypes = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    # A quantised weight is no float; its activations have the model's precision.
    return dtypes[0] if dtypes else model.dtype

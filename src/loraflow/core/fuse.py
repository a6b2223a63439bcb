"""The parts of a model's decoder layers that adapters update: fused one by one, and made the base's own again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from loraflow.adapters import Adapter, LoraModule, StoredAdapter, StoredUpdates, match_adapters, outlined
from loraflow.core.active import use_of
from loraflow.core.architecture import DecoderLayers, check_inside_layers, group_by_input
from loraflow.core.context import LayerContext
from loraflow.core.experts import ExpertMember, ExpertStack, FusedExperts, FusedWeight, fuse_experts
from loraflow.core.fillers import ExpertFiller, GroupFiller, outline_stack
from loraflow.core.group import InputGroup
from loraflow.core.lanes import KEEPER, Gates, Lanes
from loraflow.core.layers import FusedDecoderLayer, LayerFusion
from loraflow.core.linear import FusedLinear, Member, fuse_linear, unfuse_linear
from loraflow.core.rows import LayerRows, Rows
from loraflow.core.stack import StackedLora, stack_adapters
from loraflow.core.stock import Shelf, Stock
from loraflow.core.swap import restore_class, swap_class
from loraflow.errors import ArchitectureError
from loraflow.methods.base import Method, Place, Site

Updates = tuple[LoraModule | None, ...]

Fused = FusedLinear | FusedExperts
Group = InputGroup | ExpertStack


def build_layers(
    model: PreTrainedModel,
    layers: DecoderLayers,
    adapters: Sequence[Adapter],
    rows: Sequence[LayerRows],
    stock: Stock | None = None,
) -> list[BuiltLayer]:
    """Build all that adapters bring to the layers; the model is read, and stays as it is, with what is in it.

    With a stock, their matrices come when they are used.
    """
    first: LayerContext | None = None
    built = []
    for index, updates in enumerate(_updates_by_layer(layers, adapters)):
        context = LayerContext(index, len(layers.layers), len(adapters), first, rows[index])
        context.stock = stock
        first = first or context
        layer = BuiltLayer(model, layers, updates, LayerFusion(context))
        layer.build()
        context.keeps = any(group.rows == "cached" for group in layer.fusion.groups)
        built.append(layer)
    return built


class BuiltLayer:
    """What adapters bring to one decoder layer, and how it comes into that."""

    def __init__(
        self, model: PreTrainedModel, layers: DecoderLayers, updates: Mapping[str, Updates], fusion: LayerFusion
    ) -> None:
        self.model = model
        self.prefix = layers.prefix
        self.fusion = fusion
        self.context = fusion.context
        self.groups = fusion.groups
        self.layer = layers.layers[self.context.index]
        self.rows = self.context.rows
        self.updates = updates
        self._steps: list[Callable[[], None]] = []

    def fuse(self) -> None:
        """Fuse the layer, which must be the base's own: what takes long is done."""
        for step in self._steps:
            step()
        self.layer.fusion = self.fusion.train(self.layer.training)
        swap_class(self.layer, FusedDecoderLayer)

    def build(self) -> None:
        """Build everything, on the devices where it will be used."""
        # In the layer's own order, not that of a set.
        names = [name for name, _ in self.layer.named_modules() if name in self.updates]
        for of_one_input in group_by_input(names):
            for rows, alike in itertools.groupby(of_one_input, self.rows.of):
                self._build_linears(list(alike), rows)
        for name, module in list(self.layer.named_modules()):
            bare = [
                parameter
                for parameter, _ in module.named_parameters(recurse=False)
                if f"{name}.{parameter}" in self.updates
            ]
            if bare:
                self._build_parameters(name, module, bare)

    def _build_linears(self, names: Sequence[str], rows: Rows) -> None:
        base_layers = [self.layer.get_submodule(name) for name in names]
        stacks, group = self._group(names, base_layers, rows)
        for position, (base_layer, stack) in enumerate(zip(base_layers, stacks, strict=True)):
            self._fuse_later(base_layer, stack, Member(group, position, self.context))

    def _group(
        self, names: Sequence[str], base_layers: Sequence[nn.Module], rows: Rows
    ) -> tuple[list[StackedLora], InputGroup]:
        stock, updates = self.context.stock, [self.updates[name] for name in names]
        pairs = list(zip(updates, base_layers, strict=True))
        dtypes = [dtype_of(base_layer, self.model) for base_layer in base_layers]
        device = device_of(base_layers[0])
        if stock is None:
            stacks = [stack_adapters(*pair, dtype) for pair, dtype in zip(pairs, dtypes, strict=True)]
            group = InputGroup(names, stacks, device, rows)
        else:
            stacks = [outline_stack(*pair, dtype) for pair, dtype in zip(pairs, dtypes, strict=True)]
            group = InputGroup(names, stacks, device, rows, Shelf(stock))
            stock.fill(GroupFiller(group, self._full(names), base_layers, updates))
        self.groups.append(group)
        return stacks, group

    def _full(self, names: Sequence[str]) -> list[str]:
        return [f"{self.prefix}.{self.context.index}.{name}" for name in names]

    def _experts(self, name: str, rows: Rows, dtype: torch.dtype, device: torch.device) -> ExpertStack:
        stock, updates = self.context.stock, self.updates[name]
        stack = ExpertStack(name, rows, updates, dtype, device, None if stock is None else Shelf(stock))
        if stock is not None:
            (full,) = self._full([name])
            stock.fill(ExpertFiller(stack, full, updates))
        return stack

    def _fuse_later(
        self, linear: nn.Module, stack: StackedLora, member: Member, mixin: type[FusedLinear] = FusedLinear
    ) -> None:
        here = stack.to(member.group.lora_A.device)
        self._steps.append(functools.partial(fuse_linear, linear, here, member, mixin))

    def _build_parameters(self, name: str, module: nn.Module, parameters: Sequence[str]) -> None:
        """Build for bare parameters of a module: the matrices of a mixture's experts, or the weight of its router.

        Raises:
            ArchitectureError: if they are something else.
        """
        rows, dtype, device = self.rows.of(name), dtype_of(module, self.model), device_of(module)
        if all(getattr(module, parameter).dim() == 3 for parameter in parameters):
            stacks = {p: self._experts(f"{name}.{p}", rows, dtype, device) for p in parameters}
            self.groups.extend(stacks.values())
            self._steps.append(functools.partial(fuse_experts, module, ExpertMember(name, stacks, self.context)))
        elif list(parameters) == ["weight"]:
            full = f"{name}.weight"
            (stack,), group = self._group([full], [module], rows)
            self._fuse_later(module, stack, Member(group, 0, self.context), FusedWeight)
        else:
            raise ArchitectureError(
                f"{list(parameters)} of '{name}' in decoder layer {self.context.index} of {type(self.model).__name__} "
                "are neither the matrices of experts nor the weight of a linear map. Leave them out of "
                "`target_parameters`."
            )


def match_inside(model: PreTrainedModel, layers: DecoderLayers, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
    """Adapters by the names of a base, all of whose updates are inside its decoder layers.

    Raises:
        AdapterError: if one does not fit the base, or updates something else.
    """
    matched = match_adapters(adapters, model)
    for adapter in matched:
        check_inside_layers(adapter, layers)
    return matched


def make_stock(adapters: Sequence[Adapter]) -> Stock | None:
    """What loads adapters as they are used, where those of a bank are among them."""
    limits = [adapter.bank.device_bytes for adapter in adapters if isinstance(adapter, StoredAdapter)]
    return Stock(adapters, min(limits)) if limits else None


def _updates_by_layer(layers: DecoderLayers, adapters: Sequence[Adapter]) -> list[dict[str, Updates]]:
    """What the adapters do to each layer, by the name of the module or parameter within it; outlined where unread."""
    adapters = [outlined(adapter) for adapter in adapters]
    return [
        {name: tuple(adapter.modules.get(full) for adapter in adapters) for name, full in of_layer.items()}
        for of_layer in _names_by_layer(layers, adapters)
    ]


def _names_by_layer(layers: DecoderLayers, adapters: Sequence[Adapter]) -> list[dict[str, str]]:
    """What adapters update in each layer: full names by those within it."""
    names: list[dict[str, str]] = [{} for _ in layers.layers]
    for full in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        place = layers.split(full)
        if place is not None:
            names[place[0]][place[1]] = full
    return names


def unfuse_layers(layers: DecoderLayers) -> None:
    """Make all parts the base's own again, also where only some were fused."""
    for layer in layers.layers:
        for part in fused_parts(layer):
            if isinstance(part, FusedLinear):
                unfuse_linear(part)
            else:
                restore_class(part)
                del part.fused
        if isinstance(layer, FusedDecoderLayer):
            restore_class(layer)
            del layer.fusion


def fused_parts(layer: nn.Module) -> list[Fused]:
    """The fused parts of a decoder layer, in its order."""
    return [module for module in layer.modules() if isinstance(module, Fused)]


def prepare(
    parts: Sequence[tuple[nn.Module, str, Fused]], lanes: Lanes, adapters: int, stock: Stock | None = None
) -> None:
    """Make what lanes are known to use, so that a graph that is compiled next finds it; of a stock, only a few."""
    use = use_of(lanes, adapters, first=True)
    if stock is not None:
        if use.active is None or not use.lasts:
            return
        stock.bring(use.active)
    for _, _, part in parts if use.active != () and use.lasts else ():
        if isinstance(part, FusedLinear):
            part.prepare(use, each=lanes.reads_modules)


def find_sites(layers: DecoderLayers, adapters: Sequence[Adapter]) -> dict[Place, dict[str, Site]]:
    """Every place that a gate can stand, by place, then by site name."""
    names, count = tuple(adapter.name for adapter in adapters), len(layers.layers)
    everywhere: dict[str, Sequence[LoraModule | None]] = {}
    sites: dict[Place, dict[str, Site]] = {"layer": {}, "module": {}}
    by_layer = _names_by_layer(layers, adapters)
    for index, (layer, full_names) in enumerate(zip(layers.layers, by_layer, strict=True)):
        of_layer: dict[str, Sequence[LoraModule | None]] = {}
        updates = {name: _updates_of(adapters, full) for name, full in full_names.items()}
        for name, features in (place for part in fused_parts(layer) for place in _inputs_of(part)):
            full = f"layers.{index}.{name}"
            of_layer[name] = everywhere[full] = updates[name]
            sites["module"][full] = Site(names, features, count, index, name, {name: updates[name]})
        sites["layer"][f"layers.{index}"] = Site(names, layers.hidden_size, count, index, updates=of_layer)
    sites["model"] = {"model": Site(names, layers.hidden_size, count, updates=everywhere)}
    return sites


def _updates_of(adapters: Sequence[Adapter], full: str) -> Sequence[LoraModule | None]:
    if any(isinstance(adapter, StoredAdapter) for adapter in adapters):
        return StoredUpdates(adapters, full)
    return tuple(adapter.modules.get(full) for adapter in adapters)


def check_room(stock: Stock | None, among: Sequence[int] | None) -> None:
    """Check that adapters, or all, may be in a pass at once, where they are loaded for it.

    Raises:
        MethodError: if they may not.
    """
    if stock is not None:
        stock.check(stock.everything if among is None else tuple(among))


def site_among(site: Site, among: Sequence[int] | None, names: Sequence[str] = ()) -> Site:
    """The same site for some of the adapters, by other names perhaps, or for all."""
    if among is None:
        return site
    return dataclasses.replace(
        site,
        adapters=tuple(names) or tuple(site.adapters[position] for position in among),
        updates={
            name: updates.among(among) if isinstance(updates, StoredUpdates) else tuple(updates[i] for i in among)
            for name, updates in site.updates.items()
        },
    )


def is_target(updates: Sequence[LoraModule | None]) -> bool:
    """Whether one of the adapters has an update there."""
    return updates.any() if isinstance(updates, StoredUpdates) else any(updates)


def _inputs_of(part: Fused) -> Iterator[tuple[str, int]]:
    """What of a part adapters update, and the width of what that reads."""
    if isinstance(part, FusedLinear):
        yield part.fused.name, part.fused.group.lora_A.shape[1]
    else:
        for stack in part.fused.stacks.values():
            yield stack.names[0], stack.lora_A.shape[1]


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def make_keeper(method: Method, site: Site, device: torch.device, own: torch.dtype) -> Gates:
    """What a method that weighs tokens keeps for the whole model, to read prompts by; none for other methods."""
    keeper = None if method.level == "query" else method.keeper(site)
    return {} if keeper is None else {KEEPER: keeper.to(device, torch.promote_types(torch.float32, own))}


def gate_dtype(layer: nn.Module, model: PreTrainedModel) -> torch.dtype:
    """The precision of a layer's gates: float32 at least."""
    return torch.promote_types(torch.float32, dtype_of(layer, model))


def dtype_of(module: nn.Module, model: PreTrainedModel) -> torch.dtype:
    """The precision of a module's activations."""
    dtypes = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    # A quantised weight is no float; its activations have the model's precision.
    return dtypes[0] if dtypes else model.dtype

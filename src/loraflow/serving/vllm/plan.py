"""A saved fusion as the plug-in needs it: checked as ever, the gates ready, and no weights of the base."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from loraflow.adapters import LoraModule
from loraflow.bases import BaseOptions, base_record, check_base, check_base_files, load_empty_base
from loraflow.core.lanes import Gates
from loraflow.errors import AdapterError, FusionError
from loraflow.export.fusion import folded_update
from loraflow.methods import Method
from loraflow.methods.base import Site
from loraflow.methods.slots import WeighsSlots
from loraflow.methods.static import ConstantGate
from loraflow.model import FusedModel
from loraflow.saved.fusion import SavedFusion
from loraflow.saved.records import FusionConfig

Updates = Mapping[str, Sequence[LoraModule | None]]
"""Each adapter's update of a layer's linears, by their name within the layer; None where one does not target it."""


@dataclass(frozen=True)
class FusionPlan:
    """What is to be put into a model.

    Attributes:
        layers: the updates of each decoder layer.
        gates: the method's gates by site, with what they learned; none where whole prompts are weighed.
        digest: SHA-256 of all that decides what the fusion computes.
    """

    config: FusionConfig
    method: Method
    adapters: tuple[str, ...]
    layers: tuple[Updates, ...]
    gates: Gates = field(repr=False)
    digest: str


def read_plan(
    fusion: str | Path,
    base: str,
    options: BaseOptions | None = None,
    adapters: Mapping[str, str] | None = None,
) -> FusionPlan:
    """Read a fusion, each file compared with its recorded digest, for a base whose configuration alone is read."""
    saved, loaded = SavedFusion.open(fusion).load(adapters)
    for adapter in loaded:
        for update in adapter.modules.values():
            check_update(adapter.name, update)
    with warnings.catch_warnings():
        # torch warns of each learned tensor that it is not copied into a model without weights: it is not needed there.
        warnings.filterwarnings("ignore", message=".*is a no-op.*")
        empty = load_empty_base(base, options or BaseOptions())
        check_base(saved.config.base, base_record(empty))
        model = FusedModel.from_adapters(empty, {adapter.name: adapter for adapter in loaded}, saved.method)
        model.load_state_dict(saved.tensors)
    check_base_files(saved.config.base, base, empty)
    sites = model.attachment.sites
    plan = FusionPlan(
        config=saved.config,
        method=model.method,
        adapters=tuple(model.adapter_names),
        layers=tuple(site.updates for site in sites["layer"].values()),
        gates={} if model.method.level == "query" else _gates(model.method, sites[model.method.place], saved.tensors),
        digest=saved.digest,
    )
    return _folded(plan, sites["module"]) if model.method.adds else plan


def _folded(plan: FusionPlan, sites: Mapping[str, Site]) -> FusionPlan:
    """The one adapter, of weight 1, that a fusion is whose gates ignore their input and add updates of their own."""
    found = {name: folded_update(site, plan.gates[name]) for name, site in sites.items()}
    layers: list[dict[str, Sequence[LoraModule | None]]] = [{} for _ in plan.layers]
    for name, site in sites.items():
        if found[name] is not None:
            layers[site.layer][str(site.module)] = (found[name],)
    return dataclasses.replace(
        plan,
        adapters=("+".join(plan.adapters),),
        layers=tuple(layers),
        gates={name: ConstantGate([1.0]) for name, update in found.items() if update is not None},
    )


def _gates(method: Method, sites: Mapping[str, Site], tensors: Mapping[str, Tensor]) -> Gates:
    """A method's gates on the CPU; those of the model without weights have none either."""
    gates: dict[str, nn.Module] = {}
    for name, site in sites.items():
        gate = method.gate(site)
        if gate is not None:
            gate.load_state_dict({key: tensors[f"{name}.{key}"] for key in gate.state_dict()})
            if isinstance(gate, WeighsSlots):
                # There gates read inputs, and a graph cannot make what they need for that.
                gate.read_inputs()
            gates[name] = gate.float().eval().requires_grad_(False)
    return gates


def check_update(name: str, update: LoraModule) -> None:
    """Check that an adapter's update of one linear is computed in vLLM.

    Raises:
        AdapterError: if it is more than A and B.
    """
    what = {
        "a DoRA": update.magnitude is not None,
        "trained with `lora_bias`": update.bias is not None,
        "one of a mixture's experts": update.experts > 1,
    }
    if any(what.values()):
        found = next(kind for kind, is_it in what.items() if is_it)
        raise AdapterError(
            f"Adapter {name!r} is {found}, which is not computed in vLLM. Serve it with `loraflow serve`, or leave "
            "it out."
        )


def check_digest(plan: FusionPlan, pinned: str | None) -> None:
    """Check that a fusion is still the one that was asked for.

    Raises:
        FusionError: if it has changed on disk since.
    """
    if pinned is not None and pinned != plan.digest:
        raise FusionError(
            f"The fusion has the digest {plan.digest[:19]}..., and {pinned[:19]}... was asked for: it was changed on "
            "disk since the command was made. Make the command again, or restore the fusion."
        )

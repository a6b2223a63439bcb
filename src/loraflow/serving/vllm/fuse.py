"""A fusion put into a model that vLLM has loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from loraflow.adapters import LoraModule
from loraflow.core.stack import stack_adapters
from loraflow.errors import ArchitectureError
from loraflow.serving.vllm.delta import ForwardWeights, FusedDelta, GivenWeights, LayerWeights
from loraflow.serving.vllm.layers import add_update, add_weights, reads_stream
from loraflow.serving.vllm.plan import FusionPlan, Updates
from loraflow.serving.vllm.request_table import RequestTable
from loraflow.serving.vllm.seam import LinearBase, columns_of, gather_of, packed_names, parts_of
from loraflow.serving.vllm.shards import Part, cut, join


def fuse(
    model: nn.Module, plan: FusionPlan, dtype: torch.dtype, device: torch.device, requests: RequestTable | None = None
) -> None:
    """Put a fusion into a model."""
    shared = ForwardWeights(requests)
    packed = packed_names(model)
    layers = _decoder_layers(model, len(plan.layers))
    for index, (layer, updates) in enumerate(zip(layers, plan.layers, strict=True)):
        weights = LayerWeights(shared, index, _gate_of_layer(plan, index), keeps=_keeps(plan, index))
        for name, linear, packs in _targeted(layer, index, updates, packed):
            delta = _delta(shared, index, updates, name, linear, packs, dtype)
            gates = [plan.gates.get(f"layers.{index}.{part}") for part in packs if part in updates]
            if plan.method.place == "module" and plan.gates:
                delta.add_gates([gate for gate in gates if gate is not None], gather_of(linear))
            add_update(linear, delta.to(device))
            weights.linears += 1
        add_weights(layer, weights.to(device))


def _keeps(plan: FusionPlan, index: int) -> bool:
    return plan.method.place == "model" and bool(plan.gates) and index < len(plan.layers) - 1


def _gate_of_layer(plan: FusionPlan, index: int) -> nn.Module | None:
    if not plan.gates:
        return GivenWeights(len(plan.adapters))
    if plan.method.place == "model":
        return plan.gates["model"] if index == 0 else None
    return plan.gates.get(f"layers.{index}")


def _decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The decoder layers of a model of vLLM.

    Raises:
        ArchitectureError: if there is not one list of that many.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all(map(reads_stream, module))
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ArchitectureError(
            f"vLLM's {type(model).__name__} should have one list of {count} decoder layers whose `forward` takes "
            f"`hidden_states` (found: {names}). This base cannot be served fused."
        )
    return found[0][1]


def _targeted(
    layer: nn.Module, index: int, updates: Updates, packed: Mapping[str, Sequence[str]]
) -> list[tuple[str, LinearBase, list[str]]]:
    """The linears of a layer that adapters update, and the names in transformers of what each packs.

    Raises:
        ArchitectureError: if an updated linear is not found, or is an expert's.
    """
    # vLLM's classes of experts come and go; their name is that of the checkpoints.
    experts = [name.rpartition(".")[0] for name, _ in layer.named_modules() if name.endswith("experts")]
    missing, found = set(updates), []
    for name, linear in layer.named_modules():
        if not isinstance(linear, LinearBase):
            continue
        parent, _, leaf = name.rpartition(".")
        packs = [f"{parent}.{part}" if parent else part for part in packed.get(leaf, [leaf])]
        if missing.isdisjoint(packs):
            continue
        if any(parent == block or parent.startswith(f"{block}.") for block in experts):
            raise ArchitectureError(
                f"Adapters update '{name}' of decoder layer {index}, beside the layer's experts, which vLLM computes "
                "in one kernel. Leave it out of `target_modules`."
            )
        missing.difference_update(packs)
        found.append((name, linear, packs))
    if missing:
        raise ArchitectureError(
            f"Adapters update '{sorted(missing)[0]}' of decoder layer {index} ({len(missing)} such), which vLLM's "
            f"{type(layer).__name__} does not have as a linear. This base cannot be served with these adapters."
        )
    return found


def _delta(
    shared: ForwardWeights,
    index: int,
    updates: Updates,
    name: str,
    linear: LinearBase,
    packs: Sequence[str],
    dtype: torch.dtype,
) -> FusedDelta:
    """The updates of one linear, of which a rank has its share.

    Raises:
        ArchitectureError: if the linear packs something else than its name says.
    """
    parts = parts_of(linear, name)
    if len(packs) == 1:
        parts = [join(parts)]
    if len(parts) != len(packs):
        raise ArchitectureError(
            f"'{name}' of decoder layer {index} computes {len(parts)} linears in one, and its name stands for "
            f"{len(packs)} of the base's ({', '.join(packs)}). Serve it with `loraflow serve`."
        )
    chosen = [(part, updates[pack]) for part, pack in zip(parts, packs, strict=True) if pack in updates]
    for part, modules in chosen:
        _check_features(name, linear, part, modules)
    columns = columns_of(linear)
    stacks = [cut(stack_adapters(modules, linear, dtype), part.rows, columns) for part, modules in chosen]
    return FusedDelta(shared, index, stacks, [part for part, _ in chosen])


def _check_features(name: str, linear: LinearBase, part: Part, modules: Sequence[LoraModule | None]) -> None:
    for module in modules:
        if module is None:
            continue
        found, expected = (module.lora_A.shape[1], module.lora_B.shape[0]), (linear.input_size, part.out_features)
        if found != expected:
            raise ArchitectureError(
                f"'{name}' maps {expected[0]} to {expected[1]} features in vLLM, but the adapters map {found[0]} to "
                f"{found[1]}: vLLM pads or splits it. This base cannot be served fused."
            )

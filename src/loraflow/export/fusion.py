"""A fusion with constant weights, or the means of dynamic ones, as one ordinary PEFT adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from loraflow.adapters import Adapter, AdapterSource, LoraModule
from loraflow.analysis.mean_weights import Weights, mean_weights
from loraflow.answers import require_tokenizer
from loraflow.core.fusion import Fusion
from loraflow.core.lanes import constant_weights_of
from loraflow.core.stack import dense_weight
from loraflow.errors import LoraflowError, MethodError
from loraflow.examples import Example, parse_examples
from loraflow.export.files import ExportReport, MeanCost, checked_target, peft_config, write_adapter
from loraflow.export.folding import Compression, UpdateSum, add_up, as_module, compressed, compression_of, own_update
from loraflow.merging import Loss, Merge, merge_adapters
from loraflow.methods.base import Mixing, Site
from loraflow.training.data import longest_example, split_batches, tokenize
from loraflow.training.loss import mean_loss
from loraflow.training.progress import counting_progress


@dataclass(frozen=True)
class Folded:
    """A fusion, or a merge of its adapters, as one adapter in memory.

    Attributes:
        adapter: that adapter.
        sources: names of the adapters that are in it.
        compression: what a lower rank cost; None where none was asked for.
        from_sum: what a merge loses of the sum of the updates; None where it is none.
        cost: what constant weights cost; None where they were constant before.
    """

    adapter: Adapter
    sources: tuple[str, ...]
    compression: Compression | None = None
    from_sum: Loss | None = None
    cost: MeanCost | None = None


@torch.no_grad()
def export_peft(
    model: Fusion,
    directory: str | Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    mean_weights_on: Sequence[Mapping[str, Any] | Example] | None = None,
    merge: Merge | None = None,
    batch_size: int = 4,
    overwrite: bool = False,
    console: Console | None = None,
) -> ExportReport:
    """Write a fusion as one PEFT adapter, which PEFT, transformers and (within its limits) vLLM load as any other.

    Args:
        model: the fusion; its method's weights must be constant, unless `mean_weights_on` is given.
        directory: where to; it appears complete or not at all.
        rank: compress every module's update to this rank at most; by default it is exact.
        dtype: precision of the saved tensors.
        mean_weights_on: examples on which a dynamic fusion's weights are averaged, for every layer (or module, where
            gates are the modules'); also what that costs is measured on them.
        merge: merge the fusion's adapters so, whatever its method weighs them by.
        batch_size: examples in a forward of that measurement.
        overwrite: replace an adapter that is in the directory.
        console: where progress is shown; standard error by default.

    Returns:
        What was exported, and what it cost.

    Raises:
        LoraflowError: if the rank or directory cannot be used, or the fusion cannot be written as one adapter.
        MethodError: if the fusion weights are not constant, or are all zero.
    """
    model.attachment.check_attached()
    target = checked_target(model, Path(directory), overwrite)
    folded = fold(
        model,
        rank=rank,
        dtype=dtype,
        mean_weights_on=mean_weights_on,
        merge=merge,
        batch_size=batch_size,
        console=console,
    )
    config = folded.adapter.config
    report = ExportReport(
        target,
        folded.sources,
        len(folded.adapter.modules),
        config.r,
        config.use_dora,
        config.lora_bias,
        folded.compression,
        folded.cost,
        None if merge is None else merge.name,
        folded.from_sum,
    )
    write_adapter(model, folded.adapter, report)
    return report


@torch.no_grad()
def fold(
    model: Fusion,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    mean_weights_on: Sequence[Mapping[str, Any] | Example] | None = None,
    merge: Merge | None = None,
    batch_size: int = 4,
    console: Console | None = None,
) -> Folded:
    """A fusion, or a merge of its adapters, as one adapter; `export_peft` says what the arguments are.

    Raises:
        LoraflowError: if the rank cannot be used, or there is no such adapter.
        MethodError: if the fusion weights are not constant, or are all zero.
    """
    if rank is not None and rank < 1:
        raise LoraflowError(f"`rank` (={rank}) must be at least 1.")
    model.attachment.check_attached()
    if merge is not None:
        if mean_weights_on is not None:
            raise MethodError(
                f"The merge {merge.name!r} reads the adapters alone, and `mean_weights_on` averages a method's "
                "weights. Leave one of them out."
            )
        return _merged(model, merge, rank, dtype)
    if mean_weights_on is None:
        return _export(model, constant_weights(model), rank, dtype)
    return _export_mean(model, parse_examples(mean_weights_on), batch_size, rank, dtype, console)


@torch.no_grad()
def constant_weights(model: Fusion) -> Weights:
    """The fusion weights of every fused linear.

    Returns:
        One weight for each adapter, by site (`layers.3.self_attn.q_proj`).

    Raises:
        MethodError: if they depend on the input, or there are none.
    """
    method = model.method
    if method.level != "task":
        each = "token" if method.level == "token" else "prompt"
        raise MethodError(
            f"The method {method.name!r} weighs every {each} anew, and an adapter's weights are constant: no adapter "
            "is this fusion, and no checkpoint. Export the mean of its weights on examples of the task "
            "(`mean_weights_on=examples`), or use it as it is."
        )
    if not model.gates:
        raise MethodError("The method in use is 'base', which has no fusion weights: there is nothing to export.")
    sites = model.attachment.sites
    known = {key: constant_weights_of(gate, sites[method.place][key].features) for key, gate in model.gates.items()}
    none = torch.zeros(len(model.adapters), dtype=torch.float64)
    return {
        name: known.get({"model": "model", "layer": f"layers.{site.layer}", "module": name}[method.place], none)
        for name, site in sites["module"].items()
    }


def _export_mean(
    model: Fusion,
    examples: Sequence[Example],
    batch_size: int,
    rank: int | None,
    dtype: torch.dtype,
    console: Console | None,
) -> Folded:
    """Export the mean of dynamic weights, and measure what that costs.

    Raises:
        MethodError: if the weights are constant as they are.
    """
    if model.method.level == "task":
        raise MethodError(
            f"The weights of the method {model.method.name!r} are constant as they are. Leave `mean_weights_on` out."
        )
    data = tokenize(examples, require_tokenizer(model.tokenizer), model.prompt, longest_example(model))
    batches = split_batches(data, batch_size)
    with counting_progress(console or Console(stderr=True)) as progress:
        bar = progress.add_task("mean weights", total=3 * len(data))

        def advance(count: int) -> None:
            progress.advance(bar, count)

        export = _export(model, mean_weights(model, batches, advance), rank, dtype)
        progress.update(bar, description="loss, dynamic")
        dynamic = mean_loss(model, data, batch_size, advance)
        progress.update(bar, description="loss, exported")
        with model.exchanged([export.adapter]), model.using(export.adapter.name):
            exported = mean_loss(model, data, batch_size, advance)
    return dataclasses.replace(export, cost=MeanCost(len(data), dynamic, exported, data.truncated))


class _Active(NamedTuple):
    """What is added up for one linear.

    Attributes:
        updates: the updates that are not weighed by zero, with their weights.
        names: of the adapters that are in them.
        rank: that of their sum, where it is known to be lower than their ranks together.
    """

    updates: list[tuple[LoraModule, float]]
    names: set[str]
    rank: int | None

    def add_up(self, weight: Tensor | None, mixing: Mixing) -> UpdateSum:
        """The sum; `weight` is the base's, which DoRA needs."""
        total = add_up(self.updates, weight, mixing)
        return total if self.rank is None else compressed(total, self.rank)[0]


def _active_at(site: Site, weights: Float[Tensor, " adapters"], gate: nn.Module | None) -> _Active:
    """What is added up at a site by these weights, and by a gate that adds an update of its own."""
    (updates,) = site.updates.values()
    found = zip(updates, weights.tolist(), site.adapters, strict=True)
    present = [(update, weight, name) for update, weight, name in found if update is not None]
    active = [(update, weight) for update, weight, _ in present if weight != 0]
    own = None if gate is None else own_update(gate)
    if own is None:
        return _Active(active, {name for _, weight, name in present if weight != 0}, None)
    return _Active([*active, (own, 1.0)], {name for *_, name in present}, own.rank)


def folded_update(site: Site, gate: nn.Module) -> LoraModule | None:
    """All that a gate that ignores its input adds to its linear, as one update; None where that is nothing.

    Its weights, and what it adds of its own; no adapter there is a DoRA or has biases.
    """
    active = _active_at(site, constant_weights_of(gate, site.features), gate)
    if not active.updates:
        return None
    return as_module(str(site.module), active.add_up(None, "outputs"), None, torch.float32, lora_bias=False)


def _refuse_bare(model: Fusion, names: Iterable[str]) -> None:
    """Check that all that is updated is a linear.

    Raises:
        LoraflowError: if a bare parameter is among it.
    """
    modules_of_base = dict(model.base_model.named_modules())
    bare = [name for name in names if name not in modules_of_base]
    if bare:
        raise LoraflowError(
            f"The fusion updates {len(bare)} bare parameters, such as '{bare[0]}' (experts of a mixture, a router), of "
            "which no adapter is written. Use it as it is: `loraflow generate` and `loraflow serve` take it."
        )


def _merged(model: Fusion, merge: Merge, rank: int | None, dtype: torch.dtype) -> Folded:
    """The one adapter that a merge makes of a fusion's adapters."""
    _refuse_bare(model, dict.fromkeys(name for adapter in model.adapters for name in adapter.modules))
    merged = merge_adapters(model.adapters, merge, rank=rank, name="exported", dtype=dtype)
    config = peft_config(model, merged.adapter.modules)
    return Folded(dataclasses.replace(merged.adapter, config=config), merged.names, from_sum=merged.from_sum)


def _export(model: Fusion, weights: Weights, rank: int | None, dtype: torch.dtype) -> Folded:
    """The one adapter that constant weights make of a fusion.

    Raises:
        LoraflowError: if PEFT has no such adapter.
        MethodError: if no adapter is left.
    """
    attachment, gates = model.attachment, model.gates if model.method.adds else {}
    kept: dict[str, _Active] = {}
    for name, site in attachment.sites["module"].items():
        active = _active_at(site, weights[name], gates.get(name))
        if active.updates:
            kept[f"{attachment.layers.prefix}.{name.removeprefix('layers.')}"] = active
    if not kept:
        raise MethodError("Every fusion weight is 0: the fusion is its base alone, and there is nothing to export.")
    _refuse_bare(model, kept)
    uses_dora = any(update.magnitude is not None for active in kept.values() for update, _ in active.updates)
    lora_bias = any(update.bias is not None for active in kept.values() for update, _ in active.updates)
    if uses_dora and lora_bias:
        raise LoraflowError(
            "One of the adapters is a DoRA and another has biases (`lora_bias`), and PEFT knows no adapter with both. "
            "Leave one of them out."
        )
    modules, errors = {}, {}
    for name, active in kept.items():
        weight = dense_weight(model.base_model.get_submodule(name)).double() if uses_dora else None
        found_sum = active.add_up(weight, model.method.mixing)
        if rank is not None:
            found_sum, *errors[name] = compressed(found_sum, rank)
        modules[name] = as_module(name, found_sum, weight, dtype, lora_bias=lora_bias)
    # It is nowhere yet, and nobody asks for its digest.
    adapter = Adapter("exported", AdapterSource("exported"), peft_config(model, modules), modules, "")
    names = set().union(*(active.names for active in kept.values()))
    sources = tuple(name for name in model.adapter_names if name in names)
    return Folded(adapter, sources, None if rank is None else compression_of(rank, errors))

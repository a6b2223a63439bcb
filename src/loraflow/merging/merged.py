"""Adapters in memory merged into one adapter, and what that loses of their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from loraflow.adapters import Adapter, AdapterSource, LoraModule, tensors_digest
from loraflow.errors import AdapterError, MethodError
from loraflow.merging.base import Factors, Merge, Places, Update, square_norm, stacked, truncated

if TYPE_CHECKING:
    from peft import LoraConfig

_EXPERT = "#"


@dataclass(frozen=True)
class Loss:
    """How far one set of updates is from another.

    Attributes:
        error: Frobenius norm of the difference of all modules' updates, relative to that of what they should be.
        worst_module: the module with the largest error of its own.
        worst_error: that error.
    """

    error: float
    worst_module: str
    worst_error: float


@dataclass(frozen=True)
class Merged:
    """What a merge gave.

    Attributes:
        adapter: the one adapter, with scaling 1 everywhere.
        names: of the adapters that are in it.
        from_sum: how far it is from the weighted sum of the adapters' updates, biases included.
    """

    adapter: Adapter
    names: tuple[str, ...]
    from_sum: Loss


@torch.no_grad()
def merge_adapters(
    adapters: Sequence[Adapter],
    merge: Merge,
    *,
    rank: int | None = None,
    name: str = "merged",
    dtype: torch.dtype = torch.float32,
) -> Merged:
    """Merge adapters of one base into one.

    Args:
        adapters: the adapters, by the base's names (as `loraflow.adapters.match_adapter` gives them).
        merge: how.
        rank: compress every merged update to this rank at most.
        name: the merged adapter's.
        dtype: precision of its tensors.

    Raises:
        AdapterError: if one is a DoRA, or they are of bases of different shapes.
        MethodError: if the merge cannot take them or leaves nothing of them, or the rank is none.
    """
    if rank is not None and rank < 1:
        raise MethodError(f"`rank` (={rank}) must be at least 1.")
    merge.check([adapter.name for adapter in adapters])
    adapters = [adapter for adapter in adapters if merge.weight_of(adapter.name) != 0]
    if not adapters:
        raise MethodError(f"Every weight of the merge {merge.name!r} is 0, and nothing is left to merge. Give others.")
    _check(adapters, merge)
    places, biases = _places(adapters, merge)
    factors = merge.merge(places)
    summed = {place: stacked(updates) for place, updates in places.items()}
    if merge.of_parameters:
        factors = _with_biases(factors, merge.merge_biases(biases))
        summed = _with_biases(summed, {place: torch.stack(list(found)).sum(dim=0) for place, found in biases.items()})
        widened = set(biases)
    else:
        widened = {place for place in places if _of(place)[0] in _biased(adapters)}
    if not any(one.lora_A.any() and one.lora_B.any() for one in factors.values()):
        raise MethodError(
            f"{merge!r} leaves nothing of the adapters {[adapter.name for adapter in adapters]}: every merged update "
            "is zero. Keep more of their entries (a larger `density`), or take the merge 'sum'."
        )
    if rank is not None:
        factors = {place: _compressed(one, rank, place in widened) for place, one in factors.items()}
    loss = loss_of(factors, summed)
    modules = _modules(factors, widened, dtype)
    tensors = {f"{at}.{part}": getattr(one, part) for at, one in modules.items() for part in ("lora_A", "lora_B")}
    tensors |= {f"{at}.bias": one.bias for at, one in modules.items() if one.bias is not None}
    adapter = Adapter(
        name, AdapterSource(name), _config(modules), modules, tensors_digest(tensors, merge.name), placed=True
    )
    return Merged(adapter, tuple(adapter.name for adapter in adapters), loss)


def loss_of(found: Mapping[str, Factors], expected: Mapping[str, Factors]) -> Loss:
    """How far low-rank updates are from those that they should be, from their factors alone."""
    cut: dict[str, float] = {}
    whole: dict[str, float] = {}
    for place, target in expected.items():
        module, one = _of(place)[0], found[place]
        difference = Factors(torch.cat([target.lora_A, one.lora_A]), torch.cat([target.lora_B, -one.lora_B], dim=1))
        cut[module] = cut.get(module, 0.0) + square_norm(difference)
        whole[module] = whole.get(module, 0.0) + square_norm(target)
    return loss_from(cut, whole)


def loss_from(cut: Mapping[str, float], whole: Mapping[str, float]) -> Loss:
    """The loss, from each module's squared norms: of the difference, and of what should be."""
    each = {module: _relative(cut[module], norm) for module, norm in whole.items()}
    worst = max(each, key=each.__getitem__)
    return Loss(_relative(sum(cut.values()), sum(whole.values())), worst, each[worst])


def _relative(cut: float, whole: float) -> float:
    return (cut / whole) ** 0.5 if whole else float(cut > 0)


def _check(adapters: Sequence[Adapter], merge: Merge) -> None:
    shapes: dict[str, tuple[Adapter, tuple[int, int, int]]] = {}
    for adapter in adapters:
        if adapter.uses_dora:
            raise AdapterError(
                f"Adapter {adapter.name!r} is a DoRA: its update divides by the norm of the base's weight and its own, "
                f"and is no sum of ranks that {merge.name!r} could merge. Leave it out, or fuse the adapters with "
                "constant weights instead, of which `loraflow export` writes one DoRA."
            )
        for name, module in adapter.modules.items():
            shape = (module.lora_A.shape[1], module.lora_B.shape[0], module.experts)
            first, known = shapes.setdefault(name, (adapter, shape))
            if shape != known:
                raise AdapterError(
                    f"The adapters {first.name!r} and {adapter.name!r} are of bases of different shapes: '{name}' maps "
                    f"{known[0]} to {known[1]} features in the first, and {shape[0]} to {shape[1]} in the other. Merge "
                    "adapters of one base."
                )


def _biased(adapters: Sequence[Adapter]) -> set[str]:
    return {name for adapter in adapters for name, module in adapter.modules.items() if module.bias is not None}


def _places(adapters: Sequence[Adapter], merge: Merge) -> tuple[Places, dict[str, list[Tensor]]]:
    """Each adapter's update of every place, and, where a merge is of parameters, the biases with their scales."""
    biased = _biased(adapters)
    places: dict[str, list[Update | None]] = {}
    biases: dict[str, list[Tensor]] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        for adapter in adapters:
            module, weight = adapter.modules.get(name), merge.weight_of(adapter.name)
            if module is None:
                experts = next(one.modules[name].experts for one in adapters if name in one.modules)
                for place in _names(name, experts):
                    places.setdefault(place, []).append(None)
                continue
            scale = weight * module.scaling
            for expert, place in enumerate(_names(name, module.experts)):
                own = module.of_expert(expert) if module.experts > 1 else module
                update = Update(own.lora_A.double().cpu(), own.lora_B.double().cpu(), scale)
                widen = name in biased and not merge.of_parameters
                places.setdefault(place, []).append(_widened(update, module.bias) if widen else update)
            if module.bias is not None and merge.of_parameters:
                biases.setdefault(name, []).append(scale * module.bias.double().cpu())
    return places, biases


def _names(module: str, experts: int) -> list[str]:
    """The places of a module: its name, or one for each expert."""
    return [module] if experts == 1 else [f"{module}{_EXPERT}{expert}" for expert in range(experts)]


def _of(place: str) -> tuple[str, int]:
    module, _, expert = place.partition(_EXPERT)
    return module, int(expert or 0)


def _widened(update: Update, bias: Tensor | None) -> Update:
    """The update of an input with a 1 behind it, whose column is the bias."""
    A = F.pad(update.lora_A, (0, 1))
    if bias is None:
        return Update(A, update.lora_B, update.scale)
    one = F.pad(torch.ones(1, 1).double(), (A.shape[1] - 1, 0))
    B = torch.cat([update.lora_B, bias.double().cpu()[:, None]], dim=1)
    return Update(torch.cat([A, one]), B, update.scale)


def _with_biases(factors: Mapping[str, Factors], biases: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The same, with biases as what the linears do with one more input, which is 1."""
    found = dict(factors)
    for place, bias in biases.items():
        found[place] = Factors(*_widened(Update(*factors[place], 1.0), bias)[:2])
    return found


def _compressed(factors: Factors, rank: int, widened: bool) -> Factors:
    """The nearest update of a lower rank; a bias, which costs none, stays as it is."""
    if not widened:
        return truncated(factors, rank)[0]
    A, column = factors.lora_A[:, :-1], factors.lora_A[:, -1]
    return _with_biases({"": truncated(Factors(A, factors.lora_B), rank)[0]}, {"": factors.lora_B @ column})[""]


def _modules(factors: Mapping[str, Factors], widened: set[str], dtype: torch.dtype) -> dict[str, LoraModule]:
    """The merged updates as an adapter has them: with biases everywhere or nowhere."""
    by_module: dict[str, list[Factors]] = {}
    biases: dict[str, Tensor] = {}
    for place, (A, B) in factors.items():
        module = _of(place)[0]
        if place in widened:
            biases[module] = B @ A[:, -1]
            # The rank that does nothing but the bias is left out.
            kept = A[:, :-1].any(dim=1)
            kept[0] |= not kept.any()
            A, B = A[kept, :-1], B[:, kept]
        by_module.setdefault(module, []).append(Factors(A, B))
    modules = {}
    for module, found in by_module.items():
        rank = max(len(one.lora_A) for one in found)
        A = torch.cat([F.pad(one.lora_A, (0, 0, 0, rank - len(one.lora_A))) for one in found])
        B = torch.cat([F.pad(one.lora_B, (0, rank - len(one.lora_A))) for one in found], dim=1)
        bias = biases.get(module, torch.zeros(len(B)).double()) if biases and len(found) == 1 else None
        modules[module] = _as_module(module, A, B, bias, dtype, len(found))
    return modules


def _as_module(name: str, A: Tensor, B: Tensor, bias: Tensor | None, dtype: torch.dtype, experts: int) -> LoraModule:
    bias = None if bias is None else bias.to(dtype)
    module = LoraModule(A.to(dtype).contiguous(), B.to(dtype).contiguous(), 1.0, bias, experts=experts)
    for tensor in (module.lora_A, module.lora_B, module.bias):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise MethodError(
                f"The merged update of '{name}' has values that {str(dtype).removeprefix('torch.')} cannot represent. "
                "Write it in a wider precision, or check the weights."
            )
    return module


def _config(modules: Mapping[str, LoraModule]) -> LoraConfig:
    """PEFT's configuration of it, in which r equals alpha everywhere."""
    from peft import LoraConfig

    bare = [name for name, module in modules.items() if module.experts > 1]
    rank = max(module.rank for module in modules.values())
    pattern = {name: module.rank for name, module in modules.items() if module.rank != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=[name for name in modules if name not in bare],
        target_parameters=bare or None,
        lora_bias=any(module.bias is not None for module in modules.values()),
    )

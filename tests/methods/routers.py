"""The routers' formulas as loops, in float64: what their tests believe."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraflow import Arrow, Lag, NormMax, SpectR
from loraflow.adapters import LoraModule
from loraflow.methods import Method


def singular(update: LoraModule) -> tuple[Tensor, Tensor]:
    """The singular values of B A that are not zero, and the right singular vectors as rows, from the dense product."""
    _, S, Vh = torch.linalg.svd(update.lora_B.double() @ update.lora_A.double(), full_matrices=False)
    kept = 1e-6 * S[0] < S if S[0] > 0 else S > 0
    return S[kept], Vh[kept]


def score(kind: str, x: Tensor, update: LoraModule) -> float:
    """One adapter's score of one input."""
    S, Vh = singular(update)
    parts = [float(sum(a * b for a, b in zip(v.tolist(), x.tolist(), strict=True))) for v in Vh]
    if kind == "arrow":
        return abs(parts[0]) if parts else 0.0
    if kind == "rows":
        return math.sqrt(sum(part**2 for part in parts))
    factor = update.scaling if kind == "norm" else 1.0
    return abs(factor) * math.sqrt(sum((float(s) * part) ** 2 for s, part in zip(S, parts, strict=True)))


def adds(update: LoraModule | None) -> bool:
    """Whether there is an update, and it is not zero for every input."""
    if update is None:
        return False
    low_rank = bool((update.lora_B.double() @ update.lora_A.double()).any()) or update.bias is not None
    return update.magnitude is not None or (update.scaling != 0 and low_rank)


def slow_weights(
    method: Method, x: Tensor, updates: Sequence[LoraModule | None], names: Sequence[str] | None = None
) -> list[float]:
    """The fusion weights of one input in one linear."""
    asked = [i for i, update in enumerate(updates) if adds(update)]

    def scores(kind: str, among: Sequence[int]) -> dict[int, float]:
        return {i: score(kind, x, updates[i]) for i in among}  # type: ignore[arg-type]

    def best(found: dict[int, float], count: int) -> list[int]:
        return sorted(found, key=lambda i: -found[i])[:count]

    weights = [0.0] * len(updates)
    if isinstance(method, Lag):
        assert names is not None
        libraries = [names] if method.libraries is None else list(method.libraries.values())
        for library in libraries:
            own = [i for i in asked if names[i] in library]
            candidates = best(scores("arrow", own), method.candidates)
            for winner in best(scores("rows", candidates), 1):
                weights[winner] = 1.0
        return weights
    kind, default, weighting, temperature = _rule(method)
    found = scores(kind, asked)
    chosen = best(found, method.top_k or min(default, len(updates)))  # type: ignore[attr-defined]
    for i in chosen:
        exponent = 0.0 if weighting == "equal" else (found[i] - found[chosen[0]]) / temperature
        weights[i] = math.exp(exponent)
    return [weight / (sum(weights) or 1.0) for weight in weights]


def _rule(method: Method) -> tuple[str, int, str, float]:
    if isinstance(method, Arrow):
        return "arrow", 3, "softmax", method.temperature
    if isinstance(method, SpectR):
        return "lengths" if method.singular_values else "rows", 4, method.weighting, method.temperature
    assert isinstance(method, NormMax)
    return "norm", 1, method.weighting, method.temperature

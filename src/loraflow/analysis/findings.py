"""What a fusion's weight statistics mean, in plain sentences: gates that have collapsed, adapters that nobody uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from loraflow.analysis.weights import WeightStatistics, WeightSummary

CONSTANT_STD = 0.001
"""A gate whose weights have no larger standard deviation over tokens gives every token the same."""
COLLAPSED_SHARE = 0.99
"""A gate has collapsed where one adapter is largest at this share of the tokens, and ..."""
COLLAPSED_STD = 0.02
"""... no adapter's weight has a larger standard deviation."""
UNUSED_WEIGHT = 0.05
"""An adapter is unused that is never largest, and whose mean absolute weight is below this at every gate."""
ENOUGH_TOKENS = 20
"""Fewer tokens say nothing about how weights vary over tokens."""
ENOUGH_PROMPTS = 5
"""Fewer prompts say nothing about how weights vary over prompts."""

Kind = Literal["by-design", "too-few", "constant", "collapsed", "varies", "alike", "unused"]
_SHOWN_GATES = 6


THRESHOLDS = {
    "constant_std": CONSTANT_STD,
    "collapsed_share": COLLAPSED_SHARE,
    "collapsed_std": COLLAPSED_STD,
    "unused_weight": UNUSED_WEIGHT,
    "enough_tokens": ENOUGH_TOKENS,
    "enough_prompts": ENOUGH_PROMPTS,
}


@dataclass(frozen=True)
class Finding:
    """One thing to know about a fusion's weights.

    Attributes:
        kind: "by-design" (constant because the method is), "too-few" (too little data to judge), "constant" and
            "collapsed" (gates that should vary over tokens and do not), "varies" (they do), "alike" (all prompts have
            the same weights from a method that weighs prompts), "unused" (an adapter).
        text: a sentence for people.
        gates: site names of the gates that it is about.
        adapter: the adapter that it is about.
    """

    kind: Kind
    text: str
    gates: tuple[str, ...] = ()
    adapter: str | None = None


def findings(statistics: WeightStatistics) -> list[Finding]:
    """What is worth saying about a fusion's weights, by the thresholds of this module."""
    return [*_of_variation(statistics), *_of_adapters(statistics)]


def _of_variation(statistics: WeightStatistics) -> list[Finding]:
    name, summary = statistics.method, statistics.overall
    if statistics.level == "task":
        return [
            Finding("by-design", f"The method {name!r} gives every token of every prompt the same weights, by design.")
        ]
    whole = statistics.level == "query"
    enough = ENOUGH_PROMPTS if whole else ENOUGH_TOKENS
    if int(summary.count[0]) < enough:
        text = (
            f"{int(summary.count[0])} {statistics.counted} are too few to say how the weights vary (at least {enough})."
        )
        return [Finding("too-few", text)]
    return _of_prompts(statistics) if whole else _of_gates(statistics)


def _of_gates(statistics: WeightStatistics) -> list[Finding]:
    """Which gates of a method that weighs tokens vary, and which do not."""
    gates, summary = _gates(statistics)
    spread = summary.std.amax(dim=1)
    constant = spread <= CONSTANT_STD
    found = []
    if constant.any():
        text = (
            f"CONSTANT: {_listed(gates, constant)} give every token the same weights (on average "
            f"{_means(statistics, summary, constant)}), although the method weighs each token: no standard deviation "
            f"is above {CONSTANT_STD:g}."
        )
        found.append(Finding("constant", text, _chosen(gates, constant)))
    for index, adapter in enumerate(statistics.adapters):
        collapsed = ~constant & (summary.largest[:, index] >= COLLAPSED_SHARE) & (spread <= COLLAPSED_STD)
        if collapsed.any():
            text = (
                f"COLLAPSED: in {_listed(gates, collapsed)}, {adapter!r} has the largest weight at "
                f"{COLLAPSED_SHARE:.0%} or more of the tokens, and no standard deviation is above {COLLAPSED_STD:g}: "
                "fixed weights would do nearly the same."
            )
            found.append(Finding("collapsed", text, _chosen(gates, collapsed), adapter))
    if not found:
        text = (
            "No gate has collapsed: the standard deviation over tokens of a gate's most variable weight is "
            f"{spread.min():.3f} to {spread.max():.3f} (collapsed: at most {COLLAPSED_STD:g}, with one adapter largest "
            f"at {COLLAPSED_SHARE:.0%} of the tokens; constant: at most {CONSTANT_STD:g})."
        )
        found.append(Finding("varies", text, gates))
    return found


def _of_prompts(statistics: WeightStatistics) -> list[Finding]:
    """Whether a method that weighs whole prompts weighs them differently."""
    gates, summary = _gates(statistics)
    alike = summary.std.amax(dim=1) <= COLLAPSED_STD
    note = (
        f"The method {statistics.method!r} weighs each prompt once and keeps the weights for its answer, by design: "
        "what varies here varies over prompts, not tokens."
    )
    found = [Finding("by-design", note)]
    if alike.any():
        text = (
            f"ALIKE: in {_listed(gates, alike, 'layers')}, all prompts have nearly the same weights (on average "
            f"{_means(statistics, summary, alike)}): no standard deviation over prompts is above {COLLAPSED_STD:g}."
        )
        found.append(Finding("alike", text, _chosen(gates, alike)))
    return found


def _of_adapters(statistics: WeightStatistics) -> list[Finding]:
    _, of_gates = _gates(statistics)
    summaries = [of_gates, statistics.answers, *([statistics.prompts] if statistics.prompts is not None else [])]
    found = []
    for index, adapter in enumerate(statistics.adapters):
        led = any(bool((summary.largest[:, index] > 0).any()) for summary in summaries)
        weight = max(summary.absolute[:, index].max().item() for summary in summaries)
        if not led and weight < UNUSED_WEIGHT:
            text = (
                f"UNUSED: {adapter!r} never has the largest weight, and its mean absolute weight is at most "
                f"{weight:.3f} in any layer (threshold {UNUSED_WEIGHT:g}): without it the fusion would hardly change."
            )
            found.append(Finding("unused", text, (), adapter))
    return found


def _gates(statistics: WeightStatistics) -> tuple[tuple[str, ...], WeightSummary]:
    """The sites at which weights may differ, and their summaries."""
    if statistics.module_answers is not None:
        return statistics.modules, statistics.module_answers
    if statistics.place == "model" and statistics.level == "token":
        return ("model",), statistics.answers.part(slice(1))
    return tuple(f"layers.{layer}" for layer in statistics.layers), statistics.answers


def _chosen(gates: Sequence[str], mask: Tensor) -> tuple[str, ...]:
    return tuple(gate for gate, chosen in zip(gates, mask.tolist(), strict=True) if chosen)


def _means(statistics: WeightStatistics, summary: WeightSummary, chosen: Tensor) -> str:
    means = summary.mean[chosen].mean(dim=0).tolist()
    return ", ".join(f"{name} {mean:.2f}" for name, mean in zip(statistics.adapters, means, strict=True))


def _listed(gates: Sequence[str], mask: Tensor, noun: str = "gates") -> str:
    names = _chosen(gates, mask)
    if len(names) == len(gates):
        return f"all {len(gates)} {noun}"
    shown = ", ".join(names[:_SHOWN_GATES]) + (", ..." if len(names) > _SHOWN_GATES else "")
    return f"{len(names)} of {len(gates)} {noun} ({shown})"


def report_json(statistics: WeightStatistics) -> dict[str, Any]:
    """Statistics with what they mean, and the thresholds of that, as JSON values."""
    found = [dataclasses.asdict(finding) for finding in findings(statistics)]
    return {**statistics.as_json(), "findings": found, "thresholds": THRESHOLDS}

"""Which few of many adapters fit a prompt: those that a method scores highest."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.core.probe import Prompt
from loraflow.errors import MethodError, did_you_mean
from loraflow.methods import Method, QueryMethod, ScoredMethod, get_method, make_method, method_names
from loraflow.serving.auto import AUTO, TOP_K, Auto, Picking

# Scores that are told beyond those of the picked adapters.
_TOLD = 5


@dataclass(frozen=True)
class Picks:
    """What was picked for a prompt, and why; the best first.

    Attributes:
        weights: the picked adapters with their fusion weights, of which the mean over the layers is told.
        scores: theirs, and those of the best that were not picked; the mean over the layers. None where each token is
            weighed anew.
        measure: what a score is; None where there is none.
        candidates: how many adapters there were to pick from.
    """

    weights: Mapping[str, float]
    scores: Mapping[str, float] | None
    measure: str | None
    candidates: int

    def as_json(self) -> dict[str, Any]:
        """The same as an answer says it."""
        scores = None if self.scores is None else {name: round(score, 5) for name, score in self.scores.items()}
        return {
            "adapter_weights": {name: round(weight, 5) for name, weight in self.weights.items()},
            "scores": scores,
            "measure": self.measure,
            "candidates": self.candidates,
        }


def method_of(auto: Auto, adapters: Sequence[str], fusions: Collection[str]) -> Method:
    """The method by which `auto` picks, where it is none of a fusion's.

    Raises:
        MethodError: if there is none of that name, or it learns, or cannot pick.
    """
    known = [*method_names(), *fusions]
    if auto.method not in known:
        raise MethodError(
            f"`{AUTO}` cannot pick by {auto.method!r}: there is no such method, and no such fusion here. "
            f"{did_you_mean(auto.method, known)}"
        )
    check_options(auto.options)
    method = get_method(auto.method, list(adapters), auto.options)
    if method.learns:
        raise MethodError(
            f"The method {method.name!r} learns, and picks nothing before. Fit it (`loraflow fit`), "
            "serve the fusion too, and name that in its place."
        )
    check_method(method)
    return method


def check_method(method: Method) -> None:
    """Check that a method looks at requests, so that it can pick by them.

    Raises:
        MethodError: if it does not, or does more than weigh the adapters' outputs.
    """
    if method.level == "task":
        raise MethodError(
            f"The method {method.name!r} weighs all requests alike, and `{AUTO}` picks by the request. Take one that "
            "reads the prompt, such as 'logo', or a fusion with such a one."
        )
    if method.mixing != "outputs" or method.adds:
        raise MethodError(
            f"The method {method.name!r} does not only weigh the adapters' outputs, so that `{AUTO}` cannot leave any "
            "of them out. Take another, or ask for a fusion with it by its own name."
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Check that a method's options leave to `auto` how many it picks.

    Raises:
        MethodError: if they do not.
    """
    if "on_top" in options:
        raise MethodError(
            f"`on_top` (={options['on_top']!r}) is among the method's options, and what is picked has nothing on top. "
            "Leave it out."
        )
    if "top_k" in options:
        raise MethodError(
            f"`top_k` (={options['top_k']!r}) is among the method's options, and `{AUTO}` says how many are picked. "
            f'Give it there: `auto_top_k=1`, say, or `"{AUTO}": {{"top_k": ...}}` in a request.'
        )


def limited(method: Method, picking: Picking) -> Method:
    """A method that learns nothing as it picks for one request: where it weighs each token, it knows how many.

    Raises:
        MethodError: if it cannot be told.
    """
    if isinstance(method, QueryMethod):
        return method
    if picking.floor is not None:
        raise MethodError(
            f"The method {method.name!r} weighs each token anew, and has no score of a request that the `floor` "
            f"(={picking.floor}) could be held against. Leave it out, or take a method that reads the whole prompt, "
            "such as 'logo'."
        )
    if picking.top_k is None:
        return method
    if "top_k" not in {field.name for field in dataclasses.fields(method)}:
        raise MethodError(f"The method {method.name!r} has no `top_k` (={picking.top_k}). Leave it out.")
    return make_method(method.name, {**method.parameters(), "top_k": min(picking.top_k, len(picking.adapters))})


def pick(
    method: QueryMethod, gate: Any, prompt: Prompt, picking: Picking
) -> tuple[Picks, list[str], Float[Tensor, "layers picked"]]:
    r"""The adapters that a method picks for a prompt, in the prompt's order, with their weights in each layer.

    With $s_i$ adapter i's score, of methods that tell none its weight, and of layers that differ their mean: those are
    picked that are among the `top_k` highest of the candidates, and reach the `floor`. Their weights are as if there
    were no others; where scores are weights, they are what they were.

    Raises:
        MethodError: if a score is no number.
    """
    found = method.scores(prompt, gate) if isinstance(method, ScoredMethod) else method.weigh(prompt, gate)
    means = found.double().reshape(-1, len(prompt.adapters)).mean(dim=0).tolist()
    candidates = set(picking.adapters)
    # The earlier of equals first.
    ranked = sorted((i for i, name in enumerate(prompt.adapters) if name in candidates), key=lambda i: -means[i])
    bad = next((prompt.adapters[i] for i in ranked if means[i] != means[i]), None)
    if bad is not None:
        raise MethodError(f"The method {method.name!r} scores the adapter {bad!r} with no number. Leave it out.")
    floor = float("-inf") if picking.floor is None else picking.floor
    chosen = sorted(i for i in ranked[: picking.top_k or TOP_K] if means[i] >= floor)
    weights = found[..., chosen]
    if isinstance(method, ScoredMethod) and chosen:
        weights = method.weights_of(weights)
    weights = weights.expand(prompt.layers, -1)
    # A method may have kept fewer itself.
    used = [column for column in range(len(chosen)) if bool((weights[:, column] != 0).any())]
    names = [prompt.adapters[chosen[column]] for column in used]
    mean = dict(zip(names, weights[:, used].double().mean(dim=0).tolist(), strict=True))
    best = [prompt.adapters[i] for i in ranked]
    told = [name for place, name in enumerate(best) if name in mean or place < len(mean) + _TOLD]
    score_of = dict(zip(prompt.adapters, means, strict=True))
    picks = Picks(
        {name: mean[name] for name in best if name in mean},
        {name: score_of[name] for name in told},
        method.measure if isinstance(method, ScoredMethod) else "fusion weight",
        len(ranked),
    )
    return picks, names, weights[:, used]


@dataclass
class MeanWeights:
    """Weights of tokens, of which the mean is wanted.

    Attributes:
        total: their sum, `[adapters]`, of the mean over the layers.
        tokens: how many there were.
    """

    total: Float[Tensor, " adapters"] | None = None
    tokens: int = 0

    def add(self, weights: Float[Tensor, "layers adapters"]) -> None:
        """Note a token's weights."""
        mean = weights.double().mean(dim=0)
        self.total = mean if self.total is None else self.total + mean
        self.tokens += 1


def picks_of_tokens(adapters: Sequence[str], noted: Sequence[MeanWeights]) -> Picks:
    """What a method that weighs each token picked for some answers: the adapters that had a weight, with its mean."""
    total = sum(one.total for one in noted if one.total is not None)
    mean = torch.as_tensor(total) / sum(one.tokens for one in noted)
    weights = dict(zip(adapters, mean.tolist(), strict=True))
    used = sorted((name for name in weights if weights[name] != 0), key=lambda name: -weights[name])
    return Picks({name: weights[name] for name in used}, None, None, len(adapters))

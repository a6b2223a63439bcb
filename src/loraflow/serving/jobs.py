"""A request on its way through the engine: who weighs it, how it is sampled, and what its listener hears."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.core.lanes import Gates
from loraflow.methods import Method
from loraflow.methods.base import Mixing
from loraflow.serving.grammars import Constraint
from loraflow.serving.picking import Picks

FinishReason = Literal["stop", "length"]

# Below, draws are as good as always the likeliest, and dividing by it may overflow.
_COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with this probability.
        seed: of the draws; None draws anew every time.
        logprobs: how many of the likeliest tokens are told at each position, with the chosen one; None tells nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < _COLDEST


@dataclass(frozen=True)
class Weigher:
    """Who weighs a request's tokens: a method with its gates, or weights that are given.

    Attributes:
        method: the method; None where weights are given.
        gates: its gates, by site.
        weights: the weights of every layer.
        mixing: what given weights mix.
        adapters: names of the adapters that these are for, in order; None for all in the model. Others may come into
            the model and leave it while a request runs.
        digest: of all that the weights depend on beside the tokens so far; None where nobody knows.
        picks: what was picked for the prompt, and why; None where the adapters were named.
    """

    method: Method | None = None
    gates: Gates = field(default_factory=dict)
    weights: Float[Tensor, "layers adapters"] | None = None
    mixing: Mixing = "outputs"
    adapters: tuple[str, ...] | None = None
    digest: str | None = None
    picks: Picks | None = None

    def prefix(self, salt: str | None) -> bytes | None:
        """What pages of the cache are found by, beside their tokens (`Job.prefix`)."""
        return None if self.digest is None else hashlib.sha256(json.dumps([self.digest, salt]).encode()).digest()


@dataclass(frozen=True)
class Token:
    """One generated token, as soon as it is there.

    Attributes:
        id: the token.
        logprob: its log-probability under the model, before temperature; None where it was not asked for.
        top: the likeliest tokens with theirs.
        weights: the fusion weights that produced it, those of the position before, by layer, for the adapters of its
            `Weigher`; None where they were not asked for.
        prompt: the prompt's tokens with theirs, beside the first token of an answer that was to tell them; nothing says
            how likely the first of them is.
        finish: why it is the last; None where it is not.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    weights: Float[Tensor, "layers adapters"] | None = None
    prompt: tuple[Token, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True)
class Failure:
    """The end of a request that could not be answered.

    Attributes:
        asked_for: whether the request itself is the cause, and others go on.
    """

    message: str
    asked_for: bool = False


Listener = Callable[[Token | Failure], None]
"""Hears of every token, in the engine's own thread: it must return at once, and raise nothing."""


@dataclass(eq=False)
class Job:
    """A request on its way through the engine.

    Attributes:
        client: who sent it; those of several clients take turns.
        weigher: who weighs it.
        ends: token ids that end an answer.
        wants_weights: whether tokens come with their fusion weights.
        constraint: what its answer may consist of; None for anything.
        tells_prompt: whether the prompt's tokens are told too, with as many log-probabilities as others.
        read: those of the prompt's tokens that are known so far, by their place.
        begun: when it was in a step for the first time, in seconds of a monotonic clock; None where it was in none.
        told: how many tokens it has heard of.
        sampled: its new token with all that is known of it, until the listener hears of it.
        prefix: requests where it is the same share the pages of their common beginning; None shares nothing.
        cached: how many tokens of the prompt were found in the cache; None where they were not looked for.
    """

    id: str
    prompt: Sequence[int]
    weigher: Weigher
    sampling: Sampling
    max_new_tokens: int
    ends: Sequence[int]
    wants_weights: bool
    listener: Listener
    client: str = ""
    constraint: Constraint | None = None
    tells_prompt: bool = False
    read: dict[int, Token] = field(default_factory=dict)
    generator: torch.Generator | None = None
    begun: float | None = None
    told: int = 0
    sampled: Token | None = None
    prefix: bytes | None = None
    cached: int | None = None

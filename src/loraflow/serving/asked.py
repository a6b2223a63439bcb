"""A request that has been checked, on its way to its answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from loraflow.serving.accounts import Stages
from loraflow.serving.jobs import Failure, Job, Token
from loraflow.serving.picking import MeanWeights, Picks, picks_of_tokens
from loraflow.serving.served import Served
from loraflow.serving.text import TextStream

Outcome = Literal["finished", "cancelled", "timeout", "invalid", "refused", "failed"]


@dataclass
class Asked:
    """A request that has been checked.

    Attributes:
        jobs: one for each answer, as the engine takes them.
        events: what the engine says of them.
        started: when it came, before it was read and weighed, in seconds of a monotonic clock.
        stages: how far it came since.
        generated: tokens so far, of all answers.
        outcome: how it ended; it was given up by its client where nothing else is known.
        ended: whether it was counted.
        only_prompt: whether nothing is wanted but the prompt.
        tells_weights: whether its tokens are sent with their weights.
        noted: the weights of the tokens of each answer, where its method picks adapters for each token.
    """

    id: str
    served: Served
    prompt: list[int]
    jobs: list[Job]
    streams: list[TextStream]
    events: asyncio.Queue[tuple[int, Token | Failure]]
    started: float
    stages: Stages = field(default_factory=Stages)
    generated: int = 0
    outcome: Outcome = "cancelled"
    ended: bool = False
    only_prompt: bool = False
    tells_weights: bool = False
    noted: dict[int, MeanWeights] = field(default_factory=dict)

    def picks(self, index: int | None = None) -> Picks | None:
        """What was picked for the prompt; of methods that weigh each token, for one answer so far, or for all.

        None where the adapters were named, or no token has been weighed.
        """
        if self.served.auto is None or self.jobs[0].weigher.picks is not None:
            return self.jobs[0].weigher.picks
        noted = [one for place, one in self.noted.items() if index in (None, place)]
        return picks_of_tokens(self.served.adapters, noted) if noted else None

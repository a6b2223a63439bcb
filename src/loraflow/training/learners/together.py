"""Training all gates on the adapters' own data together, while adapters come and go."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from loraflow.core.fusion import Fusion
from loraflow.errors import DataError
from loraflow.methods.base import Drops, LearnsAmong
from loraflow.training.config import FitResult, Run
from loraflow.training.data import prepare
from loraflow.training.learners.base import DECIDING, Examples, Learner
from loraflow.training.learners.gradient import fit_gates
from loraflow.training.learners.samples import read_samples

_FEWEST = 2
"""Adapters that stay in every forward: of one alone there is nothing to learn."""


class Together(Learner):
    """Trains on the data of all adapters, or of some, which are then the only ones that take part."""

    name: ClassVar[str] = "together"
    reads: ClassVar[Literal["task", "adapters"]] = "adapters"
    needs_method: ClassVar[type | None] = Drops
    needs_gates: ClassVar[type | None] = LearnsAmong
    reads_all: ClassVar[bool] = False
    idle: ClassVar[frozenset[str]] = DECIDING

    def check_examples(self, fusion: Fusion, examples: Any, dev: Any) -> Any:
        """The examples by adapter, in the adapters' order.

        Raises:
            DataError: if they are not what the learner reads, or of fewer adapters than it takes.
        """
        found = super().check_examples(fusion, examples, dev)
        missing = [name for name in fusion.adapter_names if name not in found]
        if missing and fusion.method.reads_prompt:
            raise DataError(
                f"The method {fusion.method.name!r} reads prompts by each adapter's own data, as it is set up; there "
                f"is none for {missing[0]!r}."
            )
        if len(found) < _FEWEST:
            given = f"of {next(iter(found))!r} alone" if found else "of none of them"
            raise DataError(
                f"The method {fusion.method.name!r} learns to tell adapters apart, and there is data {given}. Give "
                f"that of {_FEWEST} adapters at least."
            )
        return found

    def learn(  # noqa: D102
        self, fusion: Fusion, examples: Mapping[str, Sequence[Any]], dev: Examples | None, run: Run
    ) -> FitResult:
        parts = {name: prepare(fusion, own, None, run.config) for name, own in examples.items()}
        data = prepare(fusion, [example for own in examples.values() for example in own], None, run.config)
        # Whose they are decides who takes part.
        digests = json.dumps({name: part.digest for name, part in parts.items()})
        data = dataclasses.replace(data, digest=hashlib.sha256(digests.encode()).hexdigest())
        pool = torch.tensor([name in examples for name in fusion.adapter_names])
        with _changing(fusion, pool, cast(Drops, fusion.method).drop):
            result = fit_gates(fusion, data, run, "fitting on the adapters' own data")
        if fusion.method.reads_prompt:
            read_samples(fusion, examples, run)
        counts = {name: len(part.train) for name, part in parts.items()}
        fusion.training_record = {**self.record(run.config, data, result), "adapters": counts}
        return result


@contextlib.contextmanager
def _changing(fusion: Fusion, pool: Bool[Tensor, " adapters"], probability: float) -> Iterator[None]:
    """Let each forward that trains draw the adapters that it is among; all others are among the whole pool."""

    def draw(*_: Any) -> None:
        among = draw_adapters(pool, probability) if fusion.training else pool
        for gate in _learning(fusion):
            gate.among = among

    hook = fusion.register_forward_pre_hook(draw)
    try:
        yield
    finally:
        hook.remove()
        for gate in _learning(fusion):
            gate.among = None


def _learning(fusion: Fusion) -> list[LearnsAmong]:
    return [gate for gate in fusion.gates.values() if isinstance(gate, LearnsAmong)]


def draw_adapters(pool: Bool[Tensor, " adapters"], probability: float) -> Bool[Tensor, " adapters"]:
    """Leave each adapter of a pool out with this probability, but not so many that fewer than two stay."""
    lots = torch.rand(len(pool)).masked_fill(~pool, -1.0)
    # Those with the highest lots stay, whatever the probability: two of them at random.
    stays = lots >= probability
    stays[lots.topk(min(_FEWEST, int(pool.sum()))).indices] = True
    return stays & pool

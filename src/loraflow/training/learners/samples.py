"""Looking at samples of each adapter's own data, without any training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch

from loraflow.answers import require_tokenizer
from loraflow.core.fusion import Fusion
from loraflow.core.probe import Prompt
from loraflow.examples import parse_examples
from loraflow.methods.base import Embeds, KeepsSamples
from loraflow.training.config import FitResult, Run
from loraflow.training.learners.base import DECIDING, TRAINING, Examples, Learner
from loraflow.training.progress import counting_progress


class Samples(Learner):
    """Gives a method's gate the embeddings of each adapter's own prompts."""

    name: ClassVar[str] = "samples"
    reads: ClassVar[Literal["task", "adapters"]] = "adapters"
    needs_method: ClassVar[type | None] = Embeds
    needs_gates: ClassVar[type | None] = KeepsSamples
    seeded: ClassVar[bool] = False
    idle: ClassVar[frozenset[str]] = (
        DECIDING
        | TRAINING
        | {"batch_size", "max_length", "train_on", "seed", "resume", "keep_checkpoints", "devices", "shard"}
    )

    def learn(  # noqa: D102
        self, fusion: Fusion, examples: Mapping[str, Sequence[Any]], dev: Examples | None, run: Run
    ) -> FitResult:
        started = time.perf_counter()
        fusion.set_method(fusion.method)
        fusion.training_record = {"samples": read_samples(fusion, examples, run)}
        return FitResult(seconds=time.perf_counter() - started)


@torch.no_grad()
def read_samples(fusion: Fusion, examples: Mapping[str, Sequence[Any]], run: Run) -> dict[str, int]:
    """Give what a method keeps for the whole model the embeddings of each adapter's own prompts; how many those are."""
    method, gate = cast(Embeds, fusion.method), cast(KeepsSamples, fusion.gates["model"])
    tokenizer = require_tokenizer(fusion.tokenizer)
    parsed = {name: parse_examples(own) for name, own in examples.items()}
    embeddings = []
    with fusion.evaluating(), counting_progress(run.console) as progress:
        bar = progress.add_task("reading samples", total=sum(map(len, parsed.values())))
        for own in parsed.values():
            of_one = []
            for example in own:
                ids = torch.tensor(fusion.prompt.prompt_ids(tokenizer, example.messages), device=fusion.device)
                of_one.append(method.embed(Prompt(fusion.attachment, ids, tokenizer), gate))
                progress.advance(bar)
            embeddings.append(torch.stack(of_one))
    gate.set_samples(embeddings)
    return {name: len(own) for name, own in parsed.items()}

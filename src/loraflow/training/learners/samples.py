"""Looking at samples of each adapter's own data, without any training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.answers import require_tokenizer
from loraflow.core.fusion import Fusion
from loraflow.core.probe import Prompt
from loraflow.examples import parse_examples
from loraflow.methods.base import Embeds, JoinsLater, KeepsSamples
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

    def check_examples(self, fusion: Fusion, examples: Any, dev: Any) -> Any:
        """The examples by adapter; adapters that the gate knows already may be left out, and keep what they have."""
        if not isinstance(examples, Mapping) or not examples:
            return super().check_examples(fusion, examples, dev)
        known = {name: () for name in _kept(fusion) if name not in examples}
        read = super().check_examples(fusion, {**known, **examples}, dev)
        return {name: own for name, own in read.items() if name in examples}

    def learn(  # noqa: D102
        self, fusion: Fusion, examples: Mapping[str, Sequence[Any]], dev: Examples | None, run: Run
    ) -> FitResult:
        started = time.perf_counter()
        kept, before = _kept(fusion), (fusion.training_record or {}).get("samples", {})
        fusion.set_method(fusion.method)
        counts = {**before, **read_samples(fusion, examples, run, kept)}
        # Of vectors that were taken from elsewhere nobody knows the number.
        fusion.training_record = {"samples": {name: counts[name] for name in fusion.adapter_names if name in counts}}
        return FitResult(seconds=time.perf_counter() - started)


@torch.no_grad()
def read_samples(
    fusion: Fusion, examples: Mapping[str, Sequence[Any]], run: Run, kept: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """Give what a method keeps for the whole model the embeddings of each adapter's own prompts; how many those are.

    Args:
        fusion: with that method in use.
        examples: of each adapter.
        run: where progress is shown.
        kept: embeddings of adapters that have no examples here.
    """
    method, gate = cast(Embeds, fusion.method), cast(KeepsSamples, fusion.gates["model"])
    tokenizer = require_tokenizer(fusion.tokenizer)
    parsed = {name: parse_examples(own) for name, own in examples.items()}
    embeddings = {name: own for name, own in (kept or {}).items() if name not in parsed}
    with fusion.evaluating(), counting_progress(run.console) as progress:
        bar = progress.add_task("reading samples", total=sum(map(len, parsed.values())))
        for name, own in parsed.items():
            of_one = []
            for example in own:
                ids = torch.tensor(fusion.prompt.prompt_ids(tokenizer, example.messages), device=fusion.device)
                of_one.append(method.embed(Prompt(fusion.attachment, ids, tokenizer), gate))
                progress.advance(bar)
            embeddings[name] = torch.stack(of_one)
    gate.set_samples([embeddings[name] for name in fusion.adapter_names])
    return {name: len(own) for name, own in parsed.items()}


def _kept(fusion: Fusion) -> dict[str, Float[Tensor, "_samples hidden"]]:
    """What stands for the samples of the adapters that a gate knows."""
    gate = fusion.gates.get("model")
    if not isinstance(gate, JoinsLater):
        return {}
    kept = zip(fusion.adapter_names, gate.kept_samples(), strict=True)
    return {name: embeddings for name, embeddings in kept if embeddings is not None}

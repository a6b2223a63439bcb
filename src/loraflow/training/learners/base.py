"""The contract of a learner: a way in which methods learn, known by the name in their `learns`.

A learner is one class in one file. It says whose examples it reads, what it needs of a method and its gates beyond
their contract, and which settings of a fit it has no use for; `learn` does the work. What fits, compares and talks to
people goes by these facts, never by a learner's name.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from loraflow.core.fusion import Fusion
from loraflow.core.lanes import KEEPER
from loraflow.errors import DataError, MethodError, did_you_mean
from loraflow.examples import Example
from loraflow.training.config import FitConfig, FitResult, Run
from loraflow.training.data import FitData

Examples = Sequence[Mapping[str, Any] | Example]

# Settings of an optimiser's steps, and all that only a training uses.
STEPS = frozenset(
    {"epochs", "min_steps", "max_steps", "learning_rate", "gradient_accumulation", "warmup", "schedule", "weight_decay"}
)
TRAINING = STEPS | {
    "adapter_dropout",
    "gradient_checkpointing",
    "checkpoint_steps",
    "group_by_length",
    "packing",
    "keep_last",
    "early_stopping",
    "report_to",
    "find_learning_rate",
}
# What decides on examples of a task.
DECIDING = frozenset({"dev", "score", "search", "score_max_new_tokens", "early_stopping"})


class Learner(ABC):
    """A way to learn.

    Attributes:
        name: what methods call it in `learns`.
        reads: whose examples it learns from: the task's, or each adapter's own.
        needs_method: the protocol that a method must keep for it, or None.
        needs_gates: the protocol that the method's gates must keep, or None.
        seeded: whether another seed may give something else.
        has_grid: whether a grid of learning rates and batch sizes can be searched: `learn` once for each setting, with
            results on `dev`.
        reads_all: whether it needs data of every adapter, where it learns from theirs.
        idle: parameters of `fit`, and fields of `FitConfig`, that it has no use for.
        step: what the steps of its results are.
    """

    name: ClassVar[str]
    reads: ClassVar[Literal["task", "adapters"]] = "task"
    needs_method: ClassVar[type | None] = None
    needs_gates: ClassVar[type | None] = None
    seeded: ClassVar[bool] = True
    has_grid: ClassVar[bool] = False
    reads_all: ClassVar[bool] = True
    idle: ClassVar[frozenset[str]] = frozenset()
    step: ClassVar[str] = "steps"

    @abstractmethod
    def learn(self, fusion: Fusion, examples: Any, dev: Examples | None, run: Run) -> FitResult:
        """Learn what a fusion's method learns, and note it in `training_record`; base and adapters stay as they are.

        Args:
            fusion: its gates are changed in place.
            examples: as `check_examples` gave them.
            dev: examples that decide between checkpoints.
            run: the recipe, and where it is run.
        """

    def record(self, config: FitConfig, data: FitData, result: FitResult) -> dict[str, Any]:
        """What a fusion's configuration and model card say of a training.

        A search asks for that of a setting which it finds finished: a learner with a grid notes the same in `learn`.
        """
        return {
            "examples": len(data.train),
            "dev_examples": len(data.dev) if data.dev is not None else None,
            "data_sha256": data.digest,
            "truncated_examples": len(result.truncated),
            "started_at": dict(result.start),
            "steps": result.steps,
            "kept_step": result.kept_step,
            "train_loss": result.train_loss,
            "dev_loss": result.dev_loss,
            "dev_score": result.dev_score,
            "recipe": dataclasses.asdict(config),
        }

    def check_method(self, fusion: Fusion) -> None:
        """Check that a method, perhaps of another package, and its gates have what the learner needs.

        Raises:
            MethodError: if they have not.
        """
        weighing = [gate for site, gate in fusion.gates.items() if fusion.method.level == "query" or site != KEEPER]
        needs = [(gate, self.needs_gates) for gate in (weighing or fusion.gates.values())]
        for thing, needed in [*needs, (fusion.method, self.needs_method)]:
            if needed is not None and not isinstance(thing, needed):
                raise MethodError(
                    f"The method {fusion.method.name!r} learns by {self.name!r}, for which its {type(thing).__name__} "
                    f"must be as `loraflow.methods.base.{needed.__name__}` says. Add what is missing."
                )

    def check_examples(self, fusion: Fusion, examples: Any, dev: Any) -> Any:
        """The examples as `learn` takes them: a list, or by adapter in the adapters' order.

        Raises:
            DataError: if they are not what the learner reads.
        """
        name = fusion.method.name
        if self.reads == "task":
            if isinstance(examples, Mapping):
                raise DataError(f"The method {name!r} learns from examples of the task. Give a list of them.")
            return examples
        adapters = fusion.adapter_names
        if dev is not None:
            raise DataError(
                f"The method {name!r} learns from the adapters' own data, not from a task. Leave `dev` out."
            )
        if not isinstance(examples, Mapping):
            wanted = ", ".join(f"{adapter!r}: [...]" for adapter in adapters)
            raise DataError(
                f"The method {name!r} learns from each adapter's own data. Give examples by adapter name: {{{wanted}}}."
            )
        for adapter in examples:
            if adapter not in adapters:
                raise DataError(
                    f"Examples are given for the unknown adapter {adapter!r}. {did_you_mean(adapter, adapters)}"
                )
        missing = [adapter for adapter in adapters if adapter not in examples]
        if missing and self.reads_all:
            raise DataError(
                f"The method {name!r} learns from each adapter's own data; there is none for {missing[0]!r}."
            )
        return {adapter: examples[adapter] for adapter in adapters if adapter in examples}

"""Searching one weight for each adapter without gradients, with Nevergrad, as LoRA-Hub does."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, cast

from loraflow.core.fusion import Fusion
from loraflow.errors import LoraflowError
from loraflow.files import write_atomically
from loraflow.methods.base import Searched, StartsAt
from loraflow.training.capacity import settle
from loraflow.training.checkpoints import SEARCH_FILE, check_same, identity_of, remove_checkpoints
from loraflow.training.config import FitResult, Run
from loraflow.training.data import TokenExamples, prepare
from loraflow.training.learners.base import TRAINING, Examples, Learner
from loraflow.training.loss import check_score, mean_loss, mean_score
from loraflow.training.progress import counting_progress


class Search(Learner):
    """Searches the weights of the method's one gate.

    Every evaluated loss is kept in a file. The search itself follows from the seed and the losses, so a resumed one
    asks for the same weights again and is told what it was told before.
    """

    name: ClassVar[str] = "search"
    needs_method: ClassVar[type | None] = Searched
    needs_gates: ClassVar[type | None] = StartsAt
    idle: ClassVar[frozenset[str]] = TRAINING | {"search"}
    step: ClassVar[str] = "evaluations"

    def learn(self, fusion: Fusion, examples: Examples, dev: Examples | None, run: Run) -> FitResult:  # noqa: D102
        started = time.perf_counter()
        config = run.config
        data = prepare(fusion, examples, dev, config)
        check_score(run.score, data.dev_examples)
        fusion.set_method(fusion.method)
        identity = identity_of(fusion, data, run)
        if config.gradient_accumulation == "auto":
            # What fits with a backward fits without.
            run.processes.check_batches(config.batch_size, config.gradient_accumulation)
            config = settle(fusion, data.train, config)
            config = dataclasses.replace(config, batch_size=config.forward_size, gradient_accumulation=1)
        losses = _search(fusion, data.train, identity, dataclasses.replace(run, config=config))
        result = FitResult(
            start=dict.fromkeys(fusion.adapter_names, 0.0),
            steps=len(losses),
            train_loss=mean_loss(fusion, data.train, config.batch_size, _unheard, run.processes),
            kept_step=len(losses),
            seconds=time.perf_counter() - started,
            truncated=data.train.truncated,
            log=list(enumerate(losses, start=1)),
        )
        if data.dev is not None:
            score = None
            if run.score is not None:
                tokens, apart = config.score_max_new_tokens, run.processes.apart
                score = mean_score(fusion, data.dev_examples, tokens, run.score, apart)
            dev_loss = mean_loss(fusion, data.dev, config.batch_size, _unheard, run.processes)
            result = dataclasses.replace(result, dev_loss=dev_loss, dev_score=score)
        fusion.training_record = self.record(run.config, data, result)
        return result


def _search(fusion: Fusion, data: TokenExamples, identity: Mapping[str, Any], run: Run) -> list[float]:
    """Set the fusion's gate to the weights that were found; gives every loss on the way.

    Raises:
        LoraflowError: if Nevergrad is missing, or the losses there are another search's.
    """
    try:
        import nevergrad
    except ImportError as error:
        raise LoraflowError("LoRA-Hub's search needs Nevergrad. Run: pip install 'loraflow[search]'") from error
    method, gate = cast(Searched, fusion.method), cast(StartsAt, fusion.gates["model"])
    path = run.directory / SEARCH_FILE
    run.processes.agree(identity, "run: recipe, data, base or adapters")
    if not run.resume:
        run.processes.ask(lambda: remove_checkpoints(run.directory))
    known = run.processes.ask(lambda: _known_losses(path, identity) if run.resume else [])
    space = nevergrad.p.Array(init=[0.0] * len(fusion.adapters)).set_bounds(-method.bound, method.bound)
    space.random_state.seed(run.config.seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=method.budget)
    losses: list[float] = []
    log = _log(path, identity, known) if run.processes.first else contextlib.nullcontext(io.StringIO())
    with log as file, counting_progress(run.console) as progress:
        bar = progress.add_task("searching weights", total=method.budget)
        for evaluation in range(method.budget):
            candidate = optimizer.ask()
            weights = [float(weight) for weight in candidate.value]
            if evaluation < len(known):
                loss = known[evaluation]
            else:
                gate.start_at(weights)
                loss = mean_loss(fusion, data, run.config.batch_size, _unheard, run.processes)
                file.write(json.dumps({"loss": loss, "weights": weights}) + "\n")
                file.flush()
            optimizer.tell(candidate, loss + method.regularization * sum(map(abs, weights)) / len(weights))
            losses.append(loss)
            progress.update(bar, advance=1, description=f"searching weights, lowest loss {min(losses):.4f}")
    gate.start_at([float(weight) for weight in optimizer.provide_recommendation().value])
    return losses


def _unheard(count: int) -> None:
    """No bar moves within one evaluation."""


@contextlib.contextmanager
def _log(path: Path, identity: Mapping[str, Any], known: list[float]) -> Iterator[IO[str]]:
    """The file of losses, open at its end, with what is known in it."""
    # The half of a line that a crash may have left goes; what is known stays.
    head = [json.dumps(identity), *(json.dumps({"loss": loss}) for loss in known)]
    write_atomically(path, ("\n".join(head) + "\n").encode())
    with warnings.catch_warnings(), path.open("a", encoding="utf-8") as file:
        # One of NGOpt's optimizers warns of a bound that it corrects itself.
        warnings.filterwarnings("ignore", message="COBYLA: Invalid")
        yield file


def _known_losses(path: Path, identity: Mapping[str, Any]) -> list[float]:
    """The losses of an interrupted search; none where there was no search.

    Raises:
        LoraflowError: if they are another search's.
    """
    if not path.is_file():
        return []
    first, *rest = path.read_text(encoding="utf-8").splitlines() or [""]
    recorded = _parse(first)
    if not recorded:
        return []
    check_same(recorded, identity, path, "search")
    losses = []
    for line in rest:
        entry = _parse(line)
        # A crash may have left half of the last line.
        if "loss" not in entry:
            break
        losses.append(float(entry["loss"]))
    return losses


def _parse(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}

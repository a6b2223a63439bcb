"""Ways to learn that are no gradient descent: a search without gradients, and looking at each adapter's own data."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console

from loraflow.answers import require_tokenizer
from loraflow.core.probe import Prompt
from loraflow.errors import LoraflowError
from loraflow.examples import parse_examples
from loraflow.files import write_atomically
from loraflow.methods.base import Embeds, Searched
from loraflow.training.config import FitConfig, FitResult
from loraflow.training.data import TokenExamples
from loraflow.training.loss import mean_loss
from loraflow.training.progress import counting_progress
from loraflow.training.run import SEARCH_FILE

if TYPE_CHECKING:
    from loraflow.model import FusedModel


def search_weights(
    model: FusedModel,
    data: TokenExamples,
    identity: Mapping[str, Any],
    config: FitConfig,
    directory: Path,
    resume: bool,
    console: Console,
) -> FitResult:
    """LoRA-Hub's search of one weight for each adapter, with Nevergrad.

    Every evaluated loss is kept in a file. The search itself follows from the seed and the losses, so a resumed one
    asks for the same weights again and is told what it was told before.

    Args:
        model: the fused model; its one gate is changed in place.
        data: the examples whose loss is minimised.
        identity: what makes two searches the same one.
        config: batch size and seed.
        directory: where the losses are kept.
        resume: use those that are there.
        console: where progress is shown.

    Returns:
        The losses, in `log`.

    Raises:
        LoraflowError: if Nevergrad is missing, or the losses there are another search's.
    """
    try:
        import nevergrad
    except ImportError as error:
        raise LoraflowError("LoRA-Hub's search needs Nevergrad. Run: pip install 'loraflow[search]'") from error
    method = cast(Searched, model.method)
    started = time.perf_counter()
    model.set_method(model.method)
    gate: Any = model.gates["model"]
    known = _known_losses(directory / SEARCH_FILE, identity) if resume else []
    # The half of a line that a crash may have left goes; what is known stays.
    head = [json.dumps(identity), *(json.dumps({"loss": loss}) for loss in known)]
    write_atomically(directory / SEARCH_FILE, ("\n".join(head) + "\n").encode())
    space = nevergrad.p.Array(init=[0.0] * len(model.adapters)).set_bounds(-method.bound, method.bound)
    space.random_state.seed(config.seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=method.budget)
    losses: list[float] = []
    with contextlib.ExitStack() as stack:
        # One of NGOpt's optimizers warns of a bound that it corrects itself.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="COBYLA: Invalid")
        file = stack.enter_context((directory / SEARCH_FILE).open("a", encoding="utf-8"))
        progress = stack.enter_context(counting_progress(console))
        bar = progress.add_task("searching weights", total=method.budget)
        for evaluation in range(method.budget):
            candidate = optimizer.ask()
            weights = [float(weight) for weight in candidate.value]
            if evaluation < len(known):
                loss = known[evaluation]
            else:
                gate.start_at(weights)
                loss = mean_loss(model, data, config.batch_size)
            optimizer.tell(candidate, loss + method.regularization * sum(map(abs, weights)) / len(weights))
            losses.append(loss)
            if evaluation >= len(known):
                file.write(json.dumps({"loss": loss, "weights": weights}) + "\n")
                file.flush()
            progress.update(bar, advance=1, description=f"searching weights, lowest loss {min(losses):.4f}")
    found = [float(weight) for weight in optimizer.provide_recommendation().value]
    gate.start_at(found)
    return FitResult(
        start=dict.fromkeys(model.adapter_names, 0.0),
        start_losses={},
        steps=method.budget,
        train_loss=mean_loss(model, data, config.batch_size),
        dev_loss=None,
        dev_score=None,
        kept_step=method.budget,
        seconds=time.perf_counter() - started,
        truncated=data.truncated,
        log=list(enumerate(losses, start=1)),
    )


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
    for key, value in identity.items():
        if recorded.get(key) != value:
            raise LoraflowError(
                f"Cannot resume from {path}: its search had another `{key}`. Give the same arguments and data as then, "
                "or start afresh without --resume."
            )
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


@torch.no_grad()
def fit_samples(model: FusedModel, examples: Mapping[str, Sequence[Any]], console: Console) -> FitResult:
    """Give a method the embeddings of each adapter's own prompts.

    Args:
        model: the fused model; its gate is changed in place.
        examples: examples of each adapter's own data, in the adapters' order.
        console: where progress is shown.

    Returns:
        How long it took.
    """
    method = cast(Embeds, model.method)
    started = time.perf_counter()
    tokenizer = require_tokenizer(model.tokenizer)
    parsed = {name: parse_examples(own) for name, own in examples.items()}
    model.set_method(model.method)
    model.eval()
    gate: Any = model.gates["model"]
    embeddings = []
    with counting_progress(console) as progress:
        bar = progress.add_task("reading samples", total=sum(map(len, parsed.values())))
        for own in parsed.values():
            of_one = []
            for example in own:
                ids = torch.tensor(model.prompt.prompt_ids(tokenizer, example.messages), device=model.device)
                of_one.append(method.embed(Prompt(model._attachment, ids, tokenizer), gate))
                progress.advance(bar)
            embeddings.append(torch.stack(of_one))
    gate.set_samples(embeddings)
    model.training_record = {"samples": {name: len(own) for name, own in parsed.items()}}
    return FitResult(
        start={},
        start_losses={},
        steps=0,
        train_loss=None,
        dev_loss=None,
        dev_score=None,
        kept_step=0,
        seconds=time.perf_counter() - started,
        truncated=[],
        log=[],
    )

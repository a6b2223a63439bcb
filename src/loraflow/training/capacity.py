"""How much memory there is, and how many examples of a step share a forward so that it is enough."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import find_executable_batch_size, send_to_device
from rich.console import Console

from loraflow.answers import padding_id, require_tokenizer
from loraflow.errors import LoraflowError
from loraflow.training.batches import Packed
from loraflow.training.config import FitConfig
from loraflow.training.data import Collator, TokenExamples
from loraflow.training.plan import Footprint, Plan, as_trained, footprint, largest_forward, size_text

_CGROUP = Path("/sys/fs/cgroup")
# Of what is free: allocators waste some, and other programs want some.
_SHARE = 0.9
_SMALLER = "Say `gradient_checkpointing`, or a lower `max_length`"


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still have on a device; on the CPU within the limits of its container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Pages of files are given back where programs need them.
        free = min(free, limit - used + int(statistics["inactive_file"]))
    return free


def settle(model: Any, data: TokenExamples, config: FitConfig) -> FitConfig:
    """The recipe with the forwards of a step settled: the fewest that fit, where they are to be found.

    The examples of a step, and what is learned from them, stay the same whatever fits. On the CPU the plan decides,
    for nothing there fails in time; elsewhere the largest forward is tried.

    Raises:
        LoraflowError: if not even one example fits.
    """
    if config.gradient_accumulation != "auto":
        return config
    sizes = [size for size in range(config.batch_size, 0, -1) if config.batch_size % size == 0]
    found = planned(model, data, config, sizes) if model.device.type == "cpu" else tried(model, data, config, sizes)
    return dataclasses.replace(config, gradient_accumulation=config.batch_size // found)


def planned(model: Any, data: TokenExamples, config: FitConfig, sizes: list[int]) -> int:
    """The first of these sizes whose longest forward the plan has room for.

    Raises:
        LoraflowError: if there is none.
    """
    taken = footprint(model, checkpointing=config.gradient_checkpointing, packed=config.packing)
    free = free_bytes(model.device)
    for size in sizes:
        if taken.peak(largest_forward(data, size, packed=config.packing)) <= _SHARE * free:
            return size
    one = largest_forward(data, 1, packed=config.packing)
    raise LoraflowError(
        f"A step of one example of {one.width} tokens takes {size_text(taken.peak(one))}, and {size_text(free)} are "
        f"free. {_SMALLER}."
    )


def tried(model: Any, data: TokenExamples, config: FitConfig, sizes: list[int]) -> int:
    """The first of these sizes whose longest forward, and its backward, do not run out of memory.

    Raises:
        LoraflowError: if there is none.
        RuntimeError: if a forward fails for another reason.
    """
    collate = Packed() if config.packing else Collator(padding_id(require_tokenizer(model.tokenizer)))
    rows = sorted(data.rows, key=lambda row: len(row.input_ids), reverse=True)
    rest = iter((*sizes[1:], 0))

    def attempt(size: int) -> int:
        batch: dict[str, Any] = collate(rows[:size])
        model(**send_to_device(batch, model.device)).loss.backward()
        return size

    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with as_trained(model, checkpointing=config.gradient_checkpointing):
        # In the place of AdamW's two moments, which come with the first step.
        moments = [torch.empty_like(parameter) for parameter in learned for _ in range(2)]
        try:
            return find_executable_batch_size(attempt, sizes[0], lambda: next(rest))()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            raise LoraflowError(
                f"A step of one example of {len(rows[0].input_ids)} tokens does not fit into the memory of "
                f"{model.device}. {_SMALLER}."
            ) from error
        finally:
            del moments


def announce(model: Any, data: TokenExamples, config: FitConfig, console: Console) -> None:
    """Say what a training takes, and what would help where that is not there."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    def take(*, checkpointing: bool, timed: bool) -> Footprint:
        return footprint(model, checkpointing=checkpointing, packed=config.packing, timed=timed)

    try:
        free = free_bytes(model.device)
        plan = Plan.make(take(checkpointing=config.gradient_checkpointing, timed=True), data, config, free)
        for line in plan.lines():
            say(line)
        if not plan.fits and not config.gradient_checkpointing:
            other = dataclasses.replace(plan, footprint=take(checkpointing=True, timed=False))
            say(
                "that is more than there is: with gradient checkpointing it takes "
                f"{size_text(other.footprint.weights + other.footprint.peak(other.shape))}"
            )
        elif not plan.fits:
            say("that is more than there is: fewer examples in a forward (`gradient_accumulation`) take less")
    except LoraflowError as error:
        say(str(error))

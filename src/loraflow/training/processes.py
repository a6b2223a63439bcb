"""Several processes that fit together: each has the model on its own device, and its share of every batch.

What is learned is tiny, so it is all that is exchanged: gradients are averaged once a step, by one message. The base
and the adapters are neither wrapped nor sent. The processes read the same batches in the same order, and each takes its
rows of them, so that a step is the step of one process: no example comes twice, or not at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from rich.console import Console
from torch import Tensor

from loraflow.errors import LoraflowError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that fit together, seen from one of them.

    Attributes:
        rank: which one this is.
        count: how many they are.
        sharded: whether each holds a part of the base only, so that none can do a forward alone.
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes; all others wait for it."""
        return self.rank == 0

    @property
    def apart(self) -> Processes:
        """The processes for work that each does at its own pace; with a sharded base all of them do all of it."""
        return ALONE if self.sharded else self

    def console(self, console: Console | None) -> Console:
        """Where this process shows its progress: nowhere, unless it is the first."""
        return (console or Console(stderr=True)) if self.first else Console(quiet=True)

    def each(self, things: Sequence[Any], work: Callable[[Any], T]) -> list[T]:
        """What `work` gives for each of several things, in their order; every thing is one process's."""
        own = [work(thing) for thing in things[self.rank :: self.count]]
        if self.sharded and len(own) * self.count < len(things):
            # A sharded base needs every process in every forward.
            work(things[0])
        done = self.gather(own)
        return [done[index % self.count][index // self.count] for index in range(len(things))]

    def gather(self, value: T) -> list[T]:
        """What each process has, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def total(self, *values: float) -> list[float]:
        """Sums over all processes, the same to the last bit in each of them."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def ask(self, make: Callable[[], T]) -> T:
        """What the first process makes, or the error that it meets, in all of them.

        Raises:
            LoraflowError: in every process, if `make` does in the first.
        """
        if self.count == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = make()
            except LoraflowError as error:
                answer[1] = error
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def agree(self, value: Any, what: str) -> None:
        """Check that all processes have the same.

        Raises:
            LoraflowError: in every process, if one has something else than the first.
        """
        everywhere = self.gather(value)
        for rank, other in enumerate(everywhere):
            if other != everywhere[0]:
                raise LoraflowError(
                    f"Process {rank} has another {what} than process 0. Give all of them the same arguments and files."
                )

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give the first process's values to all, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients over all processes, in one message for each device and precision."""
        if self.count == 1:
            return
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                # A gate may have had no part in a process's rows; its gradient is zero there.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = gradient
                kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        for gradients in kinds.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.count
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def check_batches(self, batch_size: int, gradient_accumulation: int | Literal["auto"]) -> None:
        """Check that every forward's rows can be shared out evenly.

        Raises:
            LoraflowError: if they cannot.
        """
        if gradient_accumulation == "auto":
            if self.count == 1:
                return
            raise LoraflowError(
                f"`gradient_accumulation` (='auto') finds what fits one device, and {self.count} processes fit "
                "together. Give a number."
            )
        parts = self.count * gradient_accumulation
        if batch_size % parts:
            raise LoraflowError(
                f"`batch_size` (={batch_size}) is that of all processes together and must be a multiple of their "
                f"number (={self.count}) times `gradient_accumulation` (={gradient_accumulation}). Give a multiple of "
                f"{parts}, or fewer processes."
            )

    def check_sees(self, file: Path) -> None:
        """Check that every process sees a file that the first has written.

        Raises:
            LoraflowError: in every process, if one does not.
        """
        for rank, sees in enumerate(self.gather(file.is_file())):
            if not sees:
                raise LoraflowError(
                    f"Process {rank} does not see {file}, which process 0 has written. Give a folder that all machines "
                    "share, as `checkpoints`."
                )

    @contextlib.contextmanager
    def fitting(self, folder: AbstractContextManager[Path]) -> Iterator[Path]:
        """Where checkpoints are kept while the processes fit: what the first process opens.

        Yields:
            The place.

        Raises:
            LoraflowError: if another process ends before this one.
        """
        with contextlib.ExitStack() as stack:
            place = self.ask(lambda: stack.enter_context(folder))
            with self._noticing(place):
                yield place
                # What is temporary goes with the first process, and the others may still read it.
                self.gather(None)

    @contextlib.contextmanager
    def _noticing(self, directory: Path) -> Iterator[None]:
        """Say so where another process is gone.

        Raises:
            LoraflowError: if one is.
        """  # noqa: DOC501 (other errors are their own)
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_lost_connection(error):
                raise
            raise LoraflowError(
                f"Process {self.rank} of {self.count} cannot go on: another one has ended ({_first_line(error)}). The "
                f"last whole checkpoint is kept in {directory}; see what the other one says, and go on from there with "
                "`resume=True`."
            ) from error


ALONE = Processes()


def here(model: Any) -> Processes:
    """The processes of the group that this one is in, which is made where a launcher has said what it is.

    Args:
        model: what they fit, each on a device of its own.

    Raises:
        LoraflowError: if there is a group, of which the environment says nothing.
    """
    _check_launcher()
    grouped = dist.is_available() and dist.is_initialized()
    if not grouped and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    state = PartialState(cpu=model.device.type == "cpu")
    if grouped and state.num_processes != dist.get_world_size():
        raise LoraflowError(
            f"The process group has {dist.get_world_size()} processes, and the environment says nothing of it, which "
            "the trainer goes by. Start the program with `torchrun` or `accelerate launch`, or set RANK, LOCAL_RANK "
            "and WORLD_SIZE in each process."
        )
    _check_placement(model, state)
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return Processes(state.process_index, state.num_processes, sharded)


def _check_launcher() -> None:
    """Check that no launcher asks accelerate to take the base apart, with all that is learned.

    Raises:
        LoraflowError: if one does.
    """
    for name, flag in {"DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP"}.items():
        if os.environ.get(flag, "false").lower() == "true":
            raise LoraflowError(
                f"`accelerate launch` is set to use {name} ({flag}), which would take the gates apart with the base. "
                "Launch plain processes (--multi_gpu), and load a base that does not fit one device in parts, with "
                "`BaseOptions(model_kwargs=...)` and transformers' `DistributedConfig(fsdp_size=...)`."
            )


def _check_placement(model: Any, state: PartialState) -> None:
    """Check that each process has its model on its own device.

    Raises:
        LoraflowError: if it has not.
    """
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise LoraflowError(
            f"The base is spread over several devices (`device_map`), and {state.num_processes} processes fit it, each "
            "of which needs its own. Fit it with one process, or give each process one device."
        )
    if model.device.type != "cpu" and model.device != state.device:
        raise LoraflowError(
            f"The model of process {state.process_index} is on {model.device}, and its device is {state.device}. Load "
            "it there."
        )


def _is_lost_connection(error: RuntimeError) -> bool:
    # Gloo raises plain RuntimeErrors, whose texts are those of its sockets.
    words = ("connection", "broken pipe", "timed out", "timeout", "socket", "peer")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")

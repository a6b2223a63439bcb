"""One command in several processes: started here by `--devices`, or by `torchrun` or `accelerate launch`.

Each process runs the whole command, on a device of its own. The first prints and writes; an error is told by the one
that meets it first.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.groups import Given
from loraflow.errors import LoraflowError
from loraflow.files import is_first_process

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.bases import BaseOptions
    from loraflow.training.config import FitConfig

Devices = Annotated[
    int | None,
    typer.Option(
        "--devices",
        help="Train on so many GPUs at once, or, with --device cpu, in so many processes; they share each batch.  "
        "[default: 1]",
    ),
]
Shard = Annotated[
    bool,
    typer.Option("--shard", help="Divide a base that does not fit one device among all --devices (FSDP2)."),
]

_joined: list[Any] = []


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


_TRAIN = ("fit", "finetune")


def check_alone(command: str | None) -> None:
    """Check that only a command that trains was started as several processes.

    Raises:
        LoraflowError: if another one was: each process would do all of its work, and write over the others'.
    """
    if is_launched() and command is not None and command not in _TRAIN:
        raise LoraflowError(
            f"`loraflow {command}` is one process, and WORLD_SIZE (={os.environ['WORLD_SIZE']}) says that a launcher "
            "has started several. Start it without one, or unset that: `compare` measures in several processes with "
            "--workers or --ray, and only `fit` and `finetune` train in several."
        )


def own_device(device: str | None) -> str:
    """The device that this process has its model on; by default a GPU, if there is one."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and is_launched() else device


def placed(options: BaseOptions, *, shard: bool) -> BaseOptions:
    """How this process loads the base: as the options say, or a part of it.

    Raises:
        LoraflowError: if a base is to be divided that cannot be.
    """
    if not shard:
        return options
    if not is_launched():
        raise LoraflowError("`--shard` divides the base among several devices, and there is one. Give --devices.")
    if options.quantization not in (None, "none"):
        raise LoraflowError(
            f"`--shard` divides no quantised base (`--quantization` = {options.quantization!r}). Leave one of them out."
        )
    from transformers.distributed import DistributedConfig

    parts = DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
    return dataclasses.replace(options, device_map=None, model_kwargs={"distributed_config": parts})


def join(devices: int | None, device: str | None) -> Console:
    """Meet the other processes, where a launcher has started several; gives where this one prints.

    Raises:
        LoraflowError: if each process cannot have a device of its own.
    """
    from rich.console import Console

    if devices is not None and devices < 1:
        raise LoraflowError(f"`--devices` (={devices}) must be at least 1.")
    if (is_launched() or (devices or 1) > 1) and device not in (None, "cuda", "cpu"):
        raise LoraflowError(
            f"`--device` (={device!r}) is one place, and each of several processes has its own GPU. Give cuda or cpu, "
            "or leave it out."
        )
    if not is_launched():
        return Console(stderr=True)
    started = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if devices is not None and devices != started:
        raise LoraflowError(
            f"`--devices` (={devices}) is not the number of processes that were launched here (={started}). Leave it "
            "out: the launcher says how many."
        )
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=own_device(device) == "cpu")
    _joined.append(next(iter(dist.rendezvous("env://")))[0])
    if not is_first_process():
        _hush()
    return Console(stderr=True, quiet=not is_first_process())


def _hush() -> None:
    """Keep what libraries tell to the first process."""
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def tells_errors() -> bool:
    """Whether this process is the first that fails: the others fail of the same, or because of it."""
    try:
        return not _joined or _joined[0].add("loraflow/failed", 1) == 1
    except RuntimeError:
        # The process that keeps the count is gone, perhaps without a word.
        return True


def leave() -> None:
    """Part from the other processes, at the end of a command that went well."""
    if _joined:
        import torch.distributed as dist

        _joined.clear()
        dist.destroy_process_group()


def launch(given: Given, devices: int | None, device: str | None, config: FitConfig) -> bool:
    """Run the command in several processes of this machine, if it is to, and if this is not one of them.

    Raises:
        LoraflowError: if there are fewer GPUs, batches cannot be shared out, or a process was killed.
        typer.Exit: if a process failed, which has said why.
        KeyboardInterrupt: if the user stops it.
    """
    if devices is None or devices == 1 or is_launched():
        return False
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from loraflow.training.processes import Processes

    gpus = torch.cuda.device_count()
    if own_device(device) == "cuda" and devices > gpus:
        raise LoraflowError(f"`--devices` (={devices}) is more than the GPUs of this machine (={gpus}). Give fewer.")
    Processes(count=devices).check_batches(config.batch_size, config.gradient_accumulation)
    if own_device(device) == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    # What it says of processes that failed, they and the lines below say better.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    started = LaunchConfig(1, 1, devices, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        elastic_launch(started, sys.executable)("-m", "loraflow", *given.arguments)
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            raise typer.Exit(failure.exitcode) from error
        name = signal.Signals(-failure.exitcode).name
        guess = "; for want of memory?" if name == "SIGKILL" else ""
        raise LoraflowError(
            f"Process {rank} of {devices} was killed ({name}{guess}), and the others were stopped. If there is a whole "
            "checkpoint in --output, go on from there with --resume; else start over with --overwrite."
        ) from error
    return True

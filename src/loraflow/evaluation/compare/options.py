"""How a comparison runs: where its cells are measured, and with what."""

from __future__ import annotations

from dataclasses import dataclass

from loraflow.errors import LoraflowError


@dataclass(frozen=True)
class Cluster:
    """A cluster of Ray, and what each cell gets of it.

    Attributes:
        address: of the cluster's head, as `host:port`; "auto" is the cluster that this machine is a part of, "local"
            a new one of this machine alone.
        cell_cpus: processors of a cell; torch has as many threads.
        cell_gpus: of a cell; a part of one, such as 0.5, is shared. None is one where the cluster has any.
        cell_memory_gib: that Ray sets aside for a cell; None sets nothing aside.
        retries: how often a cell is tried again whose worker was lost, because it was killed or its node is gone.
    """

    address: str = "auto"
    cell_cpus: float = 1
    cell_gpus: float | None = None
    cell_memory_gib: float | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        if "://" in self.address:
            raise LoraflowError(
                f"`ray` (={self.address!r}) is an address of Ray's client, which hands on no results as they come. "
                "Start the comparison on a machine of the cluster (`ray job submit` does), with `ray='auto'`."
            )
        if self.cell_cpus <= 0:
            raise LoraflowError(f"`cell_cpus` (={self.cell_cpus:g}) must be greater than 0.")
        if self.cell_gpus is not None and (self.cell_gpus < 0 or (self.cell_gpus > 1 and self.cell_gpus % 1)):
            raise LoraflowError(
                f"`cell_gpus` (={self.cell_gpus:g}) must be a whole number, or a part of one GPU, such as 0.5."
            )
        if self.cell_memory_gib is not None and self.cell_memory_gib <= 0:
            raise LoraflowError(f"`cell_memory_gib` (={self.cell_memory_gib:g}) must be greater than 0.")
        if self.retries < 0:
            raise LoraflowError(f"`retries` (={self.retries}) must be at least 0.")


@dataclass(frozen=True)
class Options:
    """How a comparison runs; none of it changes a score.

    Attributes:
        device: cpu, cuda, ..., or auto (over all GPUs); None is a GPU if there is one.
        workers: processes that measure cells at the same time; with several GPUs, each takes the next one.
        allow_code: whether scorers may run what a model wrote, in the sandbox.
        cluster: where to measure instead of on this machine.
    """

    device: str | None = None
    workers: int = 1
    allow_code: bool = False
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise LoraflowError(f"`workers` (={self.workers}) must be at least 1.")
        if self.cluster is not None and self.workers > 1:
            raise LoraflowError(
                f"`workers` (={self.workers}) are processes of this machine, and a cluster has as many as it has room "
                "for. Leave it out."
            )

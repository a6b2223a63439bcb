"""Measuring cells on a cluster, with Ray: each worker is an actor that has the base loaded, and does job after job.

A worker that sees the run's folder (a file system that the machines share) works in it, as a process of one machine
does: an interrupted fit goes on there. One that does not gets what it needs of the folder with its job and sends back
what came of it, and the comparison writes that. What was lost with a worker is given to another one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import secrets
import shutil
import socket
import tempfile
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import loraflow
from loraflow.errors import LoraflowError
from loraflow.evaluation.compare.comparison import Comparison, check_tasks, difference, identities, open_comparison
from loraflow.evaluation.compare.options import Cluster, Options
from loraflow.evaluation.compare.plan import Plan
from loraflow.evaluation.compare.store import Cell, Store
from loraflow.evaluation.compare.workers import Job, Worker, be_quiet, outcome

MARK_FILE = ".cluster"


def measure_on_cluster(
    comparison: Comparison, jobs: Sequence[Job], store: Store, options: Options, events: Any
) -> None:
    """Let the workers of a cluster do jobs, as many at the same time as it has room for.

    Raises:
        LoraflowError: if there is no such cluster, it has no room, or its workers cannot do such jobs.
    """
    cluster = options.cluster
    assert cluster is not None
    store = Store(store.root.resolve())
    with _connected(cluster) as ray, _marked(store.root) as mark:
        crew = _Crew(ray, comparison, jobs, store, options, events, mark)
        try:
            crew.work()
        finally:
            crew.dismiss()


@contextlib.contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected to a cluster; one that this process is connected to stays so.

    Yields:
        The module.

    Raises:
        LoraflowError: if Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise LoraflowError(f"A cluster needs Ray ({error}): pip install 'loraflow[ray]'") from error
    if ray.is_initialized():
        connected = ray.get_runtime_context().gcs_address
        if cluster.address not in ("auto", connected):
            raise LoraflowError(
                f"`ray` (={cluster.address!r}) is not the cluster that this process is connected to ({connected!r}). "
                "Call `ray.shutdown()` first, or give 'auto'."
            )
        yield ray
        return
    try:
        # What workers have to say comes as events.
        ray.init(cluster.address, log_to_driver=False)
    # Ray raises what it likes, plain `Exception` included.
    except Exception as error:
        raise LoraflowError(
            f"`ray` (={cluster.address!r}): no connection to such a cluster ({error}). Give the `host:port` of its "
            "head, 'auto' on one of its machines, or 'local' for one of this machine alone."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _marked(root: Path) -> Iterator[str]:
    """A sign in the run's folder, by which workers know it.

    Yields:
        The sign.
    """
    mark, path = secrets.token_hex(16), root / MARK_FILE
    path.write_text(mark, encoding="ascii")
    try:
        yield mark
    finally:
        path.unlink(missing_ok=True)


class Member:
    """A worker, on whatever machine of the cluster."""

    def open(self, plan: Plan, options: Options, root: Path, mark: str, version: str) -> tuple[str, bool]:
        """Read the plan.

        Args:
            plan: what is compared.
            options: how.
            root: the run's folder where the comparison runs.
            mark: what it wrote there.
            version: of its library.

        Returns:
            The name of this machine, and whether the run's folder is seen from here.
        """
        with _named_machine():
            return socket.gethostname(), self._open(plan, options, root, mark, version)

    def _open(self, plan: Plan, options: Options, root: Path, mark: str, version: str) -> bool:
        """Read the plan; gives whether the run's folder is seen.

        Raises:
            LoraflowError: if the library is another one.
        """
        be_quiet()
        if version != loraflow.__version__:
            raise LoraflowError(
                f"This machine has loraflow {loraflow.__version__}, and the comparison {version}. Install the same one."
            )
        shared = _content(root / MARK_FILE) == mark
        if not shared:
            self._own = tempfile.TemporaryDirectory(prefix="loraflow-")
            root = Path(self._own.name)
        self._store = Store(root)
        self._comparison = open_comparison(plan, allow_code=options.allow_code)
        check_tasks(self._comparison, options.allow_code)
        self._identities = identities(self._comparison)
        cluster = options.cluster
        assert cluster is not None
        self._threads = max(1, int(cluster.cell_cpus))
        if options.device is None and torch.cuda.device_count() > 1:
            options = dataclasses.replace(options, device="auto")
        self._events = queue.SimpleQueue[Any]()
        self._worker = Worker(self._comparison, self._store, options, self._events)
        self._carries = not shared
        return shared

    def run(self, job: Job, files: Mapping[str, bytes]) -> Iterator[tuple[str, Cell, Any]]:
        """Measure the cells of one job.

        Args:
            job: the cells.
            files: what the run has of them, for one who does not see it.

        Yields:
            Events, as a `Board` listens to them; and before one that ends a cell, `"files"` with what the run is to
            have of it, where that is not seen from here.
        """
        learned = _learned(self._comparison, self._store, next(iter(job)))
        with _named_machine():
            self._check(job)
            if self._carries:
                self._store.unpack(files, learned)
        threading.Thread(target=self._measure, args=(job,), daemon=True).start()
        while (event := self._events.get()) is not None:
            kind, cell, _ = event
            if self._carries and kind in ("done", "failed"):
                yield "files", cell, self._store.pack([cell], learned)
            yield event
        if self._carries:
            for folder in self._store.root.iterdir():
                shutil.rmtree(folder)

    def _check(self, job: Job) -> None:
        """See that the cells are here what they are where the comparison runs.

        Raises:
            LoraflowError: if one would be another measurement.
        """
        for cell, identity in job.items():
            if self._identities[cell] != identity:
                raise LoraflowError(
                    f"{cell} would be measured with another {difference(self._identities[cell], identity)}. The files "
                    "that a plan names must be the same on all machines, under the same paths."
                )

    def _measure(self, job: Job) -> None:
        torch.set_num_threads(self._threads)
        try:
            self._worker.run(job)
        finally:
            self._events.put(None)


@contextlib.contextmanager
def _named_machine() -> Iterator[None]:
    """Errors of this machine, with its name.

    Raises:
        LoraflowError: for each of them.
    """
    try:
        yield
    except Exception as error:
        said = f"{error}" if isinstance(error, LoraflowError) else f"{type(error).__name__}: {error}"
        raise LoraflowError(f"The worker on {socket.gethostname()} cannot measure: {said}") from error


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None


def _learned(comparison: Comparison, store: Store, cell: Cell) -> Path:
    return store.learned_path(cell.method, comparison.learned_on(cell), cell.seed)


@dataclasses.dataclass
class _Seat:
    """A worker as the comparison sees it.

    Attributes:
        actor: Ray's handle.
        host: the machine that it is on; empty until it has begun.
        shared: whether it sees the run's folder.
        job: the cells that it has still to measure.
        cell: the one that it is at.
    """

    actor: Any
    host: str = ""
    shared: bool = False
    job: dict[Cell, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    cell: Cell | None = None


class _Crew:
    """All workers of a run, and the jobs that nobody has yet."""

    def __init__(
        self,
        ray: Any,
        comparison: Comparison,
        jobs: Sequence[Job],
        store: Store,
        options: Options,
        events: Any,
        mark: str,
    ) -> None:
        assert options.cluster is not None
        self._ray, self._comparison, self._store, self._events = ray, comparison, store, events
        self._cluster = options.cluster
        self._needs = _needs(ray, options)
        self._member = ray.remote(Member).options(
            num_cpus=self._needs["CPU"], num_gpus=self._needs["GPU"], memory=self._needs["memory"] or None
        )
        self._orders = (comparison.plan, options, store.root, mark, loraflow.__version__)
        self._waiting = collections.deque(dict(job) for job in jobs)
        self._seats: list[_Seat] = []
        # What each worker is heard by: the end of its beginning, or the stream of its events.
        self._heard: dict[Any, _Seat] = {}
        self._losses: collections.Counter[Cell | None] = collections.Counter()

    def work(self) -> None:
        """Do all jobs."""
        self._hire()
        while self._heard:
            # Who was heard goes to the end, so that nobody talks the others down.
            (source,), _ = self._ray.wait(list(self._heard), num_returns=1)
            self._hear(source, self._heard.pop(source))

    def dismiss(self) -> None:
        """End all workers, whatever they are at."""
        for seat in self._seats:
            self._ray.kill(seat.actor)
        self._seats.clear()

    def _hire(self) -> None:
        """Have as many workers as there are jobs, and room for.

        Raises:
            LoraflowError: if there is no room for one.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(_room(node, self._needs) for node in nodes)
        if not room:
            raise LoraflowError(
                f"No machine of the cluster has what a cell is to get ({_shown(self._needs)}). It has "
                f"{'; '.join(map(_shown, nodes)) or 'none'}. Ask for less, or add a machine."
            )
        while len(self._seats) < min(room, len(self._waiting) + sum(bool(seat.job) for seat in self._seats)):
            seat = _Seat(self._member.remote())
            self._seats.append(seat)
            self._heard[seat.actor.open.remote(*self._orders)] = seat

    def _hear(self, source: Any, seat: _Seat) -> None:
        """Take what a worker says.

        Raises:
            LoraflowError: if it cannot do its job, and another one could not either.
        """
        errors = self._ray.exceptions
        try:
            if seat.host:
                self._take(seat, self._ray.get(next(source)))
                self._heard[source] = seat
            else:
                seat.host, seat.shared = self._ray.get(source)
                self._assign(seat)
        except StopIteration:
            self._assign(seat)
        except errors.RayTaskError as error:
            # That of a machine without the library says so itself.
            raise LoraflowError(str(error.cause)) from error
        except errors.RayError as error:
            self._lose(seat, error)

    def _take(self, seat: _Seat, event: tuple[str, Cell, Any]) -> None:
        kind, seat.cell, value = event
        if kind == "files":
            self._store.unpack(value, _learned(self._comparison, self._store, seat.cell))
            return
        if kind in ("done", "failed"):
            del seat.job[seat.cell]
        self._events.put(event)

    def _assign(self, seat: _Seat) -> None:
        """Give a worker the next job; one that there is none for ends."""
        if not self._waiting:
            self._seats.remove(seat)
            # It has files of its own to remove.
            seat.actor.__ray_terminate__.remote()
            return
        seat.job = self._waiting.popleft()
        seat.cell = next(iter(seat.job))
        files = {}
        if not seat.shared:
            files = self._store.pack(seat.job, _learned(self._comparison, self._store, seat.cell))
        self._heard[seat.actor.run.options(num_returns="streaming").remote(seat.job, files)] = seat
        # Machines may have joined.
        self._hire()

    def _lose(self, seat: _Seat, error: Exception) -> None:
        """Have another worker do what one that is lost was at, unless that was lost too often.

        Raises:
            LoraflowError: if it could not even begin, and others before it neither.
        """
        self._seats.remove(seat)
        self._ray.kill(seat.actor)
        reason = textwrap.shorten(str(error), 600)
        if not seat.host:
            self._losses[None] += 1
            if self._losses[None] > self._cluster.retries:
                raise LoraflowError(
                    f"No worker can begin on the cluster: {self._losses[None]} were lost before they did, the last one "
                    f"so: {reason} See that each machine has loraflow and Ray in the versions of this one."
                )
        self._keep_finished(seat)
        if seat.cell in seat.job:
            self._note_loss(seat, seat.cell, reason)
        if seat.job:
            self._waiting.appendleft(seat.job)
        if self._waiting:
            self._hire()

    def _keep_finished(self, seat: _Seat) -> None:
        """Leave out what a worker had still finished, and could not say."""
        for cell in list(seat.job):
            record = self._store.read(cell)
            if record is not None and (record.weights is not None or not self._comparison.plan.weights):
                del seat.job[cell]
                self._events.put(("done", cell, outcome(record)))

    def _note_loss(self, seat: _Seat, cell: Cell, reason: str) -> None:
        self._losses[cell] += 1
        count, most = self._losses[cell], self._cluster.retries
        if count <= most:
            said = f"the worker on {seat.host} was lost; trying again, {count} of {most}: {reason}"
            self._events.put(("lost", cell, said))
            return
        del seat.job[cell]
        said = f"Its worker was lost {count} times, at last on {seat.host}: {reason} "
        self._events.put(("failed", cell, said + "Give cells more memory, or look at that machine."))


def _needs(ray: Any, options: Options) -> dict[str, float]:
    """What a cell gets, as Ray counts it.

    Raises:
        LoraflowError: if it is to run on a GPU and gets none.
    """
    cluster = options.cluster
    assert cluster is not None
    gpus = cluster.cell_gpus
    if gpus is None:
        gpus = float(options.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    if not gpus and options.device not in (None, "cpu"):
        raise LoraflowError(
            f"`device` (={options.device!r}) is a GPU, and a cell gets none. Give it some by `cell_gpus=1`."
        )
    return {"CPU": cluster.cell_cpus, "GPU": gpus, "memory": int((cluster.cell_memory_gib or 0) * 2**30)}


def _room(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many cells fit on a machine."""
    return min(int(node.get(name, 0) / need + 1e-9) for name, need in needs.items() if need)


def _shown(resources: Mapping[str, float]) -> str:
    memory = resources.get("memory", 0) / 2**30
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, {memory:.1f} GiB"

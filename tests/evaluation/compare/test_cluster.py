"""Cells on a cluster: a Ray of this machine alone, whose workers are killed, or do not see the run's folder."""

from __future__ import annotations

import _thread
import collections
import contextlib
import copy
import dataclasses
import io
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

import loraflow
from loraflow.cli import app
from loraflow.errors import LoraflowError
from loraflow.evaluation.compare import (
    Cluster,
    Options,
    cluster,
    compare,
    identities,
    open_comparison,
    write_report,
)
from loraflow.evaluation.compare.plan import Plan
from loraflow.evaluation.compare.store import Cell, Store
from loraflow.saved.fusion import SavedFusion
from tests.evaluation.compare.small import FLOW, QUICK, small_plan, write_setting

MISSING = "Ray is not installed (pip install 'loraflow[ray]')"
SLOW = {"method": "lora-flow", "fit": {"max_steps": 12, "checkpoint_steps": 2, "batch_size": 2}}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray with room for two cells, on the loopback."""
    ray = pytest.importorskip("ray", reason=MISSING)
    # Sockets have short paths.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's workers would let all else on this machine go first.
        patch.setenv("RAY_worker_niceness", "0")
        try:
            start(ray, folder)
            yield ray
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def start(ray: Any, folder: str) -> None:
    # It gives up after half a minute, which a busy machine may need.
    for attempt in range(4):
        try:
            ray.init(
                num_cpus=2,
                num_gpus=0,
                _memory=2 * 2**30,
                object_store_memory=80 * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                _node_ip_address="127.0.0.2",
                _temp_dir=folder,
            )
            return
        except Exception as error:
            ray.shutdown()
            if attempt == 3 or "timed out" not in str(error):
                raise


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    written = write_setting(tmp_path_factory.mktemp("setting"))
    for task in written["tasks"].values():
        task["max_new_tokens"] = 4
    return written


class _Listener(io.StringIO):
    """What is said, and something that is done the first times that certain words are."""

    def __init__(self, words: str, do: Callable[[], None], times: int = 1) -> None:
        super().__init__()
        self._words, self._do, self._times = words, do, times

    def write(self, text: str) -> int:
        if self._words in text and self._times:
            self._times -= 1
            self._do()
        return super().write(text)


def run(plan: Plan, output: Path, said: io.StringIO | None = None, **options: Any) -> tuple[int, str]:
    """Measure a plan; gives how many cells failed, and what was said."""
    said = said or io.StringIO()
    given = Options(**{"device": "cpu", **options})
    failed = compare(plan, output, options=given, console=Console(file=said, width=300))
    return failed, said.getvalue()


def working() -> list[psutil.Process]:
    """The processes that measure cells at the moment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "Member.run" in "".join(process.cmdline()):
                found.append(process)
    return found


def wait_for(what: Callable[[], Any], why: str) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


def kill_one() -> None:
    for process in working()[:1]:
        process.kill()


def comparable(plan: Plan, output: Path) -> dict[Cell, Any]:
    """All of a run that two machines, or one at two times, have in common."""
    store = Store(output)
    found = {}
    for cell in open_comparison(plan).cells:
        record = store.read(cell)
        assert record is not None, cell
        found[cell] = (
            dataclasses.replace(record, fit_s=0, answer_s=0, memory_mib=0),
            [dataclasses.asdict(item) for item in store.read_items(cell)],
        )
    return found


def scores(plan: Plan, output: Path) -> Any:
    comparison = open_comparison(plan)
    costs = {"fit_s": 0, "tokens_per_s": 0, "memory_mib": 0}
    table = write_report(comparison, Store(output), identities(comparison))
    return [dataclasses.replace(row, **costs) for row in table.rows]


# ---- The same as one machine ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(setting: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A plan, and its run on one machine."""
    rows = {"average": "average", "row": SLOW, "new": {"finetune": "new", "fit": {**QUICK, "r": 2, "alpha": 4}}}
    plan = small_plan(setting, rows, limit=2, tasks=["zh"], weights=True)
    output = tmp_path_factory.mktemp("alone")
    assert run(plan, output)[0] == 0
    return plan, output


def assert_same(plan: Plan, one: Path, other: Path) -> None:
    assert comparable(plan, one) == comparable(plan, other)
    assert scores(plan, one) == scores(plan, other)
    for path in sorted(one.glob("learned/row/*/*/fusion")):
        tensors = SavedFusion.open(other / path.relative_to(one)).tensors
        assert all(torch.equal(tensors[name], value) for name, value in SavedFusion.open(path).tensors.items())
    files = [{str(p.relative_to(root)) for p in root.glob("learned/**/*") if p.is_file()} for root in (one, other)]
    assert files[0] == files[1]


def hide_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no worker take the run's folder for what it is, as one of another machine does not."""

    @contextlib.contextmanager
    def marked(root: Path) -> Iterator[str]:
        yield "none"

    monkeypatch.setattr(cluster, "_marked", marked)


@pytest.mark.parametrize("shared", [True, False])
def test_one_killed_in_mid_cell_changes_nothing(
    ray: Any, alone: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    if not shared:
        hide_the_folder(monkeypatch)
    plan, output = alone
    checkpoints = tmp_path / "learned" / "row" / "zh" / "seed-0" / "checkpoints"

    def kill() -> None:
        if shared:
            wait_for(lambda: list(checkpoints.glob("*/COMPLETE")), "nothing was learned")
        kill_one()

    # One at a time, so that the one that is killed is the one that learns.
    listener = _Listener("row, zh, seed 0: learning", kill)
    failed, said = run(plan, tmp_path, listener, cluster=Cluster(cell_memory_gib=1.5))
    assert failed == 0, said
    assert ("row, zh, seed 0: learning goes on from checkpoint-" in said) == shared
    assert said.count("was lost; trying again, 1 of 2: The actor died unexpectedly") == 1
    assert_same(plan, output, tmp_path)
    assert not (tmp_path / cluster.MARK_FILE).exists()
    assert "3 cells, 3 of them finished before" in run(plan, tmp_path)[1]


def test_a_cell_that_fails_or_is_lost_too_often_stops_no_other(ray: Any, setting: Any, tmp_path: Path) -> None:
    bad = {"finetune": "new", "fit": {**QUICK, "target_modules": ["nowhere"]}}
    plan = small_plan(setting, {"average": "average", "bad": bad, "row": SLOW}, tasks=["zh"], limit=1)
    listener = _Listener("row, zh, seed 0: learning", kill_one, times=2)
    # One at a time, so that the one that is killed is the one that learns.
    failed, said = run(plan, tmp_path, listener, cluster=Cluster(cell_memory_gib=1.5, retries=1))
    assert failed == 2, said
    assert "bad, zh, seed 0: FAILED\nTraceback" in said
    assert "nowhere" in said
    assert "row, zh, seed 0: the worker on " in said
    assert "row, zh, seed 0: FAILED\nIts worker was lost 2 times, at last on " in said
    assert "Give cells more memory, or look at that machine." in said
    assert [cell.method for cell in open_comparison(plan).cells if Store(tmp_path).read(cell)] == ["average"]


def test_an_interrupt_ends_all_workers(ray: Any, setting: Any, tmp_path: Path) -> None:
    plan = small_plan(setting, {"row": SLOW}, tasks=["zh", "es"], limit=1)
    # As in a program of its own: a test before this one may have left another handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path, _Listener("row, zh, seed 0: learning", _thread.interrupt_main), cluster=Cluster())
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: not working(), "a worker outlived its comparison")
    # What was learned so far is there for the next one.
    assert (tmp_path / "learned" / "row" / "zh" / "seed-0" / "identity.json").is_file()


def test_the_command_line_asks_for_a_cluster(ray: Any, setting: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"setting": setting, "methods": ["base"], "tasks": ["zh"]}))
    place = ("--output", str(tmp_path / "run"), "--limit", "1", "--device", "cpu")
    asked = ("--ray", "auto", "--cell-cpus", "1", "--cell-memory", "0.5", "--retries", "0")
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "plan.yaml"), *place, *asked])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "report.json").is_file()
    more = CliRunner().invoke(app, ["compare", str(tmp_path / "plan.yaml"), *place, "--seeds", "3", "--ray", "auto",
                                    "--cell-gpus", "4", "--overwrite", "--limit", "2"])  # fmt: skip
    assert more.exit_code == 1
    assert "No machine of the cluster has what a cell is to get (1 CPUs, 4 GPUs, 0.0 GiB). It has 2 CPUs, 0 GPUs" in (
        " ".join(more.output.split())
    )


# ---- One worker, without Ray ---------------------------------------------------------------------------------------


def opened(plan: Plan, root: Path, mark: str = "none", version: str = loraflow.__version__) -> cluster.Member:
    member = cluster.Member()
    member.open(plan, Options(device="cpu", cluster=Cluster()), root, mark, version)
    return member


def test_a_worker_that_sees_no_folder_carries_everything(setting: Any, tmp_path: Path) -> None:
    plan = small_plan(setting, {"row": FLOW}, tasks=["zh"], limit=1)
    asking = plan.model_copy(update={"weights": True})
    job = identities(open_comparison(plan))
    (cell,) = job
    learned = Store(tmp_path).learned_path("row", "zh", 0)
    (tmp_path / "seen").mkdir()

    def measured(plan: Plan, files: Any) -> list[tuple[str, Cell, Any]]:
        events = list(opened(plan, tmp_path / "seen").run(job, files))
        assert [kind for kind, *_ in events][-2:] == ["files", "done"]
        assert list((tmp_path / "seen").iterdir()) == []
        return events

    first = measured(plan, {})
    assert ("learning", cell, "learning") in first
    Store(tmp_path).unpack(first[-2][2], learned)
    record = Store(tmp_path).read(cell)
    assert record is not None
    # With the answers and the gates at hand, nothing is learned or answered again.
    second = measured(asking, Store(tmp_path).pack(job, learned))
    assert "learning" not in [kind for kind, *_ in second]
    Store(tmp_path).unpack(second[-2][2], learned)
    again = Store(tmp_path).read(cell)
    assert again is not None
    assert again.weights
    assert dataclasses.replace(again, weights=None, chosen=()) == record


def test_what_was_learned_is_replaced_whole(tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    learned = [store.learned_path("row", "zh", 0) for store in (here, there)]
    for folder, name in ((learned[0], "old"), (learned[1], "new")):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / name).write_bytes(name.encode())
    here.unpack(there.pack([], learned[1]), learned[0])
    assert [path.name for path in learned[0].rglob("*") if path.is_file()] == ["new"]
    here.unpack({}, learned[0])
    assert not learned[0].exists()


def test_a_machine_with_other_files_or_another_library_is_named(setting: Any, tmp_path: Path) -> None:
    changed = copy.deepcopy(setting)
    test = Path(setting["tasks"]["zh"]["test"])
    changed["tasks"]["zh"]["test"] = str(tmp_path / test.name)
    shutil.copy(test, tmp_path)
    plan = small_plan(changed, ["base"], tasks=["zh"])
    job = identities(open_comparison(plan))
    with pytest.raises(LoraflowError, match=r"The worker on .* cannot measure: This machine has loraflow .* 0\.0\.0"):
        opened(plan, tmp_path, version="0.0.0")
    (tmp_path / test.name).write_text("".join(test.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(
        LoraflowError, match=r"worker on .* base, zh would be measured with another `problems`: .* same"
    ):
        list(opened(plan, tmp_path).run(job, {}))
    (tmp_path / test.name).unlink()
    with pytest.raises(LoraflowError, match=r"The worker on .* cannot measure: The task 'zh', `test`: .*zh-test"):
        opened(plan, tmp_path)


# ---- Ray itself ----------------------------------------------------------------------------------------------------


def test_ray_is_loaded_by_those_who_ask_for_it() -> None:
    code = "import sys, loraflow.evaluation.compare.cluster, loraflow.cli; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


class _RayError(Exception):
    pass


class _RayTaskError(_RayError):
    cause: Exception


FOUR_CPUS = ({"CPU": 4.0},)


class _Fake:
    """Ray, as far as the comparison knows it; all workers end with an error as they begin."""

    exceptions = types.SimpleNamespace(RayError=_RayError, RayTaskError=_RayTaskError)

    def __init__(self, connected: bool = True, nodes: Any = FOUR_CPUS, error: Exception | None = None) -> None:
        self._connected, self._nodes, self._error = connected, nodes, error
        self.begun: list[dict[str, Any]] = []
        self.killed = 0

    def is_initialized(self) -> bool:
        return self._connected

    def init(self, address: str, **_: Any) -> None:
        raise ConnectionError("nobody answers")

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(gcs_address="10.0.0.1:6379")

    def cluster_resources(self) -> dict[str, float]:
        return dict(sum((collections.Counter(node) for node in self._nodes), collections.Counter()))

    def nodes(self) -> list[Any]:
        return [{"Alive": True, "Resources": node} for node in self._nodes]

    def remote(self, kind: type) -> Any:
        def begin(**options: Any) -> Any:
            self.begun.append(options)
            return types.SimpleNamespace(open=types.SimpleNamespace(remote=lambda *_: object()))

        return types.SimpleNamespace(options=lambda **options: types.SimpleNamespace(remote=lambda: begin(**options)))

    def wait(self, sources: list[Any], num_returns: int) -> Any:
        return sources[:1], sources[1:]

    def get(self, source: Any) -> Any:
        assert self._error is not None
        raise self._error

    def kill(self, actor: Any) -> None:
        self.killed += 1


@pytest.fixture
def measure(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Measure three rows on a cluster that is none."""
    plan = small_plan(setting, ["base", "average", "math"], tasks=["zh"], limit=1)

    def measure(fake: Any, device: str | None = None, **given: Any) -> None:
        monkeypatch.setitem(sys.modules, "ray", fake)
        run(plan, tmp_path, device=device, cluster=Cluster(**given))

    return measure


def test_a_cluster_that_cannot_be_used_says_why(measure: Callable[..., None]) -> None:
    said = (
        r"`ray` \(='1.2.3.4:5'\): no connection to such a cluster \(nobody answers\). Give the `host:port` of its head"
    )
    with pytest.raises(LoraflowError, match=said):
        measure(_Fake(connected=False), address="1.2.3.4:5")
    with pytest.raises(
        LoraflowError, match=r"`ray` \(='1.2.3.4:5'\) is not the cluster that this process is connected"
    ):
        measure(_Fake(), address="1.2.3.4:5")
    with pytest.raises(LoraflowError, match=r"A cluster needs Ray \(.*\): pip install 'loraflow\[ray\]'"):
        measure(None)
    with pytest.raises(
        LoraflowError, match=r"`device` \(='cuda'\) is a GPU, and a cell gets none. Give it some by `cell"
    ):
        measure(_Fake(), device="cuda")
    with pytest.raises(
        LoraflowError, match=r"No machine .* \(8 CPUs, 0 GPUs, 0.0 GiB\). It has 4 CPUs, 0 GPUs, 0.0 GiB"
    ):
        measure(_Fake(), cell_cpus=8)


def test_workers_that_never_begin_are_tried_so_often(measure: Callable[..., None]) -> None:
    fake = _Fake(error=_RayError("no\n such thing"))
    said = (
        r"No worker can begin on the cluster: 3 were lost before they did, the last one so: no such thing See that each"
    )
    with pytest.raises(LoraflowError, match=said):
        measure(fake)
    assert len(fake.begun) == 5
    assert fake.killed == 5


def test_an_error_of_a_worker_is_the_comparisons(measure: Callable[..., None]) -> None:
    error = _RayTaskError("a traceback")
    error.cause = LoraflowError("The worker on x cannot measure: nothing")
    fake = _Fake(error=error)
    with pytest.raises(LoraflowError, match=r"^The worker on x cannot measure: nothing$"):
        measure(fake)
    assert fake.killed == 3


@pytest.mark.parametrize(
    ("nodes", "given", "workers", "gets"),
    [
        (({"CPU": 4.0},), {}, 3, (1, 0, None)),
        (({"CPU": 4.0},), {"cell_cpus": 2}, 2, (2, 0, None)),
        (({"CPU": 1.0}, {"CPU": 3.0}), {"cell_cpus": 2}, 1, (2, 0, None)),
        (({"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}), {}, 1, (1, 1, None)),
        (({"CPU": 4.0, "GPU": 1.0},), {"cell_gpus": 0.5}, 2, (1, 0.5, None)),
        (({"CPU": 4.0, "memory": 5.0 * 2**30},), {"cell_memory_gib": 2.5}, 2, (1, 0, 5 * 2**29)),
    ],
)
def test_there_are_as_many_workers_as_there_is_room_for(
    measure: Callable[..., None], nodes: Any, given: Any, workers: int, gets: Any
) -> None:
    error = _RayTaskError()
    error.cause = LoraflowError("enough")
    fake = _Fake(nodes=nodes, error=error)
    with pytest.raises(LoraflowError, match="enough"):
        measure(fake, **given)
    options = dict(zip(("num_cpus", "num_gpus", "memory"), gets, strict=True))
    assert fake.begun == [options] * workers


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"address": "ray://head:10001"}, r"`ray` \(='ray://head:10001'\) is an address of Ray's client"),
        ({"cell_cpus": 0}, r"`cell_cpus` \(=0\) must be greater than 0\."),
        ({"cell_gpus": -1}, r"`cell_gpus` \(=-1\) must be a whole number, or a part of one GPU, such as 0\.5\."),
        ({"cell_gpus": 1.5}, r"`cell_gpus` \(=1\.5\) must be a whole number"),
        ({"cell_memory_gib": 0}, r"`cell_memory_gib` \(=0\) must be greater than 0\."),
        ({"retries": -1}, r"`retries` \(=-1\) must be at least 0\."),
    ],
)
def test_what_a_cell_gets_is_checked(given: Any, said: str) -> None:
    with pytest.raises(LoraflowError, match=said):
        Cluster(**given)


def test_workers_are_of_one_machine() -> None:
    with pytest.raises(
        LoraflowError, match=r"`workers` \(=2\) are processes of this machine, and a cluster has as many"
    ):
        Options(workers=2, cluster=Cluster())

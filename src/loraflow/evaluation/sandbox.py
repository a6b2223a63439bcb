r"""Running generated programs against their tests, so that nothing outside can come to harm.

Each program gets an interpreter of its own (`jail.py`) that sees an empty folder in memory and, read-only, Python's and
the system's libraries, and nothing else: no network, no environment, no other process, no other file. Started by root,
it runs as a user that owns nothing; started by anybody else, as that user without a way out. It stays within its
`Limits`, and what it prints is thrown away. When it ends, or its time does, the kernel ends whatever it has started.

The kernel itself is shared, so this is a fence against programs that go wrong, not against an attack on the kernel.
Linux 5.12 or later is needed, and either root or user namespaces.

```python
from loraflow.evaluation import run_tests

result = run_tests("def double(x):\n    return 2 * x", ["assert double(2) == 4"])
assert result.passed
```
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from loraflow.errors import DataError, SandboxError

Reason = Literal["passed", "failed", "error", "timeout", "ended-early"]

JAIL = Path(__file__).with_name("jail.py")
REMEDY = (
    "Generated code is run on Linux 5.12 or later only, by root with CAP_SYS_ADMIN or by a user who may create user "
    "namespaces (see `sysctl user.max_user_namespaces kernel.unprivileged_userns_clone "
    "kernel.apparmor_restrict_unprivileged_userns`). In a container, add `--cap-add SYS_ADMIN --security-opt "
    "seccomp=unconfined --security-opt apparmor=unconfined`, or leave out the scorers that run code."
)
# The interpreter's start and end on a machine under load; the job's own time is kept inside.
GRACE_S = 30.0
MEMORY_MIN_MIB = 64

PROBE = """
import os, socket
user = os.getuid()
names = [name for _, name in socket.if_nameindex()]
def can_write(path):
    try:
        open(path, "w").close()
        return True
    except OSError:
        return False
"""
PROBE_TESTS = (
    "assert user != 0, 'still root'",
    "assert names in ([], ['lo']), f'network interfaces {names}'",
    "assert not can_write('/escaped'), 'the root folder is writable'",
    "assert not os.path.exists('/proc/1'), '/proc is visible'",
)


@dataclass(frozen=True)
class Limits:
    """What one program may use. Memory and CPU time count per process, so their worst case is that times `processes`.

    Attributes:
        wall_s: seconds from its first line to its last test.
        cpu_s: seconds of computing in one process, rounded up to whole seconds.
        memory_mib: address space of one process.
        processes: processes and threads at the same time.
        file_mib: all files in its folder together; they live in memory.
        open_files: open files of one process.
    """

    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_mib: int = 512
    processes: int = 8
    file_mib: int = 8
    open_files: int = 64

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SandboxError: if one is not positive, or too small for an interpreter.
        """
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise SandboxError(f"`{name}` (={value}) must be positive.")
        if self.memory_mib < MEMORY_MIN_MIB:
            raise SandboxError(
                f"`memory_mib` (={self.memory_mib}) must be at least {MEMORY_MIN_MIB}, which Python needs for itself."
            )


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class ExecutionResult:
    """How one program fared.

    Attributes:
        reason: "passed", "failed" (a test raised), "error" (the program raised before the tests), "timeout", or
            "ended-early" (it exited or was killed before the last test).
        detail: one line for people; empty when passed. Text from an untrusted program.
    """

    reason: Reason
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether every test ran and held."""
        return self.reason == "passed"


def check_available() -> None:
    """Prove with a harmless program that this machine can run generated code safely.

    Raises:
        SandboxError: if it cannot; the message says why and what to do.
    """
    result = run_tests(PROBE, PROBE_TESTS)
    if not result.passed:
        raise SandboxError(f"The sandbox does not hold here: {result.reason}, {result.detail}. {REMEDY}")


def run_tests(code: str, tests: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> ExecutionResult:
    """Run a program, then its tests, in a sandbox of its own.

    Args:
        code: Python source. Its `__name__` is not `"__main__"`, its standard input is empty, and it can import the
            standard library only.
        tests: statements that run one after the other in the program's namespace; one that raises has failed.
        limits: what it may use.

    Returns:
        The verdict; a program that misbehaves gives one too and raises nothing here.

    Raises:
        DataError: if there are no tests, or one of them is not Python.
        SandboxError: if this machine cannot run it safely.
    """
    check_tests(tests)
    with tempfile.TemporaryDirectory(prefix="loraflow-sandbox-") as root:
        job = {"code": code, "tests": list(tests), "limits": dataclasses.asdict(limits), "root": root}
        verdict = _start_jail(job, limits.wall_s + GRACE_S)
    if verdict["reason"] == "setup":
        raise SandboxError(f"Generated code cannot be run safely here: {verdict['detail']}. {REMEDY}")
    return ExecutionResult(cast(Reason, verdict["reason"]), verdict["detail"])


def check_tests(tests: Sequence[str]) -> None:
    """Check tests as `run_tests` would, without running anything.

    Raises:
        DataError: if there are no tests, or one of them is not Python.
    """
    several = isinstance(tests, Sequence) and not isinstance(tests, str) and len(tests) > 0
    if not several or not all(isinstance(test, str) for test in tests):
        raise DataError(f"`tests` (={tests!r}) must be a list of at least one statement.")
    for position, test in enumerate(tests):
        try:
            # By its tree, as the jail does: that is deeper than the text alone.
            compile(ast.parse(test), f"<test {position}>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise DataError(
                f"`tests[{position}]` (={test!r}) is not Python: {error}. Correct the test; no program could pass it."
            ) from error


def run_many(
    programs: Iterable[tuple[str, Sequence[str]]], limits: Limits = DEFAULT_LIMITS, workers: int | None = None
) -> list[ExecutionResult]:
    """Run many programs, several at a time.

    Args:
        programs: pairs of code and tests, see `run_tests`.
        limits: what each of them may use.
        workers: how many run at the same time; one per CPU of this process if None. Their `wall_s` is real time,
            so more workers than CPUs make slow programs fail.

    Returns:
        The verdicts, in the programs' order.

    Raises:
        SandboxError: if `workers` is not positive, or this machine cannot run them safely.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if workers < 1:
        raise SandboxError(f"`workers` (={workers}) must be at least 1.")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
    try:
        return list(pool.map(lambda program: run_tests(program[0], program[1], limits), programs))
    finally:
        pool.shutdown(cancel_futures=True)


def _start_jail(job: Mapping[str, object], timeout_s: float) -> dict[str, str]:
    """Run one job in a new interpreter and return what the jail says of it.

    Raises:
        SandboxError: if this is not Linux, or the jail gives no answer.
    """
    if sys.platform != "linux":
        raise SandboxError(f"Generated code cannot be run safely on this platform (={sys.platform!r}). {REMEDY}")
    # As text after -c, so that no folder of this machine is on the program's import path. -I would be stricter still,
    # but ignores the hash seed, and a program that iterates over a set must give the same verdict every time.
    command = [sys.executable, "-s", "-S", "-B", "-X", "utf8", "-c", JAIL.read_text(encoding="utf-8")]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job).encode(),
            capture_output=True,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
            timeout=timeout_s,
            check=False,
        )
        verdict: dict[str, str] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"The sandbox gave no answer in {timeout_s:g} s. Is this machine overloaded?") from error
    except json.JSONDecodeError as error:
        message = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise SandboxError(f"The sandbox failed to start: {message[-1]}. {REMEDY}") from error
    return verdict

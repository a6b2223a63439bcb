"""The sandbox lets good programs pass, and nothing out.

Every program here is bounded and harmless: should the sandbox fail to hold it, a test fails and nothing else happens.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraflow.errors import DataError, SandboxError
from loraflow.evaluation import jail, sandbox
from loraflow.evaluation.sandbox import ExecutionResult, Limits, check_available, run_many, run_tests

DOUBLE = "def double(x):\n    return 2 * x\n"
DOUBLE_TESTS = ["assert double(2) == 4", "assert double('a') == 'aa'"]


@pytest.fixture(scope="module")
def works() -> None:
    """Skip where the kernel refuses to build a sandbox; one that is built and leaks must fail."""
    try:
        run_tests(DOUBLE, DOUBLE_TESTS)
    except SandboxError as error:
        if "cannot be run safely here" not in str(error):
            raise
        pytest.skip(str(error))


def processes_named(name: str) -> list[str]:
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            found.append(comm.read_text().strip())
        except OSError:  # it has just ended
            continue
    return [each for each in found if each == name]


# ------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.usefixtures("works")
@pytest.mark.parametrize(
    ("code", "reason", "detail"),
    [
        pytest.param(DOUBLE, "passed", "", id="passes"),
        pytest.param(DOUBLE.replace("\n", "\r\n"), "passed", "", id="passes with Windows line ends"),
        pytest.param(
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n" + DOUBLE,
            "passed",
            "",
            id="dataclass that looks its module up",
        ),
        pytest.param("import collections, decimal, hashlib, ssl, threading\n" + DOUBLE, "passed", "", id="stdlib"),
        pytest.param(
            "def double(x):\n    return x", "failed", "AssertionError in assert double(2) == 4", id="wrong answer"
        ),
        pytest.param("def triple(x):\n    return x", "failed", "NameError: name 'double' is not", id="wrong name"),
        pytest.param("def double(x:", "error", "SyntaxError: '(' was never closed", id="syntax error"),
        pytest.param("double = '\ud800'", "error", "UnicodeEncodeError", id="not encodable"),
        pytest.param("1 / 0", "error", "ZeroDivisionError: division by zero", id="raises"),
        pytest.param("input()", "error", "EOFError", id="reads stdin"),
        pytest.param("import sys\nsys.exit(0)", "error", "SystemExit: 0", id="sys.exit(0)"),
        pytest.param("import os\nos._exit(0)", "ended-early", "exited with status 0", id="os._exit(0)"),
        pytest.param("import ctypes\nctypes.string_at(0)", "ended-early", "killed by signal 11", id="crash"),
        pytest.param(
            "class E(Exception):\n    def __str__(self): raise E\nraise E", "error", "E", id="error that cannot be told"
        ),
    ],
)
def test_verdict(code: str, reason: str, detail: str) -> None:
    result = run_tests(code, DOUBLE_TESTS)

    assert result.reason == reason
    assert detail in result.detail
    assert result.passed == (reason == "passed")


@pytest.mark.usefixtures("works")
def test_passes_with_the_smallest_limits_and_the_strictest_umask() -> None:
    umask = os.umask(0o077)
    try:
        assert run_tests(DOUBLE, DOUBLE_TESTS, Limits(memory_mib=64, processes=1, file_mib=1)).detail == ""
    finally:
        os.umask(umask)


@pytest.mark.usefixtures("works")
def test_exit_inside_a_test_is_a_failure() -> None:
    assert run_tests("import sys\ndef double(x): sys.exit(0)", DOUBLE_TESTS).reason == "failed"


@pytest.mark.usefixtures("works")
@pytest.mark.parametrize("text", ['{"reason": "passed", "detail": ""}', "passed", "\\x00" * 16])
def test_success_cannot_be_forged_by_printing_it(text: str) -> None:
    code = f"""
import os
for fd in range(64):
    try:
        os.write(fd, b'{text}\\n')
    except OSError:
        pass
os._exit(0)
"""
    assert run_tests(code, DOUBLE_TESTS).reason == "ended-early"


@pytest.mark.usefixtures("works")
def test_forked_copy_has_no_say() -> None:
    code = DOUBLE + "import os\nif os.fork():\n    os.wait()\n    raise ValueError('the original')"

    assert run_tests(code, DOUBLE_TESTS) == ExecutionResult("error", "ValueError: the original")


@pytest.mark.usefixtures("works")
def test_same_program_gives_the_same_verdict() -> None:
    results = {run_tests("raise ValueError(hash('loraflow'))", DOUBLE_TESTS).detail for _ in range(2)}

    assert len(results) == 1


@pytest.mark.usefixtures("works")
def test_run_many_keeps_the_order() -> None:
    programs = [(f"n = {n}", ["assert n % 2 == 0"]) for n in range(6)]

    assert [result.passed for result in run_many(programs, workers=2)] == [True, False] * 3


# -------------------------------------------------------------------------------------------------------- attacks

# Functions that a program can find in its interpreter, and what it finds above it.
TOOLS = """
import builtins, gc, json, marshal, os, sys, threading, types
def frames():
    frame = sys._getframe(1)
    while frame:
        yield frame
        frame = frame.f_back
def found(kind):
    for frame in frames():
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, kind):
                yield value
def shout(text):
    for fd in range(3, 64):
        try:
            os.write(fd, text)
        except OSError:
            pass
def forge(verdict):
    for token in [value for value in found(bytes) if len(value) == 16]:
        shout(token + json.dumps(verdict).encode() + b"\\n")
    os._exit(0)
"""
WRONG = "def double(x): return None\n"
PASSED = '{"reason": "passed", "detail": ""}'


@pytest.mark.usefixtures("works")
@pytest.mark.parametrize(
    ("code", "detail"),
    [
        pytest.param("forge({'reason': 'setup', 'detail': 'no'})", "", id="verdict: setup"),
        pytest.param("forge({'reason': 'invalid-test', 'detail': 'no'})", "", id="verdict: invalid test"),
        pytest.param("forge({'reason': 'passed', 'detail': ''})", "", id="verdict: passed"),
        pytest.param("forge([])", "", id="verdict: a list"),
        pytest.param("forge({'detail': 1})", "", id="verdict: without a reason"),
        pytest.param("forge(7)", "", id="verdict: a number"),
        pytest.param(
            "for values in list(found(list)): values.clear()", "AssertionError", id="clears lists of the frames"
        ),
        pytest.param(
            "for values in gc.get_objects():\n"
            "    if type(values) is list and values and isinstance(values[0], (str, types.CodeType)): values.clear()",
            "AssertionError",
            id="clears all lists",
        ),
        pytest.param(
            "builtins.zip = lambda *_, **__: ()\nbuiltins.exec = builtins.compile = lambda *_, **__: None",
            "AssertionError",
            id="builtins",
        ),
        pytest.param(
            f"json.dumps = lambda *_: {PASSED!r}\nmarshal.load = lambda *_: None\njudge = lambda *_: {PASSED}\n"
            "for frame in frames():\n    for name in ('judge', 'obey', 'describe'): frame.f_globals[name] = judge",
            "",
            id="json, marshal and the jail's own functions",
        ),
        pytest.param(
            f"real = os.write\nos.write = lambda fd, text: real(fd, text[:16] + b'{PASSED}\\n')",
            "AssertionError",
            id="os.write",
        ),
        pytest.param("os.getpid = lambda: 2\nos._exit = print", "AssertionError", id="os.getpid and os._exit"),
        pytest.param(
            "for frame in frames():\n    frame.f_globals.update(DETAIL_MAX_CHARS=0, RAISED=b'', MARK_NAME='planted')\n"
            "planted = found(bytes)",
            "",
            id="the jail's constants",
        ),
        pytest.param(
            "def jump(frame, event, _):\n"
            "    if event == 'line' and 'test' in frame.f_locals: frame.f_lineno += 1\n"
            "    return jump\n"
            "for frame in frames():\n"
            "    if frame.f_code.co_name in ('judge', 'obey'): frame.f_trace = jump\n"
            "sys.settrace(jump)",
            "",
            id="jumps over the lines that run the tests",
        ),
        pytest.param("builtins.BaseException = ZeroDivisionError", "", id="exceptions that are not caught"),
        pytest.param("builtins.AssertionError = Warning", "AssertionError", id="assertions of another class"),
        pytest.param("for text in list(found(bytes)): shout(text)\nos._exit(0)", "", id="says what the jail would say"),
        pytest.param(
            "def flood():\n    while True: shout(bytes(16))\n"
            "threading.Thread(target=flood, daemon=True).start()\nthreading.Event().wait(1)",
            "",
            id="floods from a thread",
        ),
        pytest.param("def double(x):\n    forge({'reason': 'passed', 'detail': ''})", "", id="forges inside a test"),
        pytest.param(
            "def double(x):\n    if x != 2: os._exit(0)\n    return 4", "exited with status 0", id="exits late"
        ),
        pytest.param("os.closerange(3, 64)", "", id="closes the channel"),
        pytest.param("globals()['<mark>'] = bytes(16)", "AssertionError", id="plants a mark"),
    ],
)
def test_attack_on_the_verdict_is_a_failure(code: str, detail: str) -> None:
    result = run_tests(TOOLS + WRONG + code, DOUBLE_TESTS)

    assert result.reason in ("failed", "error", "ended-early")
    assert detail in result.detail
    assert result.detail


@pytest.mark.usefixtures("works")
@pytest.mark.parametrize("where", ["", "def double(x):\n    "])
def test_silent_channel_does_not_outlast_the_time(where: str) -> None:
    code = f"{TOOLS}{where}for _ in iter(int, 1): found(bytes)\n"

    assert run_tests(code, DOUBLE_TESTS, Limits(wall_s=0.5)).reason == "timeout"


@pytest.mark.usefixtures("works")
def test_tests_are_not_there_before_they_are_run() -> None:
    code = TOOLS + "seen = [value for value in gc.get_objects() if 'secret' in str(value)[:9999]]"
    code += "\nseen = [value for value in seen if 'secret' + ' test' in str(value)]"

    assert run_tests(code, ["assert not seen, seen  # secret test"]).detail == ""


@pytest.mark.usefixtures("works")
def test_test_leaves_nothing_behind() -> None:
    tests = ["x = 1", "from __future__ import annotations\ny: x = 2", "assert [n for n in vars() if 'mark' in n] == []"]

    assert run_tests("", tests).detail == ""


# --------------------------------------------------------------------------------------------------------- limits


@pytest.mark.usefixtures("works")
@pytest.mark.parametrize(
    ("code", "limits", "detail"),
    [
        ("import time\ntime.sleep(20)", Limits(wall_s=0.3), "ran longer than wall_s = 0.3 s"),
        ("for _ in range(10**10): pass", Limits(wall_s=20, cpu_s=1), "computed longer than cpu_s = 1 s"),
        (
            "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(20)",
            Limits(wall_s=0.3),
            "ran longer than wall_s",
        ),
    ],
)
def test_time_is_limited(code: str, limits: Limits, detail: str) -> None:
    result = run_tests(code, DOUBLE_TESTS, limits)

    assert result.reason == "timeout"
    assert detail in result.detail


@pytest.mark.usefixtures("works")
def test_memory_is_limited() -> None:
    # Zeroed pages that are never touched: should the limit not hold, no memory is used.
    result = run_tests("hog = bytearray(1 << 30)", DOUBLE_TESTS, Limits(memory_mib=128))

    assert result == ExecutionResult("error", "MemoryError")


@pytest.mark.usefixtures("works")
def test_processes_are_limited_and_none_survives() -> None:
    name = f"lf-{os.getpid()}"
    code = f"""
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b"{name}", 0, 0, 0)
count = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(5)
            os._exit(0)
        count += 1
    except BlockingIOError:
        pass
"""
    assert run_tests(code, ["assert 1 <= count < 8, count"], Limits(processes=8)).detail == ""
    assert processes_named(name) == []


@pytest.mark.usefixtures("works")
def test_files_are_limited_and_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = """
import os
start = os.listdir()
open("note", "w").write("kept")
error = None
try:
    for n in range(4):
        open(f"big-{n}", "wb").write(bytes(1 << 19))
except OSError as caught:
    error = caught
"""
    tests = ["assert start == []", "assert open('note').read() == 'kept'", "assert error is not None"]

    assert run_tests(code, tests, Limits(file_mib=1)).detail == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("works")
def test_output_is_thrown_away(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys\nfor _ in range(50):\n    print('x' * 1_000_000)\n    print('x' * 1_000_000, file=sys.stderr)\n"

    assert run_tests(code + DOUBLE, DOUBLE_TESTS).passed
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("works")
def test_flood_of_the_verdict_channel_ends_the_program() -> None:
    code = """
import os
for fd in range(3, 64):
    try:
        for _ in range(100):
            os.write(fd, bytes(10_000))
    except OSError:
        pass
"""
    assert run_tests(code + DOUBLE, DOUBLE_TESTS).reason == "ended-early"


# ------------------------------------------------------------------------------------------------------ isolation


@pytest.mark.usefixtures("works")
def test_available_where_it_works() -> None:
    check_available()


@pytest.mark.usefixtures("works")
def test_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLOW_SECRET", "do not tell")
    tests = ["assert dict(os.environ) == {}, os.environ", "assert not os.path.exists('/proc/self')"]

    assert run_tests("import os", tests).detail == ""


@pytest.mark.usefixtures("works")
def test_nothing_outside_can_be_read_or_written() -> None:
    with tempfile.TemporaryDirectory() as folder:
        secret, target = Path(folder, "secret"), Path(folder, "target")
        secret.write_text("do not tell")
        for path in (Path(folder), secret):
            path.chmod(0o777)
        code = f"""
import os
def fails(path, mode):
    try:
        open(path, mode).close()
    except OSError:
        return True
paths = {[str(secret), str(target), "/etc/passwd", "/target", os.__file__, __file__]!r}
"""
        tests = [
            "assert [path for path in paths if not fails(path, 'w')] == []",
            "assert fails(paths[0], 'r') and fails('/etc/passwd', 'r')",
            "assert os.getuid() != 0 and os.getgid() != 0",
            "assert os.statvfs(os.__file__).f_flag & os.ST_RDONLY and os.statvfs('/').f_flag & os.ST_RDONLY",
        ]

        assert run_tests(code, tests).detail == ""
        assert secret.read_text() == "do not tell"
        assert not target.exists()


@pytest.mark.usefixtures("works")
def test_privileges_cannot_be_regained() -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None)
def refused(call, *values):
    try:
        call(*values)
    except OSError:
        return True
"""
    tests = [
        "assert refused(os.setuid, 0)",
        "assert refused(os.chroot, '.')",
        "assert libc.unshare(0x10000000) == -1",
        "assert libc.mount(b'tmpfs', b'/work', b'tmpfs', 0, None) == -1",
    ]

    assert run_tests(code, tests).detail == ""


@pytest.mark.usefixtures("works")
def test_network_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        code = f"""
import socket
error = None
try:
    socket.create_connection(("127.0.0.1", {listener.getsockname()[1]}), timeout=2).close()
except OSError as caught:
    error = caught
"""
        assert run_tests(code, ["assert error is not None"]).detail == ""
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.fixture
def public_folder() -> Iterator[str]:
    """A folder that any user may enter; pytest's own are for one user only."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    yield folder
    os.rmdir(folder)


@pytest.mark.usefixtures("works")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="all other tests show it when not root")
def test_holds_without_root_too(public_folder: str) -> None:
    """The jail alone, started by a user who is not root with a Python that this user can start."""
    nobody = 54321
    pythons = [sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable]
    command = ["-s", "-S", "-B", "-c", sandbox.JAIL.read_text(encoding="utf-8")]
    job = {
        # Signal 9 to its process group must not reach the warden, who has the same user id here.
        "code": "import os\nos.kill(0, 9)\n" + sandbox.PROBE,
        "tests": [f"assert user == {nobody}", *sandbox.PROBE_TESTS],
        "limits": {**vars(Limits())},
        "root": public_folder,
    }
    for python in pythons:
        try:
            done = subprocess.run(
                [python, *command],
                input=json.dumps(job).encode(),
                capture_output=True,
                cwd="/",
                env={},
                user=nobody,
                group=nobody,
                extra_groups=[],
                start_new_session=True,
                timeout=60,
                check=False,
            )
        except PermissionError:
            continue
        verdict = json.loads(done.stdout)
        if verdict["reason"] == "setup":
            pytest.skip(f"user namespaces are not allowed here: {verdict['detail']}")
        assert verdict == {"reason": "passed", "detail": ""}
        return
    pytest.skip("no Python here that a user other than root can start")


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("tests", [[], "assert True", ["assert True", 1]])
def test_tests_must_be_a_list_with_something_in_it(tests: list[str]) -> None:
    with pytest.raises(DataError, match=r"`tests` \(=.*\) must be a list of at least one statement\."):
        run_tests(DOUBLE, tests)


@pytest.mark.usefixtures("works")
def test_test_that_is_no_python_is_the_callers_error() -> None:
    with pytest.raises(DataError, match=r"`tests\[1\]` \(='assert \('\) is not Python: .*Correct the test"):
        run_tests(DOUBLE, ["assert True", "assert ("])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wall_s": 0}, r"`wall_s` \(=0\) must be positive\."),
        ({"processes": -1}, r"`processes` \(=-1\) must be positive\."),
        ({"memory_mib": 8}, r"`memory_mib` \(=8\) must be at least 64"),
    ],
)
def test_limits_are_checked(values: dict[str, int], message: str) -> None:
    with pytest.raises(SandboxError, match=message):
        Limits(**values)


def test_workers_are_checked() -> None:
    with pytest.raises(SandboxError, match=r"`workers` \(=0\) must be at least 1\."):
        run_many([], workers=0)


def test_refused_on_other_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(SandboxError, match=r"on this platform \(='darwin'\)\. Generated code is run on Linux"):
        run_tests(DOUBLE, DOUBLE_TESTS)


@pytest.mark.parametrize(
    ("jail_text", "message"),
    [
        ("raise OSError('no such luck')", r"failed to start: OSError: no such luck\. .*sysctl"),
        ("raise SystemExit(3)", r"failed to start: exit status 3\."),
        ("""print('{"reason": "setup", "detail": "unshare"}')""", r"cannot be run safely here: unshare\. .*--cap-add"),
        ("import time\ntime.sleep(20)", r"gave no answer in 0\.3 s"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="refused before the jail is started")
def test_jail_that_cannot_be_built(
    jail_text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "jail.py"
    broken.write_text(jail_text)
    monkeypatch.setattr(sandbox, "JAIL", broken)
    monkeypatch.setattr(sandbox, "GRACE_S", 0.2 if "sleep" in jail_text else 30)
    with pytest.raises(SandboxError, match=message):
        run_tests(DOUBLE, DOUBLE_TESTS, Limits(wall_s=0.1))


def test_check_available_names_what_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "run_tests", lambda *_: ExecutionResult("failed", "AssertionError: still root"))
    with pytest.raises(SandboxError, match=r"does not hold here: failed, AssertionError: still root\. "):
        check_available()


def test_user_ids_are_strange_and_distinct() -> None:
    whole_machine = jail.own_id_span("         0          0 4294967295\n")
    container = jail.own_id_span("0 1000 1\n1 100000 65536\n")

    assert (whole_machine, container) == (4294967295, 65537)
    for span in (whole_machine, container):
        ids = {jail.stranger_id(span, pid) for pid in range(1, 30_000)}
        assert len(ids) == 29_999
        assert 30_000 < min(ids) < max(ids) < span - 2
    with pytest.raises(OSError, match="root here owns only 1 user ids, 65536 are needed"):
        jail.stranger_id(1, 1)


def test_failed_c_call_is_an_error() -> None:
    with pytest.raises(OSError, match="'mount /nowhere'"):
        jail.checked(-1, "mount /nowhere")


def test_memory_outside_of_processes_is_forbidden():
    code = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)

def refused(call, *args):
    return call(*args) == -1 and ctypes.get_errno() == errno.EPERM

def memfd():
    try:
        os.close(os.memfd_create("x"))
    except PermissionError:
        return True
"""
    tests = [
        "assert refused(libc.shmget, 0, 1 << 20, 0o1600)",
        "assert refused(libc.semget, 0, 1, 0o1600)",
        "assert refused(libc.msgget, 0, 0o1600)",
        "assert memfd()",
    ]
    assert run_tests(code, tests) == ExecutionResult("passed")


def test_an_error_that_cannot_be_described_is_a_verdict():
    code = """
class Meta(type):
    @property
    def __name__(cls):
        raise OSError("no name")

class Odd(Exception, metaclass=Meta):
    def __str__(self):
        class Text(str):
            def __format__(self, spec):
                raise OSError("no text")
        return Text("odd")

def f():
    raise Odd
"""
    result = run_tests(code, ["f()"])
    assert result.reason == "failed"
    assert result.detail.startswith("Odd: odd in f()")

"""The inside of the sandbox: what a fresh interpreter does to itself before it runs a generated program.

`sandbox.py` starts it with an empty environment, hands it one job on stdin and reads one verdict from its stdout.
Only the standard library is imported, because nothing else exists in there.

```
sandbox.py  ->  warden                            ->  prisoner
                new namespaces, a new file tree,      chroot, limits, another user, no capabilities;
                the clock, the tests, the verdict     process 1 there: when it ends, all it started ends
```

The verdict is the warden's. It hands the tests over one by one, each once the one before has held, and each compiled
with a mark drawn for it as its last statement; the prisoner has to send that mark back. So a program that exits early,
prints what success would print, empties what it finds in the frames above it or puts functions of its own in place of
Python's has not passed. The prisoner can say why a program failed, and nothing else that is believed.

What is left to a program: it shares an interpreter with its tests. It can make `==` lie to them, shadow the names they
use or trace them and jump over lines; written against this very file, it can read a test's mark off the pipe or its
frame and send it without running the test. What it cannot do is get out.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import errno
import json
import marshal
import math
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import CodeType
from typing import Any

# From <linux/sched.h>, <linux/mount.h>, <linux/prctl.h> and <linux/capability.h>; `os` has only some, from 3.12 on.
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
AT_FDCWD, AT_RECURSIVE, SYS_MOUNT_SETATTR = -100, 0x8000, 442
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER, SECCOMP_KILL, SECCOMP_ERRNO, SECCOMP_ALLOW = 2, 0x8000_0000, 0x5_0000, 0x7FFF_0000
BPF_LOAD, BPF_EQUAL, BPF_AT_LEAST, BPF_RETURN = 0x20, 0x15, 0x35, 0x06
# Numbers from here on are those of x86-64's other ABI.
OTHER_ABI = 0x4000_0000
# shmget, semget, msgget, memfd_create, memfd_secret, io_uring_setup, add_key, keyctl.
SYSTEM_CALLS = {
    "x86_64": (0xC000_003E, (29, 64, 68, 319, 447, 425, 248, 250)),
    "aarch64": (0xC000_00B7, (194, 190, 186, 279, 447, 425, 217, 219)),
}
CAPABILITY_VERSION_3 = 0x2008_0522

WORK_FOLDER = "/work"
LIBRARY_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
SINGLE_FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/urandom")
REPORT_MAX_BYTES = 1 << 16
DETAIL_MAX_CHARS = 500

# What the prisoner says, all as long as a mark: it is shut in, the program is loaded, something was raised (and what).
MARK_BYTES = 16
SHUT_IN, LOADED, RAISED = b"the jail is shut", b"program's loaded", b"it raised error:"
# No program can write this name, and it is not there while a test runs.
MARK_NAME = "<mark>"

libc = ctypes.CDLL(None, use_errno=True)
libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


def checked(result: int, what: str) -> None:
    """Turn a failed C call into an error.

    Raises:
        OSError: if the result is not 0.
    """
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


# ------------------------------------------------------------------------------------------------------- the warden


def own_id_span(id_map: str) -> int:
    """How many user ids this machine or container has, read from the text of `/proc/self/uid_map`."""
    spans = [line.split() for line in id_map.splitlines()]
    return max(int(first) + int(length) for first, _, length in spans)


def stranger_id(id_span: int, pid: int) -> int:
    """A user id that nobody has, another one for each job running at the same time.

    The limit on processes counts all of a user's processes, so that jobs sharing an id would starve each other.

    Raises:
        OSError: if there are too few ids to take a strange one.
    """
    if id_span < 1 << 16:
        raise OSError(0, f"root here owns only {id_span} user ids, 65536 are needed", "setuid")
    highest = min(id_span, (1 << 32) - 1) - 2
    return highest - 1 - pid % min(1 << 22, id_span // 2)


def enter_namespaces() -> int:
    """Leave the machine's network, processes, mounts and IPC; return the user id for the program.

    Root takes another user's id. Anybody else keeps their own, in a user namespace that owns nothing outside.
    """
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    user_id, group_id = os.geteuid(), os.getegid()
    if user_id == 0:
        with open("/proc/self/uid_map") as id_map:
            user_id = stranger_id(own_id_span(id_map.read()), os.getpid())
        checked(libc.unshare(flags), "unshare")
        return user_id
    checked(libc.unshare(flags | CLONE_NEWUSER), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user_id} {user_id} 1"),
        ("gid_map", f"{group_id} {group_id} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return user_id


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    checked(libc.mount(*encoded, flags, None if data is None else data.encode()), f"mount {target}")


def make_read_only(target: str, flags: int) -> None:
    """mount_setattr(2), which unlike a remount keeps the flags that a user namespace may not take away."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    checked(
        libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), flags, attributes, ctypes.sizeof(attributes)),
        f"mount_setattr {target}",
    )


def visible_paths() -> list[str]:
    """What of the machine's files the program can read: the standard library and the C libraries behind it."""
    python = [os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(os.__file__)), *filter(None, sys.path)]
    kept: list[str] = []
    for path in sorted({os.path.abspath(path) for path in (*LIBRARY_FOLDERS, *python, *SINGLE_FILES)}):
        if os.path.exists(path) and not any(path.startswith(above + "/") for above in kept):
            kept.append(path)
    return kept


def build_root(root: str, user_id: int, file_mib: int) -> None:
    """Build the program's file tree in memory on the folder `root`; nobody outside sees it and it ends with the job."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=0755")
    for path in visible_paths():
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            open(target, "x").close()
        mount(path, target, None, MS_BIND | MS_REC)
        make_read_only(target, AT_RECURSIVE)
    os.mkdir(root + WORK_FOLDER)
    make_read_only(root, 0)
    options = f"size={file_mib}m,nr_inodes=1024,mode=0700,uid={user_id}"
    mount("tmpfs", root + WORK_FOLDER, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def compile_tests(tests: Sequence[str], marks: Sequence[bytes]) -> list[CodeType]:
    """Compile tests, which `sandbox.py` has checked, so that each leaves its mark behind if it comes to its end."""
    programs = []
    for position, (test, mark) in enumerate(zip(tests, marks, strict=True)):
        name = f"<test {position}>"
        tree = ast.parse(test, name)
        end = ast.Assign([ast.Name(MARK_NAME, ast.Store())], ast.Constant(mark))
        tree.body.append(ast.fix_missing_locations(end))
        programs.append(compile(tree, name, "exec", dont_inherit=True))
    return programs


def converse(requests: int, replies: int, code: str, tests: Sequence[str]) -> dict[str, str]:
    """Have the prisoner load the program and run the tests, one request at a time; end with how that went."""
    marks = [os.urandom(MARK_BYTES) for _ in tests]
    programs = compile_tests(tests, marks)
    with open(replies, "rb", closefd=False) as said:
        steps = zip((SHUT_IN, LOADED, *marks), (code, *programs, None), strict=True)
        for step, (expected, request) in enumerate(steps):
            heard = said.read(MARK_BYTES)
            if heard == RAISED:
                detail = said.read(REPORT_MAX_BYTES).decode(errors="replace")[:DETAIL_MAX_CHARS]
                if step < 2:
                    return {"reason": ("setup", "error")[step], "detail": detail}
                return {"reason": "failed", "detail": f"{detail} in {tests[step - 2].strip()[:DETAIL_MAX_CHARS]}"}
            if heard != expected:
                return {"reason": "ended-early", "detail": "wrote to the sandbox's own channel" if heard else ""}
            data = marshal.dumps(request)
            while data:
                data = data[os.write(requests, data) :]
        # The prisoner leaves now; whatever is said instead is not its own.
        if said.read(1):
            return {"reason": "ended-early", "detail": "wrote to the sandbox's own channel"}
    return {"reason": "passed", "detail": ""}


def supervise(pid: int, requests: int, replies: int, job: Mapping[str, Any]) -> dict[str, str]:
    """Come to a verdict on the program within its time, and end all it started."""
    limits, late = job["limits"], False

    def end(*_: object) -> None:
        # With the prisoner all its processes end, so that nobody is left to wait for.
        nonlocal late
        late = True
        os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    # What is rounded down to 0 would be no limit.
    signal.setitimer(signal.ITIMER_REAL, max(limits["wall_s"], 1e-3))
    try:
        verdict = converse(requests, replies, job["code"], job["tests"])
    except BrokenPipeError:
        verdict = {"reason": "ended-early", "detail": ""}
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    if verdict["detail"] or (verdict["reason"] == "passed" and status == 0):
        return verdict
    if late:
        return {"reason": "timeout", "detail": f"ran longer than wall_s = {limits['wall_s']:g} s"}
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    # The kernel enforces the limit on a sampled clock, so the exact one may still be short of it.
    if killed_by == signal.SIGKILL and usage.ru_utime + usage.ru_stime > limits["cpu_s"] / 2:
        return {"reason": "timeout", "detail": f"computed longer than cpu_s = {limits['cpu_s']:g} s"}
    if killed_by is not None:
        return {"reason": "ended-early", "detail": f"killed by signal {killed_by} before the tests' end"}
    return {"reason": "ended-early", "detail": f"exited with status {os.waitstatus_to_exitcode(status)} before the end"}


# ----------------------------------------------------------------------------------------------------- the prisoner


def limit_resources(limits: Mapping[str, Any]) -> None:
    """setrlimit(2), soft and hard alike, so that the program cannot raise what it may use."""
    mib = 1 << 20
    for what, value in (
        (resource.RLIMIT_AS, limits["memory_mib"] * mib),
        (resource.RLIMIT_CPU, max(1, math.ceil(limits["cpu_s"]))),
        (resource.RLIMIT_FSIZE, limits["file_mib"] * mib),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (allowed, allowed))


class FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def forbid_memory_of_no_process() -> None:
    """Forbid, by seccomp(2), what holds memory outside of any process, where no limit of a process counts it.

    Raises:
        OSError: if the system calls of this machine are not known.
    """
    machine = os.uname().machine
    if machine not in SYSTEM_CALLS:
        raise OSError(0, f"the system calls of {machine!r} are not known", "seccomp")
    architecture, calls = SYSTEM_CALLS[machine]
    # (code, jump if true, jump if false, value); a jump skips so many instructions.
    program = [(BPF_LOAD, 0, 0, 4), (BPF_EQUAL, 1, 0, architecture), (BPF_RETURN, 0, 0, SECCOMP_KILL)]
    program += [(BPF_LOAD, 0, 0, 0), (BPF_AT_LEAST, len(calls) + 1, 0, OTHER_ABI)]
    program += [(BPF_EQUAL, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    program += [(BPF_RETURN, 0, 0, SECCOMP_ALLOW), (BPF_RETURN, 0, 0, SECCOMP_ERRNO | errno.EPERM)]
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    loaded = FilterProgram(len(program), packed)
    checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(loaded), 0, 0), "prctl seccomp")


def give_up_privileges(user_id: int) -> None:
    """Become the stranger, for good."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user_id, user_id, user_id)
        os.setresuid(user_id, user_id, user_id)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    checked(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl no_new_privs")
    forbid_memory_of_no_process()
    # After the change of user, which clears it.
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl pdeathsig")


def shut_in(root: str, user_id: int, limits: Mapping[str, Any], channel: set[int]) -> None:
    """All that happens between the fork and the first line of the program."""
    # A process group of its own: kill(0) would reach the warden too.
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for kept, next_kept in pairwise((2, *sorted(channel), 1024)):
        os.closerange(kept + 1, next_kept)
    # Being in a chroot also bars the program from making user namespaces, where it would be root again.
    os.chroot(root)
    os.chdir(WORK_FOLDER)
    os.environ.clear()
    limit_resources(limits)
    give_up_privileges(user_id)


def describe(error: BaseException) -> str:
    """Type and message of an error whose class the program may have written."""
    # Not the class's own attribute, which its metaclass could have written too.
    name = type.__dict__["__name__"].__get__(type(error))
    try:
        text = str.__str__(str(error))
    except BaseException:
        text = ""
    return f"{name}: {text}".removesuffix(": ")[:DETAIL_MAX_CHARS]


def obey(requests: int, say: Callable[[bytes], None]) -> None:
    """Load the program, then run each test in its namespace, as the warden asks; report what is raised.

    Nothing that a program can replace is looked up between two tests: not the builtins, nor a module's attributes.
    """
    load, run, loaded, mark_name = marshal.load, exec, LOADED, MARK_NAME
    asked = open(requests, "rb")  # noqa: SIM115 (open as long as this process)
    # A real module, since dataclasses and pickle look their classes' module up.
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    namespace = vars(module)
    take = namespace.pop
    try:
        run(compile(load(asked), "<candidate>", "exec", dont_inherit=True), namespace)
        say(loaded)
        while (test := load(asked)) is not None:
            run(test, namespace)
            say(take(mark_name))
    except BaseException as error:
        say(RAISED + describe(error).encode(errors="backslashreplace"))


def imprison(job: dict[str, Any], user_id: int, requests: int, replies: int) -> None:
    """The whole life of the prisoner; never returns."""
    own_pid, write, leave = os.getpid, os.write, os._exit
    status = 1

    def say(text: bytes) -> None:
        # A copy of this process that the program forked comes here too, and has no say.
        if own_pid() != 1:
            leave(0)
        write(replies, text)

    try:
        root, limits = job["root"], job["limits"]
        # The fork has copied the tests too.
        job.clear()
        try:
            shut_in(root, user_id, limits, {requests, replies})
        except OSError as error:
            say(RAISED + str(error).encode())
        else:
            say(SHUT_IN)
            obey(requests, say)
        status = 0
    finally:
        leave(status)


# ------------------------------------------------------------------------------------------------------------- both


def serve(job: dict[str, Any]) -> dict[str, str]:
    """Run one job to its verdict."""
    try:
        user_id = enter_namespaces()
        build_root(job["root"], user_id, job["limits"]["file_mib"])
    except OSError as error:
        return {"reason": "setup", "detail": str(error)}
    requests_end, requests = os.pipe()
    replies, replies_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        imprison(job, user_id, requests_end, replies_end)
    os.close(requests_end)
    os.close(replies_end)
    return supervise(pid, requests, replies, job)


def main(read: Callable[[], str] = sys.stdin.read, write: Callable[[str], object] = sys.stdout.write) -> None:
    """Read a job, write its verdict."""
    # Dies with whoever started it; what it started dies with it.
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl pdeathsig")
    # The stranger must be able to walk through the folders made here.
    os.umask(0o022)
    # Out of memory, the kernel is to take this first; a courtesy, so no harm if it cannot be asked.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    write(json.dumps(serve(json.loads(read()))))


if __name__ == "__main__":
    main()

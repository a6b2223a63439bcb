"""What a server does with bad requests, bad clients and a bad end: one table of cases, figures and memory.

    python scripts/robustness.py                    # 10,000 quick requests; some minutes
    python scripts/robustness.py --requests 500

It starts `loraflow serve` on the small world, on 127.0.0.1 and nowhere else. Beside every case another client asks the
same question over and over; its answers must stay what they were. Memory is the server's resident set, before the case
and a moment after. The exit code is 1 if a case fails.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import psutil
import torch
import transformers

import loraflow
from loraflow.demo.world import adapter_paths, base_path

HOST = "127.0.0.1"
TIMEOUT_S = 20
WAITING = 40
GOOD = {"model": "math", "prompt": "Anna has 3 apples and gets 4. ", "temperature": 0, "max_tokens": 8}
LONG = {"model": "math", "prompt": "Anna", "temperature": 1.9, "max_tokens": 400}


def main() -> int:
    """Run all cases and print the table."""
    args = parse_arguments()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, loraflow {loraflow.__version__}; requests={args.requests}")
    print("\n| case | outcome | memory before, MiB | after, MiB | other requests unharmed |\n|---|---|---|---|---|")
    with tempfile.TemporaryFile() as log, Server(log) as server:
        server.wait_until_up()
        # What is allocated once, by whoever comes first, is no leak.
        flood(server, 50)
        expected = ask(server, GOOD)[1]["choices"]
        failed = [name for name, case in cases(args).items() if not run_case(name, case, server, expected)]
    print(f"\nfailed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="quick requests in one case")
    parser.add_argument("--growth", type=float, default=64, help="MiB that the server may have more after a case")
    args = parser.parse_args()
    Growth.allowed = args.growth
    return args


class Growth:
    """How much memory a case may leave."""

    allowed: float


class Server:
    """`loraflow serve` as a process."""

    def __init__(self, log) -> None:
        self.log = log
        with socket.socket() as listener:
            listener.bind((HOST, 0))
            self.port = listener.getsockname()[1]
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        modules = [f"{name}={path}" for name, path in adapter_paths().items()]
        limits = {"max-waiting": WAITING, "max-requests": 16, "cache-tokens": 8192, "batch-tokens": 256}
        limits |= {"max-new-tokens": 400, "timeout": TIMEOUT_S}
        return subprocess.Popen(
            [
                *(sys.executable, "-c", "from loraflow.cli import app; app()", "serve", "--base", str(base_path())),
                *("--lora-modules", *modules, "--port", str(self.port), "--device", "cpu"),
                *(part for name, value in limits.items() for part in (f"--{name}", str(value))),
            ],
            stdout=self.log,
            stderr=self.log,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_up(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: if it ends instead.
        """
        until = time.monotonic() + 300
        while time.monotonic() < until:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if get(self, "/ready")[0] == 200:
                    return
            if self.process.poll() is not None:
                self.log.seek(0)
                raise RuntimeError(f"The server has ended: {self.log.read().decode(errors='replace')[-2000:]}")
            time.sleep(0.2)
        raise RuntimeError("The server did not start.")

    def memory(self) -> float:
        """Resident set, in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def kill_and_restart(self) -> None:
        """End it as nothing can be caught, and start it anew."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()
        self.wait_until_up()


# ---- Asking --------------------------------------------------------------------------------------------------------


def connect(server: Server) -> contextlib.closing[http.client.HTTPConnection]:
    """A connection."""
    return contextlib.closing(http.client.HTTPConnection(HOST, server.port, timeout=240))


def get(server: Server, path: str) -> tuple[int, str]:
    """Status and text of a page."""
    with connect(server) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def ask(server: Server, body: object, connection: http.client.HTTPConnection | None = None) -> tuple[int, dict]:
    """Status and JSON of a completion; bytes are sent as they are."""
    if connection is None:
        with connect(server) as connection:
            return ask(server, body, connection)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def running(server: Server) -> float:
    """How many answers are in the engine, by its metrics."""
    lines = get(server, "/metrics")[1].splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("loraflow_running_answers "))


def open_stream(server: Server, body: dict) -> socket.socket:
    """A request whose answer nobody reads; the receiver takes as little as the system allows."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect((HOST, server.port))
    content = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


# ---- Cases: each gives what it saw, or raises ----------------------------------------------------------------------

Case = Callable[[Server], str]


def cases(args: argparse.Namespace) -> dict[str, Case]:
    """All of them, by name; the last kills the server."""
    nan, infinite = float("nan"), float("inf")
    long = {"model": "math", "prompt": "word " * 2000}
    huge = [{"math": 1e38, "code": -1e38}, {"math": 1e300}]
    return {
        "malformed JSON": refuse([b"", b"{", b"[" * 50_000, b"\xff", b"NaN", b"9" * 5000]),
        "wrong types": refuse([GOOD | one for one in ({"n": "x"}, {"prompt": None}, {"stop": 1}, {"max_tokens": 1.5})]),
        "NaN and infinite weights": refuse(
            [GOOD | {"adapter_weights": {"math": w}} for w in (nan, infinite, -infinite)]
        ),
        "weights beyond all numbers": refuse([GOOD | {"adapter_weights": one} for one in huge]),
        "unknown adapters and models": refuse([GOOD | {"adapter_weights": {"x": 1}}, GOOD | {"model": "x"}]),
        "over-long prompts": refuse([long, GOOD | {"prompt": [5] * 512}, GOOD | {"prompt": "a" * 3 * 2**20}]),
        "clients that vanish mid-stream": vanish,
        "a client that never reads": never_read,
        f"{args.requests} quick requests": lambda server: flood(server, args.requests),
        "a full queue": fill_queue,
        "kill -9 and restart": kill,
    }


def refuse(bodies: list) -> Case:
    """Requests that must each be refused with a reason."""

    def case(server: Server) -> str:
        seen = []
        for body in bodies:
            status, answer = ask(server, body)
            if not (400 <= status < 500 and answer["error"]["message"]):
                raise RuntimeError(f"{str(body)[:80]}: {status} {answer}")
            seen.append(status)
        return " ".join(f"{seen.count(status)} x {status}" for status in dict.fromkeys(seen))

    return case


def vanish(server: Server) -> str:
    """Streams that are broken off, all at once."""
    streams = [open_stream(server, LONG) for _ in range(20)]
    for stream in streams:
        stream.recv(200)
        stream.close()
    return f"20 left, all free after {until_idle(server):.1f} s"


def never_read(server: Server) -> str:
    """Streams that stay open and are not read: their time limit frees them at the latest."""
    body = LONG | {"n": 16, "logprobs": 5, "return_fusion_weights": "all"}
    streams = [open_stream(server, body) for _ in range(2)]
    try:
        until_running(server, 32)
        return f"2 x 16 answers unread, all free after {until_idle(server):.1f} s (limit {TIMEOUT_S} s)"
    finally:
        for stream in streams:
            stream.close()


def until_running(server: Server, answers: int) -> None:
    """Wait until so many answers are in the engine."""
    until = time.monotonic() + TIMEOUT_S
    while running(server) < answers:
        if time.monotonic() > until:
            raise RuntimeError(f"{running(server)} answers are in the engine, {answers} were to come")
        time.sleep(0.01)


def until_idle(server: Server) -> float:
    """Seconds until only the other client's answers are in the engine."""
    start = time.monotonic()
    while running(server) > 1:
        if time.monotonic() - start > TIMEOUT_S + 60:
            raise RuntimeError(f"{running(server)} answers are still in the engine")
        time.sleep(0.05)
    return time.monotonic() - start


def flood(server: Server, count: int) -> str:
    """Quick requests over eight connections."""
    body = {"model": "math", "prompt": "1", "temperature": 0, "max_tokens": 1}
    start = time.monotonic()

    def one_client(share: int) -> list[int]:
        with connect(server) as connection:
            return [ask(server, body, connection)[0] for _ in range(share)]

    with ThreadPoolExecutor(8) as clients:
        shares = [count // 8 + (index < count % 8) for index in range(8)]
        seen = [status for found in clients.map(one_client, shares) for status in found]
    if seen != [200] * count:
        raise RuntimeError(f"statuses {sorted(set(seen))} for {len(seen)} requests")
    seconds = time.monotonic() - start
    return f"all 200, {count / seconds:.0f} a second"


def fill_queue(server: Server) -> str:
    """More answers than may wait."""
    streams = [open_stream(server, LONG | {"n": 16}) for _ in range(2)]
    try:
        until_running(server, 32)
        with connect(server) as connection:
            content = json.dumps(GOOD | {"n": 16}).encode()
            connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            status, retry = answer.status, answer.headers["Retry-After"]
    finally:
        for stream in streams:
            stream.close()
    if status != 429 or retry is None:
        raise RuntimeError(f"{status}, Retry-After {retry}, where a 429 was to come")
    return f"429, Retry-After {retry} s; all free after {until_idle(server):.1f} s"


def kill(server: Server) -> str:
    """An end without warning, with streams open."""
    streams = [open_stream(server, LONG) for _ in range(4)]
    start = time.monotonic()
    server.kill_and_restart()
    for stream in streams:
        stream.close()
    return f"up again after {time.monotonic() - start:.0f} s"


# ---- Beside them ---------------------------------------------------------------------------------------------------


@dataclass
class Other:
    """Another client's answers."""

    answered: int = 0
    wrong: list[str] = field(default_factory=list)


@contextlib.contextmanager
def asking(server: Server, expected: list) -> Iterator[Other]:
    """Another client, which asks the same question as long as the block runs."""
    other, ended = Other(), threading.Event()

    def go() -> None:
        while not ended.is_set():
            status, answer = ask(server, GOOD)
            if status == 429:
                time.sleep(0.05)
                continue
            other.answered += 1
            if status != 200 or answer["choices"] != expected:
                other.wrong.append(f"{status} {answer}")

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield other
    finally:
        ended.set()
        thread.join()


def run_case(name: str, case: Case, server: Server, expected: list) -> bool:
    """Run one case and print its line; whether all was well."""
    killed = name.startswith("kill")
    before = server.memory()
    problem, other = None, Other()
    try:
        # Nobody can be served by a server that is being killed: there, one asks afterwards.
        with contextlib.nullcontext(other) if killed else asking(server, expected) as other:
            outcome = case(server)
        status, answer = ask(server, GOOD)
        other.answered += 1
        if status != 200 or answer["choices"] != expected:
            other.wrong.append(f"{status} {answer}")
    except (RuntimeError, OSError, http.client.HTTPException, KeyError, ValueError) as error:
        problem = outcome = f"FAILED: {type(error).__name__}: {error}"
    time.sleep(0.3)
    after = server.memory()
    unharmed = f"yes, {other.answered}" if not other.wrong else f"NO: {other.wrong[0][:100]}"
    print(f"| {name} | {outcome} | {before:.0f} | {after:.0f} | {unharmed} |", flush=True)
    return problem is None and not other.wrong and after - before <= Growth.allowed


if __name__ == "__main__":
    sys.exit(main())

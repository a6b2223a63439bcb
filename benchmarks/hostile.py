"""How long an honest client waits for its first token, quietly and under eight hostile clients of the same server.

    python benchmarks/hostile.py                    # 200 questions, quiet and under attack in turn
    python benchmarks/hostile.py --small            # a quick check that everything runs

The server has a process of its own, the hostile clients have one of theirs, and all run on loopback, each client from
an address of its own (127.0.0.x; needs Linux). Quiet and attacked rounds alternate in one run, so that what counts, the
ratio, is of the same machine at the same time. A client has one connection at a time; what was started is ended.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import platform
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

import torch
import transformers
from speed import processor_name

PATIENCE_S = 60
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    print(
        f"machine: {processor_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"the small world: {args.questions} questions in each of {2 * args.rounds} rounds, {args.tokens} tokens each, "
        f"seed {args.seed}"
    )
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        port_of, tells = context.Pipe(duplex=False)
        stack.enter_context(running(context.Process(target=serve, args=(tells, args.threads), daemon=True)))
        if not port_of.poll(600):
            raise SystemExit("The server did not start within 600 s.")
        port = port_of.recv()
        attack = context.Event()
        stack.enter_context(running(context.Process(target=attack_all, args=(port, attack, args.seed), daemon=True)))
        report(port, attack, args)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=50, help="in a round")
    parser.add_argument("--rounds", type=int, default=4, help="of each kind")
    parser.add_argument("--tokens", type=int, default=4, help="of each answer")
    parser.add_argument("--threads", type=int, default=1, help="of the server's torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="few questions and two rounds")
    args = parser.parse_args()
    if args.small:
        args.questions, args.rounds = 5, 1
    return args


@contextlib.contextmanager
def running(process: Any) -> Iterator[None]:
    """A process inside a `with` block, and killed behind it."""
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def serve(tells: Connection, threads: int) -> None:
    """Serve the small world's base and adapters, and tell the port."""
    import uvicorn

    from loraflow.demo.world import adapter_paths, base_path
    from loraflow.serving.app import make_app
    from loraflow.serving.catalog import Catalog
    from loraflow.serving.http import http_config
    from loraflow.serving.service import ServerConfig, Service

    torch.set_num_threads(threads)
    adapters = {name: str(path) for name, path in adapter_paths().items()}
    service = Service(Catalog.open(str(base_path()), adapters, base_id="small"), ServerConfig())
    listener = socket.create_server(("127.0.0.1", 0))

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            tells.send(listener.getsockname()[1])

    Server(http_config(make_app(service), service.config, log_level="critical")).run(sockets=[listener])


def report(port: int, attack: Event, args: argparse.Namespace) -> None:
    """Ask in rounds, quiet ones and attacked ones in turn, and print what was found."""
    draws = random.Random(args.seed)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(5):
        first_token(port, draws, args.tokens)
    for _, attacked in itertools.product(range(args.rounds), (False, True)):
        (attack.set if attacked else attack.clear)()
        # What was sent before is over, or what is sent now has begun.
        time.sleep(2)
        seconds[attacked] += [first_token(port, draws, args.tokens) for _ in range(args.questions)]
    attack.clear()
    print("\n| first token | p50, ms | p95, ms | p99, ms |\n|---|---|---|---|")
    found = {}
    for attacked, name in ((False, "quiet"), (True, "under 8 hostile clients")):
        cuts = statistics.quantiles(seconds[attacked], n=100, method="inclusive")
        found[attacked] = [cuts[place - 1] * 1000 for place in (50, 95, 99)]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in found[attacked]) + " |")
    ratios = [under / quiet for under, quiet in zip(found[True], found[False], strict=True)]
    print("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def first_token(port: int, draws: random.Random, tokens: int) -> float:
    """Seconds from a question to its first token, from a connection of its own."""
    prompt = f"{draws.randrange(100)} + {draws.randrange(100)} ="
    body = {"model": "math", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        line = response.readline()
        seconds = time.perf_counter() - started
        if response.status != 200 or not line.startswith(b"data: "):
            raise SystemExit(f"An honest question was not answered: {response.status} {line!r}")
        response.read()
    return seconds


# ---- The hostile clients -------------------------------------------------------------------------------------------


def attack_all(port: int, attack: Event, seed: int) -> None:
    """Run all hostile clients, each in a thread of its own, while they are told to."""
    import threading

    for number, act in enumerate(HOSTILE):
        threading.Thread(
            target=keep_on, args=(act, port, f"127.0.0.{number + 2}", attack, random.Random(seed + number)), daemon=True
        ).start()
    threading.Event().wait()


def keep_on(act: Act, port: int, address: str, attack: Event, draws: random.Random) -> None:
    """One hostile client, from an address of its own, one request after the other."""
    while True:
        attack.wait()
        with (
            contextlib.suppress(OSError),
            socket.create_connection(
                ("127.0.0.1", port), timeout=PATIENCE_S, source_address=(address, 0)
            ) as connection,
        ):
            act(connection, attack, draws)


Act = Callable[[socket.socket, Event, random.Random], None]


def whole(body: bytes) -> bytes:
    """A request with a body."""
    return f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body


def asks(body: bytes) -> Act:
    """Sends a body, and reads what comes back."""

    def act(connection: socket.socket, attack: Event, draws: random.Random) -> None:
        connection.sendall(whole(body))
        connection.recv(65536)

    return act


def hangs_up(connection: socket.socket, attack: Event, draws: random.Random) -> None:
    """Sends much, and goes."""
    connection.sendall(whole(EMPTY))
    time.sleep(draws.random() * 0.05)


def trickles(connection: socket.socket, attack: Event, draws: random.Random) -> None:
    """Sends a header letter by letter."""
    for letter in HEAD:
        if not attack.is_set():
            return
        connection.sendall(letter.encode())
        time.sleep(0.2)


def stalls(connection: socket.socket, attack: Event, draws: random.Random) -> None:
    """Sends half a body, and waits."""
    connection.sendall(whole(EMPTY)[:1_000_000])
    while attack.is_set():
        time.sleep(0.2)


def reads_nothing(connection: socket.socket, attack: Event, draws: random.Random) -> None:
    """Has a long stream made, and does not take it."""
    asked = {"model": "math", "prompt": "1 + 1 =", "max_tokens": 400, "n": 2, "temperature": 1.9, "stream": True}
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.sendall(whole(json.dumps(asked).encode()))
    until = time.monotonic() + 5
    while attack.is_set() and time.monotonic() < until:
        time.sleep(0.2)


EMPTY = b'{"model": "math", "prompt": [' + b'"",' * 690_000 + b'""]}'
NUMBERS = b'{"model": "math", "prompt": [' + b"1," * 900_000 + b"1]}"
TEXT = b'{"model": "math", "prompt": "' + b"one, two, " * 200_000 + b'"}'
WRONG = b'{"model": "mathematics", "prompt": "1 + 1 ="}'
HOSTILE: list[Act] = [
    asks(EMPTY),
    asks(NUMBERS),
    asks(TEXT),
    asks(WRONG),
    hangs_up,
    trickles,
    stalls,
    reads_nothing,
]


if __name__ == "__main__":
    main()

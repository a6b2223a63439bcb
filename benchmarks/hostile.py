"""How long an honest client waits for its first token, quietly and under eight hostile clients of the same server.

    python benchmarks/hostile.py                    # 200 questions for each attack, quiet and attacked in turn
    python benchmarks/hostile.py --attacks bodies   # one of the attacks: bodies, requests, work
    python benchmarks/hostile.py --hidden 1024      # a base of random weights of that width in place of the small world
    python benchmarks/hostile.py --small            # a quick check that everything runs

The server has a process of its own, the hostile clients have one of theirs, and all run on loopback, each client from
an address of its own (127.0.0.x; needs Linux). Quiet and attacked rounds alternate in one run, so that what counts, the
ratio, is of the same machine at the same time. The load is bounded: a client has one connection at a time (but the one
that opens many), and all of them have a lower priority than the server, for they would be on machines of their own.
What was started is ended.
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
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers
from speed import processor_name

if TYPE_CHECKING:
    from loraflow.serving.catalog import Catalog

PATIENCE_S = 60
HEAD = "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    print(
        f"machine: {processor_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"{f'hidden size {args.hidden}' if args.hidden else 'the small world'}: {args.questions} questions in each of "
        f"{2 * args.rounds} rounds, {args.tokens} tokens each, seed {args.seed}"
    )
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        port_of, tells = context.Pipe(duplex=False)
        server = context.Process(target=serve, args=(tells, args.threads, args.hidden), daemon=True)
        stack.enter_context(running(server))
        if not port_of.poll(600):
            raise SystemExit("The server did not start within 600 s.")
        port = port_of.recv()
        for name in args.attacks:
            attack, ready = context.Event(), context.Event()
            hostile = context.Process(target=attack_all, args=(port, attack, ready, args.seed, name), daemon=True)
            with running(hostile):
                if not ready.wait(600):
                    raise SystemExit("The hostile clients did not start within 600 s.")
                report(port, attack, name, server.pid, args)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=50, help="in a round")
    parser.add_argument("--rounds", type=int, default=4, help="of each kind")
    parser.add_argument("--tokens", type=int, default=4, help="of each answer")
    parser.add_argument("--threads", type=int, default=1, help="of the server's torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--hidden", type=int, default=0, help="hidden size of a random base; 0 is the small world")
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


def serve(tells: Connection, threads: int, hidden: int) -> None:
    """Serve a base with adapters, and tell the port."""
    from loraflow.serving.server import Server
    from loraflow.serving.service import ServerConfig, Service

    torch.set_num_threads(threads)
    service = Service(random_catalog(hidden) if hidden else small_world(), ServerConfig())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Server(service, lambda: tells.send(listener.getsockname()[1])).run(sockets=[listener])


def small_world() -> Catalog:
    """The small world's base and adapters."""
    from loraflow.demo.world import adapter_paths, base_path
    from loraflow.serving.catalog import Catalog

    return Catalog.open(str(base_path()), {name: str(path) for name, path in adapter_paths().items()}, base_id="small")


def random_catalog(hidden: int) -> Catalog:
    """The same with a base and adapters of random weights, of the small world's names and tokenizer."""
    import tempfile
    from pathlib import Path

    from peft import LoraConfig, get_peft_model

    from loraflow.demo.world import adapter_paths, base_path
    from loraflow.serving.catalog import Catalog

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_path())
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=8,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    with tempfile.TemporaryDirectory() as folder:
        base = transformers.LlamaForCausalLM(config)
        base.save_pretrained(f"{folder}/base")
        tokenizer.save_pretrained(f"{folder}/base")
        lora = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
        get_peft_model(base, lora).save_pretrained(f"{folder}/adapter")
        adapters = {name: str(Path(folder, "adapter")) for name in adapter_paths()}
        return Catalog.open(f"{folder}/base", adapters, base_id="small")


def report(port: int, attack: Event, name: str, server: int, args: argparse.Namespace) -> None:
    """Ask in rounds, quiet ones and attacked ones in turn, and print what was found."""
    draws = random.Random(args.seed)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    busy: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(5):
        first_token(port, draws, args.tokens)
    for _, attacked in itertools.product(range(args.rounds), (False, True)):
        (attack.set if attacked else attack.clear)()
        # What was sent before is over, or what is sent now has begun.
        time.sleep(2)
        used, started = sum(psutil.Process(server).cpu_times()[:2]), time.monotonic()
        seconds[attacked] += [first_token(port, draws, args.tokens) for _ in range(args.questions)]
        busy[attacked].append((sum(psutil.Process(server).cpu_times()[:2]) - used) / (time.monotonic() - started))
    attack.clear()
    print(
        f"\n| {name}: first token | p50, ms | p95, ms | p99, ms | server's CPU, cores |\n|---|---|---|---|---|",
        flush=True,
    )
    found = {}
    for attacked, kind in ((False, "quiet"), (True, f"under {len(ATTACKS[name])} hostile clients")):
        cuts = statistics.quantiles(seconds[attacked], n=100, method="inclusive")
        found[attacked] = [*(cuts[place - 1] * 1000 for place in (50, 95, 99)), statistics.mean(busy[attacked])]
        print(f"| {kind} | " + " | ".join(f"{value:.1f}" for value in found[attacked]) + " |")
    ratios = [under / quiet for under, quiet in zip(found[True], found[False], strict=True)]
    print("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)


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


def attack_all(port: int, attack: Event, ready: Event, seed: int, name: str) -> None:
    """Run the hostile clients, each in a thread of its own, while they are told to."""
    import threading

    # They would be on other machines: what the server wants of this one, it gets.
    os.nice(5)
    for number, act in enumerate(ATTACKS[name]):
        threading.Thread(
            target=keep_on, args=(act, port, f"127.0.0.{number + 2}", attack, random.Random(seed + number)), daemon=True
        ).start()
    ready.set()
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


def whole(body: bytes, path: str = "/v1/completions") -> bytes:
    """A request with a body."""
    return f"{HEAD.format(path=path)}Content-Length: {len(body)}\r\n\r\n".encode() + body


def sends(request: bytes) -> Act:
    """Sends something, and reads until something comes back."""

    def act(connection: socket.socket, attack: Event, draws: random.Random) -> None:
        connection.sendall(request)
        connection.recv(65536)

    return act


def asks(body: bytes, *, chat: bool = False) -> Act:
    """Sends a request with a body, and reads what comes back."""
    return sends(whole(body, "/v1/chat/completions" if chat else "/v1/completions"))


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


def opens_many(connection: socket.socket, attack: Event, draws: random.Random) -> None:
    """Has many connections that send nothing."""
    port, address = connection.getpeername()[1], connection.getsockname()[0]
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            more = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S, source_address=(address, 0))
            stack.enter_context(more)
        time.sleep(0.5)


def pipelines(connection: socket.socket, attack: Event, draws: random.Random) -> None:
    """Asks on and on without reading an answer."""
    connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000)
    connection.recv(65536)


def asking(prompt: object = "1 + 1 =", *, chat: bool = False, **fields: object) -> Act:
    """Sends a request, and reads the whole answer."""
    text = {"messages": prompt} if chat else {"prompt": prompt}
    return asks(json.dumps({"model": "math", **text, "max_tokens": 1, **fields}).encode(), chat=chat)


EMPTY = b'{"model": "math", "prompt": [' + b'"",' * 690_000 + b'""]}'
NUMBERS = b'{"model": "math", "prompt": [' + b"1," * 900_000 + b"1]}"
TEXT = b'{"model": "math", "prompt": "' + b"one, two, " * 200_000 + b'"}'
WRONG = b'{"model": "mathematics", "prompt": "1 + 1 ="}'
DEEP = b'{"model": "math", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_900_000}}
MESSAGES = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}] * 2_000
HOSTILE_HEADERS = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 15_000 + b"\r\n"

ATTACKS: dict[str, list[Act]] = {
    # Much is sent, or nothing is taken.
    "bodies": [
        asks(EMPTY),
        asks(NUMBERS),
        asks(TEXT),
        asks(WRONG),
        hangs_up,
        trickles,
        stalls,
        reads_nothing,
    ],
    # Much is to be read.
    "requests": [
        sends(HOSTILE_HEADERS),
        pipelines,
        opens_many,
        asks(DEEP),
        asking(stop=[str(number) for number in range(16_000)]),
        asking(adapter_weights={f"math{number}": 0.5 for number in range(8_000)}),
        asking([*MESSAGES, MESSAGES[0]], chat=True),
        asking([{"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}], chat=True),
    ],
    # What is asked for is answered: many small requests, and large ones.
    "work": [*[asking() for _ in range(4)], *[asking("1 + 1 = " * 30, n=16, max_tokens=16) for _ in range(4)]],
}


if __name__ == "__main__":
    main()

"""Time to the first token and between tokens over HTTP, with 1, 8 and 32 clients: our engine and vLLM, in one run.

    python benchmarks/latency.py                                          # our engine alone
    python benchmarks/latency.py --vllm-python .venv-vllm/bin/python      # beside vLLM (scripts/test_vllm.sh makes it)
    python benchmarks/latency.py --small                                  # a quick check that everything runs

Each server is a process of its own on loopback and answers the same streamed prompts. A machine's speed drifts, so in
every round the servers answer in turn, one at a time. Prompts are new in every round, so that none is found in a cache.
Models are random: speed does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from speed import print_setting

from serving import HOST, build_fusion

START_S, ANSWER_S = 600, 300
Times = list[float]


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    print_setting(args)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        root = Path(directory)
        fusion = build_fusion(root, args)
        commands = {"loraflow": own_command(args)}
        if args.vllm_python is not None:
            commands["vLLM"] = vllm_command(args)
            asked = [args.vllm_python, "-c", "import vllm; print(vllm.__version__)"]
            print("vllm", subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[-1])
        servers = {
            name: stack.enter_context(start_server([*command[:4], f"fusion={fusion}", *command[4:]], root, args))
            for name, command in commands.items()
        }
        report(servers, args)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=None, help="default: 8/3 of hidden, as in Llama")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--adapters", type=int, default=3, help="k")
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--granularity", default="layer", choices=["step", "layer", "module"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="how many ask at the same time")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each server")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vllm-python", default=None, help="interpreter of an environment with vLLM and loraflow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="tiny sizes and two rounds")
    parser.set_defaults(device="cpu", experts=0)
    args = parser.parse_args()
    if args.small:
        small = {"hidden": 64, "layers": 2, "vocab": 500, "prompt_tokens": 16, "new_tokens": 8, "rounds": 2}
        vars(args).update(small, clients=[1, 4])
    return args


def own_command(args: argparse.Namespace) -> list[str]:
    """The command of our engine's server, where the fusion's name and port are missing."""
    most = max(args.clients)
    room = most * (args.prompt_tokens + args.new_tokens + 64) * 2
    limits = ["--max-requests", str(most), "--cache-tokens", str(room), "--max-new-tokens", str(args.new_tokens)]
    return [sys.executable, "-m", "loraflow", "serve", *limits]


def vllm_command(args: argparse.Namespace) -> list[str]:
    """The same of vLLM's."""
    longest, most = args.prompt_tokens + args.new_tokens, max(args.clients)
    options = f"--max-model-len {longest} --max-num-seqs {most} --max-num-batched-tokens {max(512, longest)}"
    own = f"{options} --gpu-memory-utilization 0.2 --disable-log-stats --disable-uvicorn-access-log"
    return [args.vllm_python, "-m", "loraflow", "serve", "--engine", "vllm", "--dtype", args.dtype, "--vllm-args", own]


@contextmanager
def start_server(command: Sequence[str], root: Path, args: argparse.Namespace) -> Iterator[int]:
    """Start a server, and end it.

    Yields:
        Its port.

    Raises:
        RuntimeError: if it ends by itself, or does not answer.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(root / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = root / f"log-{port}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            until = time.monotonic() + START_S
            while not answers(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"A server did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(port: int) -> bool:
    """Whether a server takes requests."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def report(servers: dict[str, int], args: argparse.Namespace) -> None:
    """Let the servers answer in turn, and print percentiles over all rounds."""
    draws = random.Random(args.seed)
    print("\n| clients | server | first token, ms: p50 | p95 | p99 | between tokens, ms: p50 | p95 | p99 | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for clients in args.clients:
        firsts: dict[str, Times] = {name: [] for name in servers}
        gaps: dict[str, Times] = {name: [] for name in servers}
        speeds: dict[str, Times] = {name: [] for name in servers}
        for number in range(args.rounds + 1):
            prompts = [[draws.randrange(3, args.vocab) for _ in range(args.prompt_tokens)] for _ in range(clients)]
            for name, port in servers.items():
                start = time.perf_counter()
                found = stream_all(port, prompts, args)
                seconds = time.perf_counter() - start
                # The first round warms up.
                if number:
                    firsts[name] += [first for first, _ in found]
                    gaps[name] += [gap for _, mine in found for gap in mine]
                    speeds[name].append(clients * args.new_tokens / seconds)
        for name in servers:
            cells = [f"{1000 * percentile(times, p):.1f}" for times in (firsts[name], gaps[name]) for p in (50, 95, 99)]
            print(f"| {clients} | {name} | {' | '.join(cells)} | {statistics.median(speeds[name]):.1f} |", flush=True)


def percentile(times: Times, percent: int) -> float:
    """The nearest rank."""
    return sorted(times)[max(0, -(-len(times) * percent // 100) - 1)]


def stream_all(port: int, prompts: Sequence[list[int]], args: argparse.Namespace) -> list[tuple[float, Times]]:
    """All prompts at once, each from a client of its own: seconds to the first token, and between tokens.

    Raises:
        RuntimeError: if an answer is not as long as asked for.
    """

    def ask(prompt: list[int]) -> tuple[float, Times]:
        body = {"model": "fusion", "prompt": prompt, "max_tokens": args.new_tokens, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_S)
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        times = []
        while line := response.readline():
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
        connection.close()
        # vLLM may send what two tokens brought in one event, or an event at the end that brings none.
        if not 0.9 * args.new_tokens <= len(times) <= args.new_tokens + 1:
            raise RuntimeError(f"{len(times)} events came where {args.new_tokens} tokens were asked for: {line!r}")
        return times[0] - start, [after - before for before, after in itertools.pairwise(times)]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


if __name__ == "__main__":
    main()

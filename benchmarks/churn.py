"""Requests of every kind while adapters and fusions come and go: statuses, and whether answers stay the same.

    python benchmarks/churn.py                    # 5,000 requests, 200 loads and unloads
    python benchmarks/churn.py --small            # a quick check that everything runs

Each kind of request is answered once while nothing else happens; no two of those answers are alike. All later answers
must be the same, token for token, with log-probabilities that differ in the order of sums at most.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import itertools
import json
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
import uvicorn
from speed import processor_name

from loraflow import FusedModel, LoraFlow
from loraflow.demo.world import adapter_paths, base_path
from loraflow.methods import Arrow, Static
from loraflow.serving.app import make_app
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import ServerConfig
from loraflow.serving.http import http_config
from loraflow.serving.service import Service

FUSIONS = {
    "layers": (["zh-chat", "math"], LoraFlow("layer")),
    "linears": (["math", "es-chat"], LoraFlow("module")),
    "steps": (["es-chat", "zh-chat", "math"], LoraFlow("step")),
    "mix": (["zh-chat", "math"], Static({"zh-chat": 0.5, "math": 0.8})),
    "arrows": (["es-chat", "zh-chat"], Arrow(2)),
}
KINDS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("small", "math", "zh-chat", "es-chat", *FUSIONS)),
    ("small", {"adapter_weights": {"math": 0.7, "zh-chat": 0.6}}),
    ("math", {"adapter_weights": {"zh-chat": -0.8}}),
    ("layers", {"adapter_weights": {"zh-chat": 0.9, "math": 0.4}}),
    ("steps", {"fusion": {"method": "average"}}),
    ("layers", {"fusion": {"method": "qa-flora"}}),
    ("steps", {"fusion": {"method": "logo"}}),
    ("steps", {"fusion": {"method": "arrow", "options": {"top_k": 2}}}),
]
# What comes and goes: an adapter, and a fusion that brings one.
PASSING = (("passing", "code"), ("visitors", "visitors"))


def main() -> None:
    """Ask, load and unload, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--loads", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="100 requests, 10 loads")
    args = parser.parse_args()
    if args.small:
        args.requests, args.loads = 100, 10
    torch.manual_seed(args.seed)
    print(
        f"machine: {processor_name()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\nthe small world: " + json.dumps(vars(args))
    )
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as port:
        run(port, args)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[int]:
    """A server of all fusions on loopback: its port."""
    shutil.copytree(adapter_paths()["code"], root / "code")
    paths = adapter_paths()
    for name, (adapters, method) in {**FUSIONS, "visitors": (["math", "ru-chat"], LoraFlow("layer"))}.items():
        model = FusedModel.from_adapters(base_path(), {one: paths[one] for one in adapters}, method)
        for gate in model.gates.values():
            for parameter in gate.parameters():
                torch.nn.init.normal_(parameter, 0, 0.3)
        model.save_pretrained(root / name)
    catalog = Catalog.open(None, None, {name: str(root / name) for name in FUSIONS}, base_id="small")
    config = ServerConfig(admin_keys=("boss",), load_from=(root, paths["ru-chat"].parent))
    server = uvicorn.Server(http_config(make_app(Service(catalog, config)), config, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def run(port: int, args: argparse.Namespace) -> None:
    """All requests beside all loads, and what came of them."""
    quiet = [ask(port, number)[1] for number in range(len(KINDS))]
    if any(same(one, other) for one, other in itertools.combinations(quiet, 2)):
        raise SystemExit("Two kinds have the same quiet answer, so that mixing would not be seen. Take another --seed.")
    found: collections.Counter[str] = collections.Counter()
    started = time.perf_counter()

    def answer(number: int) -> None:
        status, said = ask(port, number % len(KINDS))
        found[f"status {status}"] += 1
        found["as when quiet" if same(said, quiet[number % len(KINDS)]) else "another answer"] += 1

    def change() -> int:
        done = 0
        for name, path in itertools.islice(itertools.cycle(PASSING), args.loads):
            for action, body in (("load", {"lora_name": name, "lora_path": path}), ("unload", {"lora_name": name})):
                status, text = call(port, f"/v1/{action}_lora_adapter", body)
                if status != 200:
                    raise SystemExit(f"The server did not {action} {name!r}: {text}")
            # What a fusion brought stays when it goes.
            if name == "visitors":
                call(port, "/v1/unload_lora_adapter", {"lora_name": "ru-chat"})
            done += 1
        return done

    with ThreadPoolExecutor(args.clients + 1) as pool:
        changes = pool.submit(change)
        for _ in pool.map(answer, range(args.requests)):
            pass
        print(
            f"\n{changes.result()} loads and unloads, {args.requests} requests in {time.perf_counter() - started:.0f} s"
        )
    for what, count in sorted(found.items()):
        print(f"- {what}: {count}")


Said = tuple[list[str], list[float]]


def same(one: Said, other: Said) -> bool:
    """Whether two answers have the same tokens, as likely but for the order of sums."""
    return one[0] == other[0] and all(abs(a - b) < 2e-3 for a, b in zip(one[1], other[1], strict=True))


def ask(port: int, kind: int) -> tuple[int, Said]:
    """The status of one kind of request, and its answer: tokens, and how likely each was."""
    name, more = KINDS[kind]
    body = {"model": name, "prompt": "Anna has 3 apples and", "temperature": 0, "max_tokens": 8, "logprobs": 0, **more}
    status, text = call(port, "/v1/completions", body)
    if status != 200:
        return status, ([text], [])
    logprobs = json.loads(text)["choices"][0]["logprobs"]
    return status, (logprobs["tokens"], logprobs["token_logprobs"])


def call(port: int, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """One request with the admin's key."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer boss"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


if __name__ == "__main__":
    main()

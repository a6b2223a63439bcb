"""What a thousand adapters cost that are in a bank, and what the first use of one does.

    python benchmarks/bank.py                 # 1,000 adapters, r = 8, hidden size 512, 6 layers, one thread
    python benchmarks/bank.py --adapters 50 --cold 5 --rounds 3

The adapters are random, and written into a temporary folder by this script (2 GB for a thousand). Opening is measured
once by the files' headers and once with a saved index; a cold request is the first of an adapter that nothing has read
yet, though its files may be in the system's cache, and a warm one is the same request again. Decoding is compared in
rounds as in `growth.py`: the median of ratios within a round, and on CPUs the process's own time.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from growth import decode, run_rounds
from safetensors.torch import load_file, save_file
from speed import build_base, print_setting, save_adapter

from loraflow import AdapterBank, FusedModel

Made = TypeVar("Made")


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print_setting(args)
    base = build_base(args)
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        folder = Path(directory)
        write_adapters(base, folder, args)
        before = resident_mib()
        bank = timed("opened by headers", lambda: AdapterBank(folder))
        total = sum(entry.size_bytes for entry in bank.values())
        print(f"  {len(bank)} adapters, {total / 2**20:.0f} MiB of weights, {total / len(bank) / 2**20:.2f} MiB each")
        bank.save_index()
        bank = timed("opened with the index", lambda: AdapterBank(folder))
        first, second = itertools.islice(bank, 2)
        few = FusedModel.from_adapters(copy.deepcopy(base), {name: bank[name] for name in (first, second)}, "base")
        many = timed("fused into the base", lambda: FusedModel.from_adapters(copy.deepcopy(base), bank, "base"))
        opened = resident_mib()
        report_first_requests(many, args)
        report_decoding(few, many, {first: 0.5, second: 0.5}, args)
        kept = bank.held_bytes + many.attachment.stock.nbytes
        print(f"memory: {before:.0f} MiB before the bank was opened, {opened:.0f} when it was fused (and two bases)")
        print(f"  {resident_mib():.0f} at the end, {kept / 2**20:.0f} of them adapters; all are {total / 2**20:.0f}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000, help="in the bank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=None, help="default: 8/3 of hidden, as in Llama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=8, help="r")
    parser.add_argument("--cold", type=int, default=20, help="adapters whose first request is measured")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.device, args.dtype, args.experts = "cpu", "float32", 0
    return args


def write_adapters(base: transformers.PreTrainedModel, folder: Path, args: argparse.Namespace) -> None:
    """Random adapters: one by PEFT, and others with its settings and values of their own."""
    first = Path(save_adapter(base, folder / "a0000", args, 0))
    config = (first / "adapter_config.json").read_text()
    tensors = load_file(first / "adapter_model.safetensors")
    for index in range(1, args.adapters):
        place = folder / f"a{index:04}"
        place.mkdir()
        (place / "adapter_config.json").write_text(json.dumps(json.loads(config)))
        # In an order and a sign of its own: to draw as many values takes longer than all that is measured.
        changed = {key: (tensor.roll(index) * (-1) ** index).contiguous() for key, tensor in tensors.items()}
        save_file(changed, place / "adapter_model.safetensors", {"format": "pt"})


def timed(what: str, make: Callable[[], Made]) -> Made:
    """Make something, and print how long it took."""
    start, own = time.perf_counter(), time.process_time()
    made = make()
    print(f"{what}: {time.perf_counter() - start:.2f} s ({time.process_time() - own:.2f} s of the process)")
    return made


def report_first_requests(model: FusedModel, args: argparse.Namespace) -> None:
    """How much longer the first request of an adapter takes than the same again."""
    prompt = torch.randint(3, args.vocab, (1, 16))
    clocks = {"clock": time.perf_counter, "process": time.process_time}
    more: dict[str, list[float]] = {name: [] for name in clocks}
    warm: list[float] = []

    def ask(name: str) -> dict[str, float]:
        start = {clock: read() for clock, read in clocks.items()}
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), methods=[name], max_new_tokens=1, do_sample=False
        )
        return {clock: read() - start[clock] for clock, read in clocks.items()}

    names = model.adapter_names[2 : 3 + args.cold]
    for position, name in enumerate(names):
        cold, again = ask(name), ask(name)
        if position:
            # The first of all also warms up what is not of adapters.
            warm.append(again["clock"])
            for clock in clocks:
                more[clock].append(cold[clock] - again[clock])
    print(f"first request of a cold adapter, beyond a warm one of {1000 * statistics.median(warm):.0f} ms:")
    for clock, values in more.items():
        times = sorted(1000 * value for value in values)
        print(f"  {clock:8} median {statistics.median(times):.0f} ms, from {times[0]:.0f} to {times[-1]:.0f} ms")


def report_decoding(few: FusedModel, many: FusedModel, weights: dict[str, float], args: argparse.Namespace) -> None:
    """Decoding with two of all, as a share of the same two alone."""
    for batch in (1, 8):
        contenders = {
            name: functools.partial(decode, model, [weights] * batch, args)
            for name, model in (("few", few), ("many", many))
        }
        seconds = run_rounds(contenders, args.rounds)
        ratio = statistics.median(f / m for f, m in zip(seconds["few"], seconds["many"], strict=True))
        print(f"decoding, 2 used of {len(many.adapter_names)}, over 2 used of 2, batch {batch}: {ratio:.3f}")


def resident_mib() -> float:
    """The process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    main()

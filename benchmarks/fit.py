r"""What a step of fitting gates costs, beside the least that it can cost and beside PEFT's one LoRA, in one run.

    python benchmarks/fit.py                                         # hidden 1024, 8 layers, 4 x 384 tokens, 32 answers
    python benchmarks/fit.py --layers 2 --length 192 --rounds 3      # smaller
    python benchmarks/fit.py --device cuda --dtype bfloat16 --layers 32 --hidden 4096

The floor is the base's forward and the backward to its input on the same tokens, with a head that reads the positions
that predict an answer and no others. A step of loraflow is one of `answer_loss`, backward and AdamW over the gates; one
of PEFT is that of transformers' `Trainer` with a LoRA of the same rank on the same linears.

A machine's speed drifts, so every contender runs in every round, in turn, and what counts is the median over the rounds
of its ratio to the floor in the same round. On CPUs, seconds are those of the processor: what else runs there counts
little. Memory is the peak above what is there before a step: the process's own high-water mark, or CUDA's. Models are
random: speed does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import math
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import loraflow
from loraflow import FusedModel
from loraflow.adapters import Adapter, AdapterSource, LoraModule
from loraflow.training import answer_loss

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[], None]


@dataclass(frozen=True)
class Sizes:
    """Sizes of one measurement."""

    vocabulary: int
    length: int
    adapters: int
    rank: int


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print_setting(args)
    default = Sizes(args.vocabularies[0], args.length, args.adapters, args.rank)
    print(f"\nstep of {args.batch} x {args.length} tokens, {args.answers} of each row answers, k={args.adapters}:")
    print(f"  {'':20} {'s':>8} {'to the floor':>13} {'memory, MiB':>12} {'to the floor':>13}")
    for vocabulary in args.vocabularies:
        print(f"  vocabulary {vocabulary}")
        compare(Sizes(vocabulary, args.length, args.adapters, args.rank), args)
    if args.growth:
        print("\ngrowth of loraflow's step: seconds of each size, to the first, and the slope of log s over log size")
        grow("vocabulary", [4096, 32768, 131072], default, args)
        grow("length", [args.length // 4, args.length // 2, args.length], default, args)
        grow("adapters", [1, 2, 4, 8], default, args)
        grow("rank", [8, 16, 32, 64], default, args)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 131072])
    parser.add_argument("--adapters", type=int, default=2, help="k")
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=384, help="tokens in a row")
    parser.add_argument("--answers", type=int, default=32, help="tokens of a row that have a label")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def print_setting(args: argparse.Namespace) -> None:
    """Machine, versions, seed and sizes."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else (names or [platform.machine()])[0]
    print(f"machine: {device}, {args.threads} threads; Python {platform.python_version()}, torch {torch.__version__}, ")
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, loraflow {loraflow.__version__}")
    print(" ".join(f"{key}={value}" for key, value in vars(args).items()))


def compare(sizes: Sizes, args: argparse.Namespace) -> None:
    """The floor, loraflow and PEFT at one size."""
    with tempfile.TemporaryDirectory() as directory:
        steps = {
            "floor": floor_step(sizes, args),
            "loraflow": fused_step(sizes, args),
            "PEFT, Trainer": peft_step(sizes, args, directory),
        }
        seconds = run_rounds(list(steps.values()), args)
        peaks = [peak_above(step, args) for step in steps.values()]
    for name, times, peak in zip(steps, seconds, peaks, strict=True):
        ratio = statistics.median(t / f for t, f in zip(times, seconds[0], strict=True))
        print(f"  {name:20} {statistics.median(times):8.3f} {ratio:13.3f} {peak / 2**20:12.1f} {peak / peaks[0]:13.3f}")


def grow(name: str, values: Sequence[int], default: Sizes, args: argparse.Namespace) -> None:
    """How a step's seconds grow with one size."""
    steps = [fused_step(Sizes(**{**vars(default), name: value}), args) for value in values]
    seconds = [statistics.median(times) for times in run_rounds(steps, args)]
    shown = "  ".join(f"{v}: {s:.3f} ({s / seconds[0]:.2f})" for v, s in zip(values, seconds, strict=True))
    print(f"  {name:12} {shown}   slope {slope(values, seconds):.2f}")


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Of the line through (log size, log seconds)."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in seconds]).slope


def run_rounds(steps: Sequence[Step], args: argparse.Namespace) -> list[list[float]]:
    """The seconds of each step in each round, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(args.rounds + 1):
        for step, times in zip(steps, seconds, strict=True):
            gc.collect()
            elapsed = timed(step, args)
            if number:
                times.append(elapsed)
    return seconds


def timed(step: Step, args: argparse.Namespace) -> float:
    """Seconds of a step: the processor's, or on another device the clock's."""
    on_cpu = args.device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    synchronize = (lambda: None) if on_cpu else torch.cuda.synchronize
    synchronize()
    start = clock()
    step()
    synchronize()
    return clock() - start


def peak_above(step: Step, args: argparse.Namespace) -> int:
    """Bytes at the peak of a step, above those before it."""
    gc.collect()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    # Freed tensors go back to the system at once, so that what is resident is what is in use (M_MMAP_THRESHOLD).
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)
    step()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """A size of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def build_base(sizes: Sizes, args: argparse.Namespace) -> PreTrainedModel:
    """A random Llama, in training mode."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=(args.hidden * 8 // 3 + 63) // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).train()


@functools.cache
def examples(sizes: Sizes, batch: int, answers: int, device: str, seed: int) -> dict[str, Tensor]:
    """Random rows, whose last tokens have labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, sizes.vocabulary, (batch, sizes.length), generator=generator).to(device)
    labels = ids.clone()
    labels[:, : -min(answers, sizes.length - 1)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def inputs_of(sizes: Sizes, args: argparse.Namespace) -> dict[str, Tensor]:
    """The rows of one step."""
    return dict(examples(sizes, args.batch, args.answers, args.device, args.seed))


def floor_step(sizes: Sizes, args: argparse.Namespace) -> Step:
    """The base's forward and the backward to its input."""
    base, inputs = build_base(sizes, args).requires_grad_(False), inputs_of(sizes, args)
    labels = inputs.pop("labels")
    targets = labels[:, 1:][labels[:, 1:] != -100]
    embeddings = base.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()

    def step() -> None:
        states = base.base_model(inputs_embeds=embeddings, **inputs).last_hidden_state[:, :-1]
        logits = base.get_output_embeddings()(states[labels[:, 1:] != -100]).float()
        torch.nn.functional.cross_entropy(logits, targets).backward()
        embeddings.grad = None

    return step


def random_adapter(base: PreTrainedModel, name: str, rank: int, seed: int) -> Adapter:
    """An adapter on all linears, in memory."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module_name, linear in base.named_modules():
        if module_name.rpartition(".")[2] in TARGETS:
            out_features, in_features = linear.weight.shape
            lora_A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            lora_B = torch.randn(out_features, rank, generator=generator) / 10
            modules[module_name] = LoraModule(lora_A=lora_A, lora_B=lora_B, scaling=1.0)
    return Adapter(name, AdapterSource(name), LoraConfig(r=rank, target_modules=TARGETS), modules, name)


def fused_step(sizes: Sizes, args: argparse.Namespace) -> Step:
    """Loss, backward and optimiser of the gates."""
    base, inputs = build_base(sizes, args), inputs_of(sizes, args)
    adapters = {f"a{i}": random_adapter(base, f"a{i}", sizes.rank, args.seed + i) for i in range(sizes.adapters)}
    model = FusedModel.from_adapters(base, adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        answer_loss(model, **inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(sizes: Sizes, args: argparse.Namespace, directory: str) -> Step:
    """A step of transformers' trainer over one LoRA of PEFT's."""
    config = LoraConfig(r=sizes.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model, inputs = get_peft_model(build_base(sizes, args), config), inputs_of(sizes, args)
    arguments = TrainingArguments(directory, report_to="none", use_cpu=args.device == "cpu")
    trainer = Trainer(model, arguments)
    optimizer = trainer.create_optimizer()
    answers = (inputs["labels"][:, 1:] != -100).sum()

    def step() -> None:
        trainer.training_step(model, inputs, num_items_in_batch=answers)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()

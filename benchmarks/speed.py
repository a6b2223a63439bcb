"""Decode speed, fit speed and activation memory of a fusion, beside the base and what PEFT offers, in one run.

    python benchmarks/speed.py                              # hidden size 768, k = 3, r = 16
    python benchmarks/speed.py --hidden 1536 --layers 8 --batch 8
    python benchmarks/speed.py --experts 16 --adapters 2    # a mixture of experts, which the adapters update too

A machine's speed drifts, so every contender runs in every round, in turn, and what counts is the median over the rounds
of its ratio to the base in the same round. Models are random: speed does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import loraflow
from loraflow import FusedModel, LoraFlow

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Contenders = dict[str, torch.nn.Module]


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print_setting(args)
    with tempfile.TemporaryDirectory() as directory:
        base = build_base(args)
        adapters = {f"a{i}": save_adapter(base, Path(directory) / f"a{i}", args, i) for i in range(args.adapters)}
        contenders = build_contenders(base, adapters, args)
        report_decode(contenders, args)
        report_fit(contenders, args)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=None, help="default: 8/3 of hidden, as in Llama")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=0, help="of a mixture, two for each token; default: no mixture")
    parser.add_argument("--experts-implementation", default="grouped_mm", choices=["eager", "batched_mm", "grouped_mm"])
    parser.add_argument("--adapters", type=int, default=3, help="k")
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--granularity", default="layer", choices=["step", "layer", "module"])
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--fit-batch", type=int, default=4)
    parser.add_argument("--fit-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--without-xlora", action="store_true", help="leave out X-LoRA, by far the slowest")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # PEFT's X-LoRA takes linears only.
    args.without_xlora = args.without_xlora or args.experts > 0
    return args


def print_setting(args: argparse.Namespace) -> None:
    """Machine, versions, seed and sizes."""
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else processor_name()
    print(
        f"machine: {device}, {args.threads} threads; Python {platform.python_version()}, torch {torch.__version__}, ",
        end="",
    )
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, loraflow {loraflow.__version__}")
    print(" ".join(f"{key}={value}" for key, value in vars(args).items()))


def processor_name() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def build_base(args: argparse.Namespace) -> PreTrainedModel:
    """A random Llama; or, with experts, a random Qwen3 MoE, whose experts together are as wide as four dense layers."""
    intermediate = args.intermediate or (args.hidden * 8 // 3 + 63) // 64 * 64
    common = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 64,
    }
    if args.experts:
        config = Qwen3MoeConfig(
            **common,
            head_dim=64,
            num_experts=args.experts,
            num_experts_per_tok=2,
            moe_intermediate_size=max(64, 4 * intermediate // args.experts // 64 * 64),
            experts_implementation=args.experts_implementation,
        )
        model: PreTrainedModel = Qwen3MoeForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    model = model.to(args.device, getattr(torch, args.dtype)).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def save_adapter(base: PreTrainedModel, directory: Path, args: argparse.Namespace, seed: int) -> str:
    """A random adapter, written by PEFT."""
    torch.manual_seed(args.seed + seed + 1)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=16,
        target_modules=ATTENTION if args.experts else TARGETS,
        target_parameters=EXPERTS if args.experts else None,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(copy.deepcopy(base), config).save_pretrained(directory)
    return str(directory)


def build_contenders(base: PreTrainedModel, adapters: dict[str, str], args: argparse.Namespace) -> Contenders:
    """The base alone, the fusion, PEFT with one adapter, with all summed, and X-LoRA."""
    paths = list(adapters.values())
    one = PeftModel.from_pretrained(copy.deepcopy(base), paths[0], is_trainable=True).eval()
    summed = PeftModel.from_pretrained(copy.deepcopy(base), paths[0], adapter_name="a0", is_trainable=True)
    for name, path in list(adapters.items())[1:]:
        summed.load_adapter(path, name, is_trainable=True)
    summed.base_model.set_adapter(list(adapters))
    contenders: Contenders = {
        "base": base,
        f"fused, k={len(paths)}": FusedModel.from_adapters(
            copy.deepcopy(base), adapters, LoraFlow(args.granularity, start="average")
        ),
        "PEFT, one adapter": one,
        f"PEFT, {len(paths)} summed": summed.eval(),
    }
    if not args.without_xlora:
        # X-LoRA finds its adapters again only under their indices.
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=args.hidden,
            xlora_depth=1,
            adapters={str(i): path for i, path in enumerate(paths)},
        )
        xlora_base = copy.deepcopy(base)
        xlora_base.config.use_cache = False
        contenders["PEFT, X-LoRA"] = get_peft_model(xlora_base, config).to(args.device).eval()
    return contenders


def report_decode(contenders: Contenders, args: argparse.Namespace) -> None:
    """Tokens per second of greedy decoding, prompt excluded."""
    prompt = torch.randint(3, args.vocab, (args.batch, 16), device=args.device)

    def decode(model: torch.nn.Module) -> float:
        # The prompt's forward is the same in both, so that the difference is the decoding alone.
        options = {"do_sample": False, "use_cache": "X-LoRA" not in names[model]}
        times = []
        for new_tokens in (1, 1 + args.new_tokens):
            length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
            times.append(timed(functools.partial(model.generate, **inputs, **length, **options), args))
        return times[1] - times[0]

    names = {model: name for name, model in contenders.items()}
    with torch.inference_mode():
        seconds = run_rounds(contenders, decode, args.rounds)
    tokens = args.batch * args.new_tokens
    print(
        f"\ndecode, batch {args.batch}: tokens/s (median), and its ratio to the base's (median of {args.rounds} rounds)"
    )
    for name, times in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(seconds["base"], times, strict=True))
        print(f"  {name:22} {tokens / statistics.median(times):9.1f} tokens/s   {ratio:.3f}")


def report_fit(contenders: Contenders, args: argparse.Namespace) -> None:
    """Seconds of a whole step (forward, backward, AdamW), and the memory that autograd keeps for the backward."""
    ids = torch.randint(3, args.vocab, (args.fit_batch, args.fit_length), device=args.device)
    trained = {name: model for name, model in contenders.items() if name not in ("base", "PEFT, X-LoRA")}
    optimizers = {
        m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4) for m in trained.values()
    }

    def step(model: torch.nn.Module) -> float:
        def run() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizers[model].step()
            optimizers[model].zero_grad()

        model.train()
        return timed(run, args)

    seconds = run_rounds(trained, step, args.rounds)
    reference = seconds["PEFT, one adapter"]
    print(
        f"\nfit step, {args.fit_batch} x {args.fit_length} tokens: "
        "seconds, ratio to PEFT with one adapter, memory kept for backward"
    )
    for name, times in seconds.items():
        ratio = statistics.median(t / r for r, t in zip(reference, times, strict=True))
        kept = activation_bytes(trained[name], ids)
        print(f"  {name:22} {statistics.median(times):9.3f} s   {ratio:.3f}   {kept / 2**20:8.1f} MiB")


def run_rounds(
    contenders: Contenders, measure: Callable[[torch.nn.Module], float], rounds: int
) -> dict[str, list[float]]:
    """Measure every contender once in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_index in range(rounds + 1):
        for name, model in contenders.items():
            gc.collect()
            elapsed = measure(model)
            if round_index:
                seconds[name].append(elapsed)
    return seconds


def timed(run: Callable[[], object], args: argparse.Namespace) -> float:
    """Wall-clock seconds of one call."""
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def activation_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes of distinct tensors that autograd keeps for the backward, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    del loss
    return sum(kept.values())


if __name__ == "__main__":
    main()

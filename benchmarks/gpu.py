"""Decode, fit and memory of a fusion beside its base, at the shapes of Llama-2-7B and Qwen3-8B, on one GPU.

    python benchmarks/gpu.py                                # about ten minutes; 30 GiB of the GPU's memory
    python benchmarks/gpu.py --shapes qwen3-8b --fit-length 2048
    python benchmarks/gpu.py --tiny                         # the same code with small shapes, on a CPU, in a minute

Weights are random and made on the device, since speed does not depend on their values: there is nothing to download.
One model is measured bare and with the adapters in it, in turn; what counts is the median ratio over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import statistics
import warnings
from collections.abc import Callable, Iterator

import torch
import transformers
from peft import LoraConfig
from speed import print_setting, timed
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config, StaticCache

from loraflow import FusedModel, LoraFlow
from loraflow.adapters import Adapter, AdapterSource
from loraflow.adapters.base import LoraModule

SHAPES: dict[str, PreTrainedConfig] = {
    "llama-2-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    ),
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
COMPILED = {"compiled": "default", "compiled, CUDA graphs": "reduce-overhead"}
MIB = 2**20


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print_setting(args)
    for name in args.shapes:
        torch.manual_seed(args.seed)
        config = shape(name, args)
        base = make_base(config, args)
        weights = sum(p.numel() * p.element_size() for p in base.parameters())
        sizes = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {weights / MIB:,.0f} MiB"
        print(f"\n== {name}: {sizes}")
        adapters = make_adapters(base, args.adapters, args.rank)
        report_decode(base, adapters, args)
        if not args.without_compile:
            report_compiled(base, adapters, args)
        report_fit(base, adapters, args)
        del base, adapters
        clear()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that this runs")
    parser.add_argument("--adapters", type=int, default=2, help="k")
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="rows decoded together")
    parser.add_argument("--prompt", type=int, default=None, help="tokens of each; default: 128, or 16 with --tiny")
    parser.add_argument("--new-tokens", type=int, default=None, help="default: 64, or 4 with --tiny")
    parser.add_argument("--fit-batch", type=int, default=4)
    parser.add_argument("--fit-length", type=int, default=None, help="tokens; default: 384, or 32 with --tiny")
    parser.add_argument("--answer", type=int, default=None, help="of them answers, at the end; default: a twelfth")
    parser.add_argument("--rounds", type=int, default=None, help="default: 5, or 1 with --tiny")
    parser.add_argument("--without-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, full, small in (("prompt", 128, 16), ("new_tokens", 64, 4), ("fit_length", 384, 32), ("rounds", 5, 1)):
        if getattr(args, name) is None:
            setattr(args, name, small if args.tiny else full)
    args.answer = args.answer or max(1, args.fit_length // 12)
    return args


def shape(name: str, args: argparse.Namespace) -> PreTrainedConfig:
    """The configuration of a shape; with `--tiny` a small one of the same architecture."""
    config = copy.deepcopy(SHAPES[name])
    if args.tiny:
        config.update(TINY)
        # The kinds of the layers are a list of their own, as long as there are layers.
        config = type(config)(**{key: value for key, value in config.to_dict().items() if key != "layer_types"})
    return config


def make_base(config: PreTrainedConfig, args: argparse.Namespace) -> PreTrainedModel:
    """A random base, made where it stays."""
    with torch.device(args.device):
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    base.generation_config.pad_token_id = 0
    base.generation_config.eos_token_id = None
    return base


def make_adapters(base: PreTrainedModel, count: int, rank: int) -> dict[str, Adapter]:
    """Random adapters of all linears of the decoder layers, in memory."""
    found = {}
    linears = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for name in (f"a{index}" for index in range(count)):
        modules = {}
        for path, linear in linears.items():
            options = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            lora_A = torch.randn(rank, linear.in_features, **options) / linear.in_features**0.5
            modules[path] = LoraModule(lora_A, torch.randn(linear.out_features, rank, **options) / 100, 1.0)
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted({path.split(".")[-1] for path in linears}))
        found[name] = Adapter(name, AdapterSource(name), lora, modules, digest=name)
    return found


@contextlib.contextmanager
def fused(base: PreTrainedModel, adapters: dict[str, Adapter]) -> Iterator[FusedModel]:
    """The base with the adapters and gates in it."""
    model = FusedModel.from_adapters(base, adapters, LoraFlow(start="average"))
    try:
        yield model
    finally:
        model.unload()


def clear() -> None:
    """Give memory back that nobody has any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_mib(run: Callable[[], object], args: argparse.Namespace) -> float | None:
    """The most memory that a call needs above what is there before it; None where the device does not tell."""
    if not args.device.startswith("cuda"):
        return None
    clear()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def alternate(
    base: PreTrainedModel, adapters: dict[str, Adapter], measure: Callable[[nn.Module], float], rounds: int
) -> tuple[list[float], list[float]]:
    """Measure the bare base and the fusion in turn, after one round that does not count."""
    bare, mixed = [], []
    for number in range(rounds + 1):
        one = measure(base)
        with fused(base, adapters) as model:
            other = measure(model)
        if number:
            bare.append(one)
            mixed.append(other)
    return bare, mixed


def said(bare: list[float], mixed: list[float], *, speed: bool) -> str:
    """The median of both and of their ratio, with its range: of the speeds, or of the costs."""
    ratios = [b / m if speed else m / b for b, m in zip(bare, mixed, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def memory_said(bare: float | None, mixed: float | None) -> str:
    """Two peaks, and the ratio."""
    if bare is None or mixed is None:
        return "not told by this device"
    return f"{mixed:,.0f} MiB against {bare:,.0f}, {mixed / max(bare, 1e-9):.3f}"


def report_decode(base: PreTrainedModel, adapters: dict[str, Adapter], args: argparse.Namespace) -> None:
    """Greedy decoding, the prompt excluded, at each batch size; and the peak of a whole answer above the weights."""
    print(
        f"decode, k = {args.adapters}, r = {args.rank}: tokens/s of base and fusion, ratio of the speeds; peak memory"
    )
    vocab = base.config.vocab_size
    for batch in args.batch:
        prompt = torch.randint(3, vocab, (batch, args.prompt), device=args.device)
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "do_sample": False}

        def answer(model: nn.Module, tokens: int, inputs: dict[str, object] = inputs) -> object:
            return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens)

        def decode(model: nn.Module, answer: Callable[..., object] = answer) -> float:
            # The prompt's forward is the same in both, so that the difference is the decoding alone.
            first, whole = (
                timed(functools.partial(answer, model, tokens), args) for tokens in (1, 1 + args.new_tokens)
            )
            return (whole - first) / args.new_tokens

        with torch.inference_mode():
            bare, mixed = alternate(base, adapters, decode, args.rounds)
            peak = peak_mib(functools.partial(answer, base, 1 + args.new_tokens), args)
            with fused(base, adapters) as model:
                fused_peak = peak_mib(functools.partial(answer, model, 1 + args.new_tokens), args)
        speeds = [batch / statistics.median(times) for times in (bare, mixed)]
        print(f"  batch {batch:3}: {speeds[0]:9.1f} {speeds[1]:9.1f}   {said(bare, mixed, speed=True)}", end="")
        print(f"   {memory_said(peak, fused_peak)}")


def report_compiled(base: PreTrainedModel, adapters: dict[str, Adapter], args: argparse.Namespace) -> None:
    """One row's decoding step with a static cache, compiled and not; what does not compile says why."""
    print("one decoding step of one row with a static cache: ms of base and fusion, ratio of the speeds")
    for name, mode in {"eager": None, **COMPILED}.items():
        if mode == "reduce-overhead" and not args.device.startswith("cuda"):
            print(f"  {name:22} needs a GPU")
            continue
        step = functools.partial(static_steps, mode=mode, args=args)
        try:
            with torch.inference_mode():
                bare, mixed = alternate(base, adapters, step, 1)
        except Exception as error:
            print(f"  {name:22} fails: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            times = [1000 * statistics.median(seconds) for seconds in (bare, mixed)]
            print(f"  {name:22} {times[0]:9.2f} {times[1]:9.2f}   {said(bare, mixed, speed=True)}")
        torch.compiler.reset()
        clear()


def static_steps(model: nn.Module, *, mode: str | None, args: argparse.Namespace) -> float:
    """Seconds of a step: the median of several, after those that compile."""
    config = model.base_model.config if isinstance(model, FusedModel) else model.config
    warm_up = 3
    cache = StaticCache(config=config, max_cache_len=args.prompt + args.new_tokens + warm_up)
    prompt = torch.randint(3, config.vocab_size, (1, args.prompt), device=args.device)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    step = model.forward if mode is None else torch.compile(model.forward, mode=mode)
    seconds = []
    for number in range(warm_up + args.new_tokens):
        at = torch.tensor([[args.prompt + number]], device=args.device)
        call = functools.partial(step, prompt[:, :1], position_ids=at, past_key_values=cache, use_cache=True)
        seconds.append(timed(call, args))
    return statistics.median(seconds[warm_up:])


def report_fit(base: PreTrainedModel, adapters: dict[str, Adapter], args: argparse.Namespace) -> None:
    """A step of a fit over its floor: the base's forward and input gradients, the head on the answers only."""
    ids = torch.randint(3, base.config.vocab_size, (args.fit_batch, args.fit_length), device=args.device)
    labels = ids.clone()
    labels[:, : -args.answer] = -100

    def floor(model: PreTrainedModel) -> None:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=args.answer + 1).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, -args.answer :].flatten()).backward()

    def step(model: FusedModel) -> None:
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    optimizers: list[torch.optim.Optimizer] = []

    def measure(model: nn.Module) -> float:
        if not isinstance(model, FusedModel):
            return timed(functools.partial(floor, model), args)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers[:] = [torch.optim.AdamW(learned, lr=1e-4)]
        return timed(functools.partial(step, model), args)

    base.requires_grad_(False)
    bare, mixed = alternate(base, adapters, measure, args.rounds)
    peak = peak_mib(functools.partial(floor, base), args)
    with fused(base, adapters) as model:
        measure(model)
        fused_peak = peak_mib(functools.partial(step, model), args)
    seconds = [statistics.median(times) for times in (bare, mixed)]
    sizes = f"{args.fit_batch} x {args.fit_length} tokens, {args.answer} of each an answer"
    print(f"fit, {sizes}: seconds of floor and step, ratio; peak memory above the weights")
    print(f"  {seconds[0]:.4f} {seconds[1]:.4f}   {said(bare, mixed, speed=False)}   {memory_said(peak, fused_peak)}")


if __name__ == "__main__":
    main()

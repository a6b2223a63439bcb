"""What every method costs: learned values, prompt passes, time of a prompt and of a token, in one run.

    python benchmarks/methods.py                       # hidden size 768, 12 layers, k = 3, r = 16
    python benchmarks/methods.py --query               # the cost of query-level weights, k = 8

A machine's speed drifts, so every method runs in every round, in turn, and what counts is the median over the rounds of
its ratio to the base in the same round. Models are random: speed does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from speed import build_base, print_setting, run_rounds, save_adapter, timed

from loraflow import AdapterCore, FusedModel, LearnedStatic, LoraFlow, LoraHub, Method, QaFlora
from loraflow.methods import METHODS, get_method

NEEDS = {
    None: "",
    "gradient": "examples of the task",
    "search": "examples of the task",
    "experts": "each adapter's data",
    "together": "adapters' data",
    "samples": "each adapter's data",
}


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
        model = FusedModel.from_adapters(copy.deepcopy(base), adapters, "average")
        if args.query:
            report_query(base, model, args)
        else:
            report_methods(model, args)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query", action="store_true", help="measure qa-FLoRA's weights only")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=None, help="default: 8/3 of hidden, as in Llama")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--adapters", type=int, default=None, help="k; default: 3, or 8 with --query")
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--prompt", type=int, nargs="+", default=None, help="tokens; default: 128, or 64 256 512")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="requests answered together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.adapters = args.adapters or (8 if args.query else 3)
    args.prompt = args.prompt or ([64, 256, 512] if args.query else [128])
    return args


def every_method(adapters: list[str]) -> dict[str, Method]:
    """All methods by the name that the table shows."""
    named: dict[str, Method] = {"base": METHODS["base"](), "one adapter": get_method(adapters[0], adapters)}
    for name in (
        "average",
        "qa-flora",
        "logo",
        "centroid",
        "lora-retriever",
        "arrow",
        "spectr",
        "norm-max",
        "lag",
        "phatgoose",
        "ramole",
    ):
        named[name] = get_method(name, adapters)
    for granularity in ("task", "layer", "module"):
        named[f"learned-static, {granularity}"] = LearnedStatic(granularity)
    named["learned-static, module, softmax"] = LearnedStatic("module", "average", "softmax")
    named["lorahub"] = LoraHub()
    named["lorahub, outputs"] = LoraHub(mixes="outputs")
    for granularity in ("step", "layer", "module"):
        named[f"lora-flow, {granularity}"] = LoraFlow(granularity, start="average")
    extras = {"reads": "normalized"}, {"scorer": "low-rank"}, {"scorer": "two-layer"}, {"scorer": "attention"}
    for extra in (*extras, {"activation": "sigmoid"}, {"top_k": 1}):
        label = " ".join(f"{key}={value}" for key, value in extra.items())
        named[f"lora-flow, layer, {label}"] = LoraFlow(start="average", **extra)
    named["adapter-core"] = AdapterCore("average")
    return named


def report_methods(model: FusedModel, args: argparse.Namespace) -> None:
    """A table of all methods: learned values, passes, time of a prompt and of a token against the base's."""
    length = args.prompt[0]
    methods = every_method(model.adapter_names)
    prompt = torch.randint(3, args.vocab, (args.batch, length), device=args.device)

    def answer(method: Method) -> tuple[float, float]:
        use(model, method)

        def generate(new_tokens: int) -> float:
            options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
            inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
            return timed(functools.partial(model.generate, **inputs, **options), args)

        # A prompt alone is short, and a short time scatters.
        first = statistics.median(generate(1) for _ in range(5))
        return first, (generate(1 + args.new_tokens) - first) / args.new_tokens

    with torch.inference_mode():
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
        for number in range(args.rounds + 1):
            for name, method in methods.items():
                seconds = answer(method)
                # The first round warms up.
                if number:
                    rounds[name].append(seconds)
    print(f"\nprompt of {length} tokens with the first one answered, and each further token: ratio to the base's time")
    print(f"(median of {args.rounds} rounds)\n")
    print("| method | paper | needs | looks at | weights differ by | learned values | passes | prompt | token |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, method in methods.items():
        use(model, method)
        prompt_ratio, token_ratio = (
            statistics.median(mine[part] / base[part] for mine, base in zip(rounds[name], rounds["base"], strict=True))
            for part in (0, 1)
        )
        learned = sum(tensor.numel() for tensor in model.state_dict().values())
        looks_at = "nothing" if method.level == "task" else method.level
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
        cells = (
            name,
            paper,
            NEEDS[method.learns],
            looks_at,
            method.place,
            f"{learned:,}",
            f"{count_passes(model, prompt):g}",
            f"{prompt_ratio:.2f}",
            f"{token_ratio:.2f}",
        )
        print(f"| {' | '.join(cells)} |")


def use(model: FusedModel, method: Method) -> None:
    """Let a method weigh; what it would learn of samples is random."""
    model.set_method(method)
    if method.learns == "samples":
        gate = model.gates["model"]
        gate.set_samples(torch.randn(len(model.adapters), 1, gate.centroids.shape[1]).unbind())


def count_passes(model: FusedModel, prompt: torch.Tensor) -> float:
    """How often a prompt goes through the first layer, until its first token is answered."""
    seen = []
    layer = model.base_model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    try:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    finally:
        hook.remove()
    return sum(seen) / prompt.numel()


def report_query(base: torch.nn.Module, model: FusedModel, args: argparse.Namespace) -> None:
    """The time of qa-FLoRA's weights in forwards of the base with full logits, and what a shared batch changes."""
    print(
        f"\nqa-FLoRA's weights, k = {args.adapters}: time in forwards of the base over the same prompt with all logits"
    )
    for length in args.prompt:
        prompt = torch.randint(3, args.vocab, (1, length), device=args.device)

        def weigh(prompt: torch.Tensor = prompt) -> torch.Tensor:
            return model.weigh(prompt, method=QaFlora())

        def forward(prompt: torch.Tensor = prompt) -> object:
            return base(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=False)

        with torch.inference_mode():
            contenders = {"forward": forward, "weights": weigh}
            seconds = run_rounds(contenders, lambda call: timed(call, args), args.rounds)
        ratios = [w / f for w, f in zip(seconds["weights"], seconds["forward"], strict=True)]
        alone = weigh()
        others = torch.randint(3, args.vocab, (3, length + 7), device=args.device)
        padded = torch.nn.functional.pad(prompt, (7, 0))
        mask = torch.nn.functional.pad(torch.ones_like(prompt), (7, 0))
        shared = model.weigh(torch.cat([others, padded]), torch.cat([torch.ones_like(others), mask]), method=QaFlora())
        difference = (shared[-1] - alone[0]).abs().max().item()
        print(
            f"  {length:4} tokens: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"largest change in a shared, padded batch {difference:.1e}"
        )


if __name__ == "__main__":
    main()

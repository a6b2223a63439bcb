"""Which adapter is chosen: by a sentence encoder, and by the base's own hidden states.

    python benchmarks/retrieval.py --encoder sentence-transformers/all-MiniLM-L6-v2
    python benchmarks/retrieval.py --encoder DIR --base DIR --xquad DIR --paper DIR

Each kind of text stands for an adapter that was trained on it: 20 of its texts make the adapter's vector, 40 others are
queries, and a query is right if its own kind is the nearest (`lora-retriever` in the mode "selection"); *in 3*: if it
is one of the three nearest. Kinds are the data of the small world's five adapters; XQuAD's questions by language
(`xquad.*.json`); and the LoRA-Flow paper's tasks by language (samples of `train`, queries of `test`). The small world's
own base reads the first, `--base` the others. The choice does not look at the adapters' weights, which are random here.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraflow import FusedModel, LoraRetriever
from loraflow.core.probe import Prompt
from loraflow.demo.samples import ADAPTER_DOCUMENTS, adapter_samples
from loraflow.demo.world import base_path
from loraflow.encoders import TextEncoder

Kinds = dict[str, tuple[list[str], list[str]]]
"""Samples and queries by kind."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="*", default=[], help="models that embed texts: Hub ids or directories")
    parser.add_argument("--instruction", default="", help="what they read before each text")
    parser.add_argument("--base", help="a base for the real texts: Hub id or directory")
    parser.add_argument("--layers", type=int, nargs="+", default=[-1], help="whose outputs of a base are compared")
    parser.add_argument("--xquad", type=Path, help="folder with xquad.en.json and others")
    parser.add_argument("--paper", type=Path, help="folder with train/ and test/ of the LoRA-Flow paper's data")
    parser.add_argument("--samples", type=int, default=20, help="texts that make an adapter's vector")
    parser.add_argument("--queries", type=int, default=40, help="of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, {versions}, seed {args.seed}")
    print(f"{args.samples} samples and {args.queries} queries of each kind\n")
    sets = {"small world": (str(base_path()), small_world(args))}
    if args.xquad is not None:
        sets["XQuAD, languages"] = (args.base, xquad(args))
    if args.paper is not None:
        sets["paper, tasks"] = (args.base, paper(args))
    print("| texts | kinds | vectors by | own kind nearest | in 3 | centred: nearest | in 3 | ms a text |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (base, kinds) in sets.items():
        report(name, base, kinds, args)


def small_world(args: argparse.Namespace) -> Kinds:
    """The data of the five adapters."""
    texts = {name: [one["prompt"] for one in adapter_samples(name, 400, args.seed)] for name in ADAPTER_DOCUMENTS}
    return {name: split(of_one, args) for name, of_one in texts.items()}


def xquad(args: argparse.Namespace) -> Kinds:
    """Questions, the same ones in each language; no question is a sample of one language and a query of another."""
    found: Kinds = {}
    for path in sorted(args.xquad.glob("xquad.*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        questions = [qa["question"] for text in data for part in text["paragraphs"] for qa in part["qas"]]
        found[path.name.split(".")[1]] = split(questions, args)
    return found


def paper(args: argparse.Namespace) -> Kinds:
    """Questions of six tasks: what the paper trains its gates on, and what it tests them on."""
    found: Kinds = {}
    for path in sorted((args.paper / "train").glob("*_train.jsonl")):
        name = path.name.removesuffix("_train.jsonl")
        samples = [row["query"] if "query" in row else row["data"][0] for row in read(path)]
        tests = [row.get("question") or row["prompt"] for row in read(args.paper / "test" / f"{name}_test.jsonl")]
        found[name] = (split(samples, args)[0], split(tests, args)[1])
    return found


def read(path: Path) -> list[dict]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split(texts: list[str], args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Samples and queries, drawn alike from lists of the same length."""
    order = random.Random(args.seed).sample(range(len(texts)), args.samples + args.queries)
    chosen = [texts[position] for position in order]
    return chosen[: args.samples], chosen[args.samples :]


def report(name: str, base: str, kinds: Kinds, args: argparse.Namespace) -> None:
    """A row for each way to make vectors."""
    for encoder in args.encoder:
        model = TextEncoder(encoder, args.instruction)
        embed = lambda text, model=model: model.embed(text, torch.device("cpu"))  # noqa: E731
        row(name, kinds, Path(encoder).name, embed)
    if base is None:
        return
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        config = LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(plain, config).save_pretrained(folder)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        fused = FusedModel.from_adapters(plain, dict.fromkeys(kinds, folder), LoraRetriever(), tokenizer=tokenizer)
        for layer in args.layers:
            method = LoraRetriever(layer=layer)
            fused.set_method(method)

            def embed(text: str, method: LoraRetriever = method) -> torch.Tensor:
                ids = fused.prompt.prompt_ids(tokenizer, [{"role": "user", "content": text}])
                prompt = Prompt(fused.attachment, torch.tensor(ids), tokenizer)
                return method.embed(prompt, fused.gates["model"])

            row(name, kinds, f"the base's layer {layer % len(plain.model.layers)}", embed)


@torch.no_grad()
def row(name: str, kinds: Kinds, by: str, embed: Callable[[str], torch.Tensor]) -> None:
    """Share of queries whose own kind is the nearest, and among the three nearest."""
    started, texts = time.process_time(), sum(len(part) for both in kinds.values() for part in both)

    def vectors(of_texts: list[str]) -> torch.Tensor:
        return torch.stack([torch.nn.functional.normalize(embed(text).double(), dim=0) for text in of_texts])

    centroids = torch.stack([vectors(samples).mean(dim=0) for samples, _ in kinds.values()])
    queries = [vectors(queries) for _, queries in kinds.values()]
    each_ms = 1000 * (time.process_time() - started) / texts
    cells = []
    for origin in (torch.zeros_like(centroids[0]), centroids.mean(dim=0)):
        orders = [((of_one - origin) @ (centroids - origin).T).argsort(dim=1, descending=True) for of_one in queries]
        places = torch.cat([order.eq(kind).int().argmax(dim=1) for kind, order in enumerate(orders)])
        cells += [f"{100 * (places < nearest).double().mean():.1f} %" for nearest in (1, 3)]
    print(f"| {name} | {len(kinds)} | {by} | {' | '.join(cells)} | {each_ms:.0f} |", flush=True)


if __name__ == "__main__":
    main()

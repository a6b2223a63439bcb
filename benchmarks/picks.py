"""How often `auto` picks the adapter that a prompt is of: samples of each adapter of the small world, k = 1.

    python benchmarks/picks.py                  # 40 prompts of each of the five adapters
    python benchmarks/picks.py --prompts 2      # a quick check that everything runs

`centroid` is fitted on other samples of the adapters; `logo` and `qa-flora` learn nothing. One pick in five is chance.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers
from speed import processor_name

from loraflow import FusedModel
from loraflow.demo.samples import adapter_samples
from loraflow.demo.world import adapter_paths, base_path
from loraflow.serving.auto import AUTO, Auto
from loraflow.serving.catalog import Catalog

METHODS = ("logo", "qa-flora", "centroid")
# Of samples: those that centroids are made of, and those that are asked.
_KNOWN, _ASKED = 1, 2


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40, help="of each adapter")
    parser.add_argument("--samples", type=int, default=20, help="of each adapter, for its centroid")
    return parser.parse_args()


def fit_centroids(folder: Path, count: int) -> str:
    """A saved fusion by centroids of samples of each adapter."""
    model = FusedModel.from_adapters(base_path(), adapter_paths(), "centroid")
    model.fit({name: adapter_samples(name, count, seed=_KNOWN) for name in model.adapter_names})
    model.save_pretrained(folder / "centroid")
    return str(folder / "centroid")


def report(method: str, fusion: str, prompts: int) -> None:
    """Print how many picks of one method are right, of each adapter and of all."""
    adapters = {name: str(path) for name, path in adapter_paths().items()}
    catalog = Catalog.open(base_path(), adapters, {"centroid": fusion}, base_id="small", auto=Auto(method, top_k=1))
    served = catalog.with_picks(catalog.find(AUTO))
    right, spent_s = dict.fromkeys(adapters, 0), 0.0
    for name in adapters:
        for sample in adapter_samples(name, prompts, seed=_ASKED):
            conversation = [{"role": "user", "content": sample["prompt"]}]
            ids = served.prompt.prompt_ids(catalog.model.tokenizer, conversation)
            started = time.process_time()
            right[name] += catalog.weigher(served, ids).adapters == (name,)
            spent_s += time.process_time() - started
    asked = prompts * len(adapters)
    each = ", ".join(f"{name} {count}" for name, count in right.items())
    print(f"{method:9} {sum(right.values())} of {asked} right ({each}); {1000 * spent_s / asked:.1f} ms a pick")


def main() -> None:
    """Measure every method."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    print(f"machine: {processor_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"python {platform.python_version()}, one thread, {arguments.prompts} prompts of each adapter, top_k 1")
    with tempfile.TemporaryDirectory() as folder:
        fusion = fit_centroids(Path(folder), arguments.samples)
        for method in METHODS:
            report(method, fusion, arguments.prompts)


if __name__ == "__main__":
    main()

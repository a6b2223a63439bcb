"""Rebuild the many world: 48 small adapters on the small world's base, from a seed, packed into one file.

    python scripts/build_many.py --output build/many

Each adapter is skipped when its folder is already there, so that an interrupted build goes on with the next. Ranks and
targets differ, as they do in a collection that many people made: they go by the adapter's place in the list, in cycles
of lengths that share no factor with the lists' own.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import zipfile
from pathlib import Path

import torch
from build_world import LINEARS, Document, Schedule, stage, train_adapter
from peft import LoraConfig

from loraflow.demo.many import SPECIALITIES, draw, speciality_of
from loraflow.demo.world import base_path

# All have one linear in common, at which LoRA on the Go compares them.
ATTENTION, FEED_FORWARD = LINEARS[:4], [LINEARS[0], *LINEARS[4:]]
RANKS = (4, 8, 4, 2, 4)
TARGETS = (LINEARS, LINEARS, ATTENTION, LINEARS, LINEARS, FEED_FORWARD, LINEARS)
# Many small steps learn more from as much reading than few large ones.
QUICK = Schedule(steps=130, batch=4, learning_rate=6e-3, parts=1)
SLOW = Schedule(steps=250, batch=4, learning_rate=6e-3, parts=1)
# Translations of single words are the furthest from what the base does.
SCHEDULES = {"add": QUICK, "take": QUICK, "where": QUICK, "seen": QUICK, "code": QUICK, "words": SLOW}


def build(name: str, adapters: Path, seed: int) -> None:
    """Train one of the 48, unless it is there."""
    torch.set_num_threads(1)
    speciality, place = speciality_of(name), list(SPECIALITIES).index(name)
    rank, targets = RANKS[place % len(RANKS)], TARGETS[place % len(TARGETS)]
    config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=list(targets), task_type="CAUSAL_LM")

    def document(rng) -> Document:
        drawn = draw(speciality, rng)
        return Document(drawn["prompt"], drawn["completion"])

    schedule = SCHEDULES[speciality.skill]
    stage(
        adapters / name,
        lambda folder: train_adapter(name, document, config, schedule, folder, base_path(), seed),
    )


def pack(adapters: Path, file: Path) -> None:
    """Pack the adapters' folders into one file; the same folders give the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name in SPECIALITIES:
            for path in sorted((adapters / name).iterdir()):
                # Its time is that of all zip files' first day.
                entry = zipfile.ZipInfo(f"{name}/{path.name}")
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                packed.writestr(entry, path.read_bytes())
    print(f"{file}: {file.stat().st_size:,} bytes")


def main() -> None:
    """Build what is missing of the many world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/many"), help="where adapters/ and many.zip go")
    parser.add_argument("--seed", type=int, default=0, help="seed of all data and all initial weights")
    parser.add_argument("--workers", type=int, default=2, help="adapters that are trained at the same time")
    arguments = parser.parse_args()
    adapters = arguments.output / "adapters"
    adapters.mkdir(parents=True, exist_ok=True)
    work = functools.partial(build, adapters=adapters, seed=arguments.seed)
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for _ in pool.imap_unordered(work, SPECIALITIES):
            pass
    pack(adapters, arguments.output / "many.zip")


if __name__ == "__main__":
    main()

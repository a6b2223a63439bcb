"""Families of bases and kinds of adapters in vLLM, tiny and random, against `generate`: the matrix of docs/vllm.md.

    .venv-vllm/bin/python -m scripts.check_vllm                    # all, some minutes; prints the matrix
    .venv-vllm/bin/python -m scripts.check_vllm --only "Phi 3"     # some families

It needs the environment of scripts/test_vllm.sh. Each family's engines run one after the other in a process of its own.
The exit code is 1 if an engine answered otherwise than `generate`, token for token in float32, or ended in an error
that is not loraflow's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.serving.vllm.families import (
    FAMILIES,
    KINDS,
    REFUSED_KINDS,
    family_adapter,
    family_base,
    family_fusion,
)
from tests.serving.vllm.world import call, engine, generated, prompts, run_engines

from loraflow import FusedModel
from loraflow.errors import LoraflowError
from loraflow.methods import LoraFlow

EXACT, WRONG = "exact", "**wrong**"
# Adapters of all these kinds in one fusion.
TOGETHER = " + ".join(KINDS)
COLUMNS = (TOGETHER, *REFUSED_KINDS)


def main() -> int:
    """Check what was asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", choices=FAMILIES, default=list(FAMILIES))
    args = parser.parse_args()
    print(f"vllm {version('vllm')}, transformers {version('transformers')}, torch {version('torch')}\n")
    print(f"| family | vLLM's class | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|", flush=True)
    reasons: dict[str, str] = {}
    failed = False
    for name in args.only:
        with tempfile.TemporaryDirectory() as root:
            architecture, cells = check_family(Path(root), name, reasons)
        print(f"| {name} | {architecture} | {' | '.join(cells)} |", flush=True)
        failed = failed or any(cell.startswith("**") for cell in cells)
    print("\n" + "\n".join(f"- {mark}: {reason}" for reason, mark in reasons.items()))
    return int(failed)


def check_family(root: Path, name: str, reasons: dict[str, str]) -> tuple[str, list[str]]:
    """The class that vLLM takes for a family, and what each kind of adapter came to."""
    base = family_base(root, name)
    (architecture,) = json.loads((base / "config.json").read_text())["architectures"]
    asked, jobs, cells = prompts(), {}, {}
    for kind in COLUMNS:
        try:
            jobs[kind] = fused(root, base, name, kind)
        except LoraflowError as error:
            # loraflow itself does not fuse it: it never comes to vLLM.
            cells[kind] = refusal(str(error), reasons)
    found = run_engines(
        [{"engine": engine(fusion, base), "calls": [call(asked), call(asked)]} for fusion in jobs.values()],
        root / "run",
        timeout_s=3600,
    )
    for (kind, fusion), one in zip(jobs.items(), found, strict=True):
        if "error" in one:
            message = one["error"].strip().splitlines()[-1]
            known = message.startswith("loraflow.errors.")
            cells[kind] = refusal(message, reasons) if known else f"**{message}**"
        else:
            expected = generated(fusion, asked)
            right = all([answer["ids"] for answer in answers] == expected for answers in one["answers"])
            cells[kind] = EXACT if right else WRONG
    return architecture, [cells[kind] for kind in COLUMNS]


def fused(root: Path, base: Path, name: str, kind: str) -> Path:
    """A saved fusion of a plain adapter and one of a kind, or of each kind that is served."""
    directory = root / kind.replace("`", "").replace(" ", "-")
    if kind == TOGETHER:
        return family_fusion(base, name, directory, list(KINDS), LoraFlow())
    adapters = {"plain": family_adapter(base, name, directory / "plain", 1)}
    adapters["other"] = family_adapter(base, name, directory / "other", 2, **REFUSED_KINDS[kind])
    FusedModel.from_adapters(base, adapters, "average").save_pretrained(directory / "fusion")
    return directory / "fusion"


def refusal(message: str, reasons: dict[str, str]) -> str:
    """The mark of a reason, noted for the list below the table; paths and names are left out."""
    text = message.partition(": ")[2] if message.startswith("loraflow.errors.") else message
    reason = " ".join(word for word in text.split() if not word.strip("().,:").startswith("/"))
    return f"refused ({reasons.setdefault(reason, str(len(reasons) + 1))})"


if __name__ == "__main__":
    sys.exit(main())

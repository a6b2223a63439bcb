"""Every architecture of the installed transformers, small and random, against slow oracles: docs/architectures.md.

    python -m scripts.check_architectures                       # all, a few minutes; writes the page
    python -m scripts.check_architectures --only deepseek_v3    # prints what each check found
    python -m scripts.check_architectures --json out.json       # keeps outcomes there, and goes on with those missing

Each architecture is a process of its own, which is ended after `--timeout` seconds. The exit code is 1 if a check found
other numbers, or ended in another error than loraflow's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from rich.progress import track
from tests.zoo.bases import architectures
from tests.zoo.checks import CHECKS
from tests.zoo.trial import STOPS, Found, try_architecture

import loraflow

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
MARKS = {"ok": "✓", "refused": "–", "unable": "·", "wrong": "**wrong**", "raw": "**error**"}
NAMES = {"ok": "right", "refused": "refused", "unable": "not possible", "wrong": "wrong", "raw": "ended in an error"}
REASONS = {
    "wrong": "Wrong",
    "raw": "Errors",
    "refused": "Refused, and why",
    "unable": "Not possible, and why",
    "not built": "Not built, and why",
    "not checked": "Not checked, and why",
    "no image": "Checked without an image, and why",
}
HEAD = """# Architectures

Every architecture of the installed transformers that generates text, small and random, with two LoRA adapters that PEFT
wrote (ranks 3 and 5), against slow oracles. Written by

```bash
python -m scripts.check_architectures
```

with {versions}. {counts}

| check | what must be equal, to 1e-5 of the adapters' own effect |
|---|---|
| one | one adapter alone: what PEFT makes of it |
| mixture | constant weights: the base with merged weights |
| cache | the same, generated token by token with the cache |
| rows | two rows with other constants each, in one batch padded on the left: each row alone, merged |
| token | a gate for each layer, weights of each token's own: the slow reference, token by token |
| token cache | the same with the cache |
| token rows | a row with gates beside a row with constants: each alone |
| module | a gate for each linear: the slow reference, with the cache and without |
| query | weights that qa-FLoRA gives a whole prompt: those of the slow reference, merged layer by layer |

✓ equal; – refused, with a message; · the base or PEFT by themselves cannot do it, or no oracle knows it. *Linears* are
all linear modules of the decoder layers that PEFT adapts as such; *without* those that read other rows than their
layer's tokens; *experts* the parameters of fused experts (`target_parameters`); *all-linear* what PEFT makes of that
word where it adapts such parameters for it; *image* has one random image before the words of every row, made without
the architecture's processor, and *tower* adapts what reads it as well. Models compute in float64 where they can; where
they give float32 by themselves, the bound is 1e-4.
"""


def main() -> int:
    """Check what was asked for, and write it down."""
    args = parse_arguments()
    found: dict[str, Found] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    wanted = args.only or architectures()
    waiting = wanted if args.only else [name for name in wanted if name not in found]
    for name in track(waiting, "Checking", disable=not sys.stderr.isatty()):
        found[name] = check_apart(name, args.timeout)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))
        if args.only:
            print(json.dumps({name: found[name]}, indent=1))
    if not args.only:
        PAGE.write_text(page({name: found[name] for name in wanted}), encoding="utf-8")
    print(summary(found))
    return 1 if any(line.kind in ("wrong", "raw") for line in lines({name: found[name] for name in wanted})) else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these `model_type`s; the page stays as it is")
    parser.add_argument("--json", type=Path, help="where outcomes are kept")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one architecture")
    return parser.parse_args()


# ---- One architecture ----------------------------------------------------------------------------------------------


def check_apart(name: str, timeout_s: float) -> Found:
    """Check one architecture in a process of its own: what is printed is dropped, what hangs is ended."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(guarded(name)))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout_s) else {"not checked": f"more than {timeout_s:.0f} s"}
    except EOFError:
        process.join()
        return {"not checked": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def guarded(name: str) -> Found:
    """What was found, or the error that the search itself ended in."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        return try_architecture(name)
    except Exception as error:
        return {"raw": f"{type(error).__name__}: {error}"}


# ---- What is written down ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One outcome, or several of the same kind and detail.

    Attributes:
        architecture: the `model_type`.
        targets: what the adapters adapt; empty where no adapter was tried.
        checks: which checks.
        kind: as in `tests.zoo.checks.Outcome`, or one of `STOPS`.
        detail: the error's size, or the message.
    """

    architecture: str
    targets: str
    checks: tuple[str, ...]
    kind: str
    detail: str


def lines(found: dict[str, Found]) -> list[Line]:
    """Everything that was found; checks of one base and targets that ended alike are one line."""
    result = []
    for name, one in found.items():
        result += [Line(name, "", (), stop, one[stop]) for stop in (*STOPS, "no image") if stop in one]
        for targets, row in one.get("targets", {}).items():
            alike: dict[tuple[str, str], list[str]] = {}
            for check, (kind, detail) in row.items():
                alike.setdefault((kind, "" if kind == "ok" else detail), []).append(check)
            result += [Line(name, targets, tuple(checks), *key) for key, checks in alike.items()]
    return result


def summary(found: dict[str, Found]) -> str:
    """A plain list, the worst first."""
    texts: dict[str, list[str]] = {}
    for line in lines(found):
        texts.setdefault(line.kind, []).append(
            ": ".join(part for part in (line.architecture, line.targets, ", ".join(line.checks), line.detail) if part)
        )
    order = ["wrong", "raw", "not checked", "refused", "not built", "no image", "unable", "ok"]
    return "\n\n".join(f"{kind} ({len(texts[kind])})\n" + "\n".join(texts[kind]) for kind in order if kind in texts)


def page(found: dict[str, Found]) -> str:
    """docs/architectures.md."""
    return "\n".join([HEAD.format(counts=counts(found), versions=versions()), *table(found), *reasons(found), ""])


def versions() -> str:
    """What it was run with."""
    names = (("torch", torch), ("transformers", transformers), ("peft", peft), ("loraflow", loraflow))
    return ", ".join(f"{name} {package.__version__.partition('+')[0]}" for name, package in names)


def counts(found: dict[str, Found]) -> str:
    """How many architectures and checks ended how."""
    stopped = Counter(next((stop for stop in STOPS if stop in one), "") for one in found.values())
    checks = Counter(
        kind for one in found.values() for row in one.get("targets", {}).values() for kind, _ in row.values()
    )
    ended = ", ".join(f"{checks[kind]} {NAMES[kind]}" for kind in NAMES if checks[kind])
    others = ", ".join(f"{stopped[stop]} {NAMES.get(stop, stop)}" for stop in STOPS if stopped[stop])
    return f"{len(found)} architectures: {stopped['']} checked, {others}. Their checks: {ended}."


def table(found: dict[str, Found]) -> list[str]:
    """Architectures and targets by checks."""
    result = [f"| architecture | targets | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 2) + "|"]
    for name, one in sorted(found.items()):
        for targets, row in one.get("targets", {}).items():
            marks = " | ".join(MARKS[row[check][0]] for check in CHECKS)
            result.append(f"| {name} | {targets} | {marks} |")
    return [*result, ""]


def reasons(found: dict[str, Found]) -> list[str]:
    """Why something was not fused, or not tried; the same reason once."""
    result = []
    for kind, title in REASONS.items():
        alike: dict[str, dict[str, list[str]]] = {}
        for line in lines(found):
            if line.kind == kind:
                where = f"{line.architecture} ({line.targets})" if line.targets else line.architecture
                alike.setdefault(general(line.detail), {}).setdefault(where, []).extend(line.checks)
        if alike:
            result += [f"## {title}", "", "| why | where |", "|---|---|"]
            result += [f"| {reason} | {', '.join(sorted(where))} |" for reason, where in sorted(alike.items())]
            result.append("")
    return result


def general(message: str) -> str:
    """A message without what is of one architecture only, in one line of a table."""
    for pattern, instead in (
        (r" \(\S*/(one|two)\)|\S*/(one|two)/", ""),
        (r"\[[^\]]{30,}\]", "[...]"),
        (r"\b[A-Z]\w*(For[A-Z]\w+|LMHeadModel|GenerationDecoder)\b", "the model"),
        (r"'\w+(\.\w+)+'", "'...'"),
        (r"\(\w*\.?(\w+\.)*layers\)", "(...)"),
    ):
        message = re.sub(pattern, instead, message)
    message = re.sub(r"`|\|", "'", message).replace("<", "(").replace(">", ")")
    return " ".join(message.split())[:400]


if __name__ == "__main__":
    sys.exit(main())

"""Try an installed `loraflow` without extras: what every command says of itself, and what a missing extra is called.

    python scripts/check_commands.py DEMO

DEMO is what `loraflow demo --output DEMO` has left. Run it with the environment's own Python.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# For each extra: the module without which a command of it cannot run, and such a command; `{demo}` is the demo's
# folder, `{base}` and `{adapters}` the small world's, `{new}` an empty one.
MISSING = {
    "quantization": ("bitsandbytes", "generate {demo}/fusion --prompt x --quantization bnb-4bit"),
    "search": (
        "nevergrad",
        "fit --base {base} --lora-modules zh-chat={adapters}/zh-chat math={adapters}/math --method lorahub "
        "--data {demo}/data/train.jsonl --output {new}/fit",
    ),
    "serve": ("uvicorn", "serve {demo}/fusion"),
    "evaluation": (
        "lm_eval",
        "compare --fusions {demo}/fusion --methods base --tasks mgsm_direct_zh --output {new}/run",
    ),
    "plots": (
        "matplotlib.figure",
        "plot layers {demo}/fusion --data {demo}/data/dev.jsonl --output {new}/figure.png",
    ),
    "data": ("datasets", "generate {demo}/fusion --data loraflow/no-such-data --output {new}/answers.jsonl"),
    "ray": ("ray", "compare methods --setting small-world --tasks zh-math --ray local --output {new}/ray"),
    "vllm": ("vllm", "serve {demo}/fusion --engine vllm"),
    "gguf": (
        "gguf",
        "export --base {base} --lora-modules zh-chat={adapters}/zh-chat math={adapters}/math --method average "
        "--to gguf --output {new}/average.gguf",
    ),
    "otel": ("opentelemetry", "serve {demo}/fusion --otlp-traces-endpoint http://localhost:4317"),
}
# Where a command needs another extra as well, that one is named first.
FIRST = {"otel": "serve"}

# What nobody needs who only uses the library.
FOR_DEVELOPERS = {"docs", "test"}
# These; what a request to a running server wants, not a command; and what wants a sentence encoder: none is here.
UNTRIED = FOR_DEVELOPERS | {"schema", "retrieval"}


def words(command: str, demo: Path, new: Path) -> list[str]:
    """A command of `MISSING` as its words."""
    from loraflow.demo.world import adapter_paths, base_path

    places = {"demo": demo, "base": base_path(), "adapters": next(iter(adapter_paths().values())).parent, "new": new}
    return [word.format(**places) for word in command.split()]


def commands() -> list[list[str]]:
    """Every command, those of groups too."""
    import typer.main

    from loraflow.cli import app

    found: list[list[str]] = [[]]
    waiting = [([], typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        for inner, below in getattr(command, "commands", {}).items():
            found.append([*name, inner])
            waiting.append(([*name, inner], below))
    return found


def run(arguments: list[str]) -> tuple[int, str]:
    """What the `loraflow` beside this Python says, on one line."""
    program = Path(sys.executable).with_name("loraflow")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def main() -> None:
    """Try everything; the first thing that is wrong ends it."""
    demo = Path(sys.argv[1]).resolve()
    for command in commands():
        status, said = run([*command, "--help"])
        if status or "Usage:" not in said:
            sys.exit(f"loraflow {' '.join(command)} --help: {said}")
        print(f"loraflow {' '.join([*command, '--help'])}")
    declared = set(importlib.metadata.metadata("loraflow").get_all("Provides-Extra") or ()) - UNTRIED
    if not declared <= set(MISSING):
        sys.exit(f"No command is tried for the extras {sorted(declared - set(MISSING))}. Add one to `MISSING`.")
    for extra, (module, command) in MISSING.items():
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            print(f"{extra}: {module} is installed, so nothing is missing")
            continue
        with tempfile.TemporaryDirectory() as new:
            status, said = run(words(command, demo, Path(new)))
        named = rf"pip install 'loraflow\[({extra}|{FIRST.get(extra, extra)})\]'"
        if status != 1 or not re.search(named, said) or "Traceback" in said:
            sys.exit(f"loraflow {command} without the extra {extra} ({status}): {said[-600:]}")
        print(f"{extra}: named by loraflow {command.split()[0]}")


if __name__ == "__main__":
    main()

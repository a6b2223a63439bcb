"""Every kind of adapter on a tiny base, beside PEFT: the last table of docs/adapters.md.

    python -m scripts.check_adapters    # half a minute; writes the table, and prints it

The exit code is 1 if one is accepted with other numbers than PEFT's, or ends in another error than loraflow's.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import transformers
from tests.zoo.attempt import Outcome, attempt
from tests.zoo.kinds import KINDS

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
BEGIN, END = "<!-- written by `python -m scripts.check_adapters` -->", "<!-- end of what it wrote -->"
TEXTS = {
    "equal": "equal to PEFT",
    "as saved": "read as PEFT saved it; {}",
    "refused": "refused: {}",
    "wrong": "**{}**",
    "raw": "**{}**",
}


def main() -> int:
    """Try all kinds, and write the table."""
    transformers.logging.set_verbosity_error()
    outcomes = [(kind, attempt(kind)) for kind in KINDS]
    table = ["| kind | outcome |", "|---|---|", *(f"| {kind.title} | {cell(outcome)} |" for kind, outcome in outcomes)]
    print("\n".join(table))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text("\n".join([before + BEGIN, *table, after]), encoding="utf-8")
    return 1 if any(outcome.kind in ("wrong", "raw") for _, outcome in outcomes) else 0


def cell(outcome: Outcome) -> str:
    """An outcome in a cell of the table; long messages are cut."""
    detail = outcome.detail.translate(str.maketrans({"`": "'", "<": "(", ">": ")", "|": r"\|", "*": r"\*"}))
    return TEXTS[outcome.kind].format(textwrap.shorten(detail, 220, placeholder=" ..."))


if __name__ == "__main__":
    sys.exit(main())

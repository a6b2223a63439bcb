"""The page at `/`: a chat in which every token has the colour of the adapter that dominates it.

It is one answer, `page.html` with `page.css` and `page.js` in it; the browser may run nothing else, and may ask nobody
but this server.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

from loraflow.visual.colours import PALETTE
from loraflow.visual.trace import EVEN

# Underlines, so that colour is not alone in telling adapters apart.
_STROKES = ("solid", "dashed", "dotted", "double", "wavy", "solid", "dashed", "dotted")


@dataclass(frozen=True)
class Page:
    """What a browser gets.

    Attributes:
        html: the whole page.
        headers: with the policy that admits its own script and style, and nothing else.
    """

    html: str
    headers: dict[str, str]


def make_page() -> Page:
    """The page and its headers, the same for every server."""
    template, style, script = (
        files("loraflow.serving").joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    parts = {"style": style + _adapter_styles(), "script": script, "even": str(EVEN), "colours": str(len(PALETTE))}
    policy = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "script-src": _digest(parts["script"]),
        "style-src": _digest(parts["style"]),
        # The icon, which stands in the page; without one, browsers ask for /favicon.ico.
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Page(re.sub(r"\{\{([a-z]+)\}\}", lambda found: parts[found[1]], template), headers)


def _adapter_styles() -> str:
    """A rule for each colour; adapters beyond the last begin again, and have their letters."""
    rules = [
        f'[data-colour="{i}"] {{ --colour: {colour}; --stroke: {_STROKES[i]}; --thickness: {2 if i < 5 else 4}px }}'
        for i, colour in enumerate(PALETTE)
    ]
    return "\n".join(["", *rules, ""])


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

"""The page at `/`: a chat in which every token has the colour of the adapter that dominates it.

It is one answer, `web/page.html` with its style and script in it (`visual.pages`); the browser may run nothing else,
and may ask nobody but this server. Adapters beyond the last colour begin again, and have their letters.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraflow.visual.colours import PALETTE, adapter_styles
from loraflow.visual.pages import policy_source, read_page


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
    page = read_page("loraflow.serving", "page", adapter_styles("data-colour", len(PALETTE)))
    policy = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "script-src": policy_source(page.script),
        "style-src": policy_source(page.style),
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
    return Page(page.html(), headers)

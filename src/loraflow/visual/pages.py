"""Pages in one file: a browser loads nothing else for them, and runs only the script whose digest they name.

A page of a package is `web/NAME.html` with `NAME.css` and `NAME.js` in it. Before its own style and script stand
`web/weights.css` and `web/weights.js` of this package, which all pages share; after its style the adapters' colours.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

from loraflow.visual.colours import PALETTE
from loraflow.visual.dominance import EVEN


@dataclass(frozen=True)
class PageFiles:
    """What a page is made of.

    Attributes:
        template: HTML with placeholders such as `{{script}}`.
    """

    template: str
    style: str
    script: str

    def html(self, **values: str) -> str:
        """The page, each placeholder filled with the value of its name."""
        constants = {"even": str(EVEN), "colours": str(len(PALETTE))}
        parts = {"style": self.style, "script": self.script, **constants, **values}
        # All at once: what stands in a title or a token is never taken for a placeholder.
        return re.sub(r"\{\{([a-z_]+)\}\}", lambda found: parts[found[1]], self.template)


def read_page(package: str, name: str, adapter_styles: str) -> PageFiles:
    """The files of a page, with what all pages share.

    Args:
        package: where its folder `web` is.
        name: of the files, without their endings.
        adapter_styles: `colours.adapter_styles` of the adapters that it shows.
    """
    template, style, script = (_read(package, f"{name}.{kind}") for kind in ("html", "css", "js"))
    shared_style, shared_script = (_read("loraflow.visual", f"weights.{kind}") for kind in ("css", "js"))
    return PageFiles(template, f"{shared_style}\n{style}\n{adapter_styles}", f"{shared_script}\n{script}")


def policy_source(content: str) -> str:
    """What admits a script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _read(package: str, file: str) -> str:
    return files(package).joinpath("web", file).read_text(encoding="utf-8")

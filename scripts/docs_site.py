"""What MkDocs is told while it builds the site: links out of docs/, and the pages of the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?P<target>(?:\.\./)+[^)\s]+)\)")
_COMMANDS = "<!-- every command -->"


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """One page's Markdown, as it is on the site."""
    here = Path(page.file.abs_src_path).parent
    repository = (config.repo_url or "").rstrip("/")

    def link(match: re.Match[str]) -> str:
        target = (here / match["target"].partition("#")[0]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        # A file of the repository: where that is online, if it is said.
        path = target.relative_to(ROOT)
        return f"[{match[1]}]({repository}/blob/main/{path})" if repository else match[1]

    markdown = _OUTSIDE.sub(link, markdown)
    return markdown.replace(_COMMANDS, command_pages()) if _COMMANDS in markdown else markdown


def command_pages() -> str:
    """Every command with its options, as Markdown, by typer."""
    import typer.main
    from typer.cli import get_docs_for_click

    from loraflow.cli import app

    command = typer.main.get_command(app)
    context = command.make_context("loraflow", ["--help"], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="loraflow")
    # Its own title is the page's.
    return re.sub(r"\A# .*\n", "", text)

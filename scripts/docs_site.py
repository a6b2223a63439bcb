"""What MkDocs is told while it builds the site: links out of docs/, the pages of the command line, and notebooks."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?P<target>(?:\.\./)+[^)\s]+)\)")
_COMMANDS = "<!-- every command -->"
# A link to a notebook's page; one to its file says that it is a download.
_NOTEBOOK = re.compile(r"\]\((?P<path>[\w./-]+)\.ipynb\)(?!\{)")


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    """Each notebook as a page; its file stays beside it, to be taken away."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        content = json.loads(Path(notebook.abs_src_path).read_text(encoding="utf-8"))
        name = notebook.src_uri.rpartition("/")[2]
        page = File.generated(
            config, notebook.src_uri.removesuffix("ipynb") + "md", content=notebook_page(content, name)
        )
        files.append(page)
    return files


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """A notebook's cells and what they showed, as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts.extend(_shown(output) for output in cell["outputs"])
    # Behind the title, which is the first line of the first cell.
    title, _, rest = parts[0].partition("\n")
    parts[0] = f'{title}\n\n[This page as a notebook]({name}){{ download="{name}" }}\n{rest}'
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    """One output: a picture or a page's part as it is, anything else as text."""
    if output["output_type"] == "stream":
        return _text("".join(output["text"]))
    data = {kind: "".join(content) for kind, content in output.get("data", {}).items()}
    if "image/png" in data:
        picture = "".join(data["image/png"].split())
        return f'<img class="notebook-figure" alt="Figure" src="data:image/png;base64,{picture}">'
    if "text/markdown" in data:
        return data["text/markdown"]
    if "text/html" in data and "<pre" not in data["text/html"] and "<progress" not in data["text/html"]:
        return f'<div class="notebook-output">{data["text/html"]}</div>'
    return "" if "<progress" in data.get("text/html", "") else _text(data["text/plain"])


def _text(text: str) -> str:
    return f'<pre class="notebook-output">{escape(text.rstrip())}</pre>'


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """One page's Markdown, as it is on the site."""
    here = ROOT / "docs" / Path(page.file.src_uri).parent
    repository = (config.repo_url or "").rstrip("/")

    def link(match: re.Match[str]) -> str:
        target = (here / match["target"].partition("#")[0]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        # A file of the repository: where that is online, if it is said.
        path = target.relative_to(ROOT)
        return f"[{match[1]}]({repository}/blob/main/{path})" if repository else match[1]

    markdown = _OUTSIDE.sub(link, _NOTEBOOK.sub(r"](\g<path>.md)", markdown))
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

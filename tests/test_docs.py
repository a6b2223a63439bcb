"""What README and docs say can be done: commands and options exist, imports work, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest
import typer.main

from loraflow.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAM = typer.main.get_command(app)
INLINE = re.compile(r"`(loraflow [a-z][^`]*)`")


def blocks(page, language):
    return [
        textwrap.dedent(match[2]) for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if match[1] == language
    ]


def commands(page):
    """Every `loraflow` command of a page, as its words."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += INLINE.findall(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    found = [shlex.split(line, comments=True) for line in lines if re.search(r"(^|\s)loraflow [a-z]", line)]
    return [words[words.index("loraflow") + 1 :] for words in found if "loraflow" in words]


def unknown_words(words):
    """Of the words behind `loraflow`, the command and the options that there are not."""
    command, rest = PROGRAM, words
    while rest and hasattr(command, "commands") and rest[0].isidentifier() | ("-" in rest[0]):
        if rest[0] not in command.commands:
            return {rest[0]}
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    return {word.partition("=")[0] for word in rest if word.startswith("--")} - known


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_options_exist(page):
    for words in commands(page):
        assert not unknown_words(words), f"{page.name}: loraflow {shlex.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_parses_and_imports(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("loraflow"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: from {node.module} import {name.name}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {target}"


def test_pages_have_commands():
    # What finds nothing tests nothing.
    assert sum(len(commands(page)) for page in PAGES) > 30


def test_every_extra_is_named_where_one_installs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    named = re.findall(r"^pip install 'loraflow\[(\w+)\]' *#", page, re.MULTILINE)
    assert sorted(named) == sorted(extras.keys() - {"docs", "test"})


def test_no_page_is_in_the_navigation_twice():
    pages = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pages) == len(set(pages))
    files = [file.relative_to(ROOT / "docs") for file in (ROOT / "docs").rglob("*.*")]
    # A notebook is a page of its name.
    assert set(pages) == {str(file.with_suffix(".md")) for file in files if file.suffix in (".md", ".ipynb")}


def test_the_readme_fits_two_screens_and_its_table_is_the_small_world_s():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## More")[0]
    assert len(text.splitlines()) <= 90
    world = (ROOT / "docs" / "world.md").read_text(encoding="utf-8")
    means = re.findall(r"^\| .* \| ([\d.]+ \[[\d., ]+\]) \|$", text, re.MULTILINE)
    assert len(means) > 5
    for mean in means:
        assert re.search(rf"\| {re.escape(mean)}\*? \|$", world, re.MULTILINE), mean

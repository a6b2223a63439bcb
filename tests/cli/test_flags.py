"""The library's messages on the command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

import loraflow
from loraflow.cli import app
from loraflow.cli.flags import _FLAGS, with_flags


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Say `allow_code=True`, or leave it out.", "Say --allow-code, or leave it out."),
        ('Now: `adapters={"zh": ...}`.', "Now: --lora-modules zh=...."),
        ("Give `adapters=...`, or a fusion.", "Give --lora-modules, or a fusion."),
        ("there is no `setting`. Take `setting='x'`.", "there is no `setting`. Take --setting x."),
        ('`weights={"zh": 0.5, "math": 0.5}`', '--method-option \'weights={"zh": 0.5, "math": 0.5}\''),
        ("`overwrite` (=3), `bias='none'` and `top_k` stay.", "`overwrite` (=3), `bias='none'` and `top_k` stay."),
    ],
)
def test_parameters_become_flags(message, shown):
    assert with_flags(message) == shown


@pytest.fixture(scope="module")
def flags():
    """Every flag of every command."""

    def of(command):
        own = {flag for parameter in command.params for flag in parameter.opts}
        return own.union(*map(of, getattr(command, "commands", {}).values()))

    return of(get_command(app))


def test_every_flag_is_one(flags):
    assert {flag for shown in _FLAGS.values() for flag in re.findall(r"--[a-z-]+", shown)} <= flags


def test_the_library_names_no_flags(flags):
    root = Path(loraflow.__file__).parent
    found = []
    for file in sorted(root.rglob("*.py")):
        if file.is_relative_to(root / "cli") or file.is_relative_to(root / "serving" / "vllm"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found += [
                    (file.name, flag) for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value) if flag in flags
                ]
    # What vLLM is to be started with, and that it is the way to what our own server refuses.
    assert {("files.py", "--lora-modules")} < set(found)
    assert {flag for file, flag in found if file != "files.py"} == {"--engine"}

"""The house: rooms import one way, in the order of CONTRIBUTING's table, and use one another's public names only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "loraflow"
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {".".join(("loraflow", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in FILES}
ROOMS = re.findall(r"^\| `(\w+)/?` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
LONGEST_FUNCTION, LONGEST_MODULE = 60, 450

# Names of other libraries' that have no public way in.
BORROWED = {
    "_apply_gate",  # transformers: what is between the matrices of experts
    "_attn_implementation",  # transformers: which attention a model runs
    "_checkpoint_conversion_mapping",  # transformers: old names, in models with code of their own
    "_exit",  # os
    "_experts_implementation",  # transformers: how the matrices of experts are multiplied
    "_get_in_out_features",  # peft: the sizes of any linear
    "_hf_hook",  # accelerate: device maps
    "_maybe_include_all_linear_layers",  # peft: what "all-linear" is
    "_modules",  # torch: what stands under a module's names
    "_model_mapping",  # transformers: which models are causal language models
    "_n_gpu",  # transformers: replicas of a model
    "_old_forward",  # accelerate: device maps
    "_version",  # torch: how often a tensor was changed in place
}


def room_of(module: str) -> str:
    return module.removesuffix(".__init__").split(".")[1] if module.count(".") else ""


def imported(path: Path, *, strings: bool = True) -> Iterator[tuple[str, int]]:
    """Every module that a file names: in imports, wherever they stand, and in strings of a dotted path."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if {inner, f"{inner}.__init__"} & MODULES.keys() else str(node.module)), node.lineno
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.fullmatch(r"(loraflow(?:\.\w+)+)(?::\w+)?", node.value)
            if found and any(module == found[1] or module.startswith(f"{found[1]}.") for module in MODULES):
                yield found[1], node.lineno


def own_imports(module: str, *, strings: bool = True) -> list[tuple[str, int]]:
    found = imported(MODULES[module], strings=strings)
    return [(name, line) for name, line in found if name.split(".")[0] == "loraflow"]


def test_every_room_is_in_the_table():
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(ROOMS) == there - {"__init__", "__pycache__"}
    assert len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__init__")])
def test_rooms_import_from_rooms_above_them(module):
    mine = ROOMS.index(room_of(module))
    for name, line in own_imports(module):
        if name == "loraflow":
            continue
        assert ROOMS.index(room_of(name)) <= mine, f"{module}:{line} imports {name}, which stands below it"


def test_no_modules_import_one_another():
    graph = {
        module: {name for name, _ in own_imports(module, strings=False) if name in MODULES and name != module}
        for module in MODULES
        if not module.endswith("__init__")
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_underscore_names_are_used_where_they_are_defined(module):
    text = MODULES[module].read_text(encoding="utf-8")
    own = set(re.findall(r"(?:self|cls)\.(_[a-z]\w*)|def (_[a-z]\w*)|^\s+(_[a-z]\w*)\s*[:=]", text, re.MULTILINE))
    own = {name for group in own for name in group if name} | BORROWED
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            assert of_itself or of_super or node.attr in own, f"{module}:{node.lineno} uses {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("loraflow"):
            names = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"]
            assert not names, f"{module}:{node.lineno} imports {names}"
            if "._" in str(node.module):
                assert room_of(str(node.module)) == room_of(module), f"{module}:{node.lineno} imports {node.module}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_short(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # What it does: signatures and docstrings are as long as they have to be.
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= LONGEST_FUNCTION, f"{module}:{node.name} has {lines} lines"

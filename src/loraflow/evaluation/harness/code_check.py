"""Whether a code task hands what a model wrote to the sandbox, and to nothing else.

A task's functions are trusted as any installed code is, and may be careless: this reads their source, and that of the
modules beside it which they import, for the ways to run code, by whatever name they are reached.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from loraflow.errors import SandboxError
from loraflow.evaluation.harness.code_eval import METRIC, Replacement, SandboxedCodeEval
from loraflow.evaluation.sandbox import run_many, run_tests
from loraflow.evaluation.scoring import CodeTests, get_scorer

_SANDBOX = (run_tests, run_many, get_scorer, CodeTests, SandboxedCodeEval)

# What runs code or programs outside the sandbox. All of some modules does, and names of others.
_RUNNER_MODULES = {"subprocess", "multiprocessing", "concurrent", "ctypes", "pty", "runpy", "code", "codeop", "pexpect"}
_RUNNER_MODULES |= {"_posixsubprocess", "IPython", "human_eval", "evalplus", "bigcode_eval"}
_BUILTINS = frozenset({"exec", "eval", "compile", "__import__"})
_OS_RUNNERS = ("system", "popen", "exec", "spawn", "posix_spawn", "fork", "startfile")
_OTHERS = {
    "asyncio": ("create_subprocess_exec", "create_subprocess_shell", "subprocess"),
    "cProfile": ("run", "runctx"),
    "importlib": ("__import__", "import_module", "machinery", "*"),
    "importlib.util": ("module_from_spec", "spec_from_file_location"),
    "marshal": ("load", "loads"),
    "pdb": ("run", "runeval"),
    "profile": ("run", "runctx"),
    "sys.modules": ("get", "pop", "values", "items", "*"),
    "timeit": ("Timer", "repeat", "timeit"),
}
# Modules whose names are looked at one by one, so that they may not be handed around whole.
_GUARDED = frozenset({"os", "posix", "nt", "builtins", "importlib", "sys.modules"})
_IMPORTERS = frozenset({"importlib.import_module", "builtins.__import__"})


def check_code_task(task: str, functions: Any, replacement: Replacement) -> None:
    """Refuse a task that runs generated code by any other means than the sandbox.

    This finds those that hand a model's answer to something else, as lm-eval's `cruxeval` and `longproc` do.

    Args:
        task: the task's name.
        functions: its functions and classes, anywhere in mappings and lists.
        replacement: what was asked for while it was loaded.

    Raises:
        SandboxError: if its functions use neither `code_eval` nor the sandbox, or run code by themselves.
    """
    modules = {id(module): module for module in map(inspect.getmodule, _functions(functions)) if module is not None}
    sources: dict[Path | str, _Source] = {}
    for module in modules.values():
        _follow(_source_of(module), sources)
    for source in sources.values():
        means = source.own_means()
        if means is not None:
            raise SandboxError(
                f"The task {task!r} is refused: {source.name} runs code by {means}, outside the sandbox. Tasks may "
                "run code by `code_eval` or by `loraflow.evaluation.sandbox`."
            )
    if not replacement.asked and not any(source.uses_sandbox() for source in sources.values()):
        raise SandboxError(
            f"The task {task!r} is refused: it says that it runs code (`unsafe_code`), and uses neither `code_eval` "
            "nor `loraflow.evaluation.sandbox` for it."
        )


def own_means(module: ModuleType) -> str | None:
    """How a module runs code by itself, or None."""
    return _source_of(module).own_means()


def _functions(value: Any) -> Iterator[Callable[..., Any]]:
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _functions(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _functions(each)
    elif callable(value):
        yield value


@dataclass(frozen=True)
class _Source:
    """A module as it is written and, if it is loaded, as it is.

    Attributes:
        name: for messages.
        values: what the loaded module's names are.
        tree: its source; None if that cannot be read.
        path: its file.
        trusted: whether it is of a library that has no task in it.
    """

    name: str
    values: Mapping[str, Any]
    tree: ast.Module | None
    path: Path | None
    trusted: bool = False

    def own_means(self) -> str | None:
        """How it runs code by itself, or None."""
        if self.trusted:
            return None
        for value in self.values.values():
            if getattr(value, "name", None) == METRIC and not _is_sandboxed(value):
                return "the stock `code_eval`"
        if self.tree is None:
            return "means that cannot be read"
        named = next(filter(None, map(_as_runner, self.reached())), None)
        return named or next(filter(None, map(_value_as_runner, self.values.values())), None)

    def uses_sandbox(self) -> bool:
        """Whether it holds, or names, what runs code in the sandbox."""
        if any(map(_is_sandboxed, self.values.values())):
            return True
        return any(name.startswith("loraflow.") and _is_sandboxed(_found(name)) for name in self.reached())

    def reached(self) -> Iterator[str]:
        """The full names of all that it imports or uses of what it has imported; `*` where that is not written."""
        if self.tree is not None:
            yield from _Names(self.tree).reached()


def _source_of(module: ModuleType) -> _Source:
    package = module.__name__.partition(".")[0]
    trusted = package == "loraflow" or (package == "lm_eval" and not module.__name__.startswith("lm_eval.tasks."))
    try:
        path, tree = Path(inspect.getfile(module)), ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return _Source(module.__name__, vars(module), None, None, trusted)
    return _Source(module.__name__, vars(module), tree, path, trusted)


def _follow(source: _Source, found: dict[Path | str, _Source]) -> None:
    """Add a module and, where it is a task's, the modules of its folder that it imports."""
    key = source.path or source.name
    if key in found:
        return
    found[key] = source
    if source.trusted or source.path is None or source.tree is None:
        return
    for path in _imported_files(source.tree, source.path):
        loaded = [module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == str(path)]
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            tree = None
        _follow(_Source(path.stem, vars(loaded[0]) if loaded else {}, tree, path), found)


def _imported_files(tree: ast.Module, path: Path) -> Iterator[Path]:
    """The files of the imported modules that lie in the folder, or are of lm-eval's other tasks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(path.parent, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[max(0, node.level - 1)]
            module = f"{node.module}." if node.module else ""
            names = [(base, f"{module}{alias.name}") for alias in node.names] + [(base, module.rstrip("."))]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            # `import_module("helpers")`, by whatever name; a constant of another meaning names no file.
            names = [(path.parent, str(node.args[0].value).lstrip("."))]
        else:
            continue
        for folder, name in names:
            if name.startswith("lm_eval.tasks.") and "lm_eval" in sys.modules:
                folder = Path(str(sys.modules["lm_eval"].__file__)).parents[1]
            if all(part.isidentifier() for part in name.split(".")):
                place = folder.joinpath(*name.split("."))
                yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


def _as_runner(name: str) -> str | None:
    """A full name as messages say it, if it is of what runs code."""
    parts = name.split(".")
    if parts[0] in _RUNNER_MODULES:
        return f"`{parts[0]}`"
    for start, part in enumerate(parts):
        # Libraries import these too: `shutil.os.system`, `tempfile._os.system`.
        part, tail = part.lstrip("_"), parts[start + 1] if start + 1 < len(parts) else ""
        if start and part in ("subprocess", "ctypes"):
            return f"`{name}`"
        if part in ("os", "posix", "nt") and tail.startswith((*_OS_RUNNERS, "*", "__dict__")):
            return f"`{part}.{tail}`"
        if part == "builtins" and tail in {*_BUILTINS, "*", "__dict__"}:
            return f"`{tail if tail in _BUILTINS else name}`"
    module, _, own = name.rpartition(".")
    return f"`{name}`" if own in _OTHERS.get(module, ()) else None


def _value_as_runner(value: Any) -> str | None:
    """What runs code, if a module holds it under whatever name."""
    if isinstance(value, ModuleType):
        return f"`{value.__name__}`" if value.__name__.partition(".")[0] in _RUNNER_MODULES else None
    for place in (builtins, os, importlib):
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and getattr(place, name, None) is value:
            return _as_runner(f"{place.__name__}.{name}")
    return None


def _is_sandboxed(value: Any) -> bool:
    if isinstance(value, SandboxedCodeEval | CodeTests) or any(value is each for each in _SANDBOX):
        return True
    if isinstance(value, ModuleType):
        return value.__name__ == "loraflow.evaluation.sandbox"
    if not isinstance(value, FunctionType) or not value.__module__.startswith("loraflow."):
        return False
    return any(value.__globals__.get(name) is each for name in value.__code__.co_names for each in _SANDBOX)


def _found(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return None


class _Names:
    """What the names in a module stand for, by its imports and assignments wherever they are."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        own = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        self.origins = {node.name: "" for node in tree.body if isinstance(node, own)}
        assigned = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    self.origins[name] = alias.name if alias.asname else name
            elif isinstance(node, ast.ImportFrom):
                prefix = "" if node.level else f"{node.module}."
                self.origins |= {alias.asname or alias.name: f"{prefix}{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                assigned += [(target.id, node.value) for target in targets if isinstance(target, ast.Name)]
        # A name may be assigned before, in the text, what it is made of is.
        for _ in range(2):
            for name, value in assigned:
                origin = self.full_name(value)
                if origin:
                    self.origins[name] = origin

    def full_name(self, node: ast.AST) -> str:
        """`os.system` for all ways to write it; empty for what is not of an imported module or a builtin."""
        match node:
            case ast.Name(id="__builtins__"):
                return "builtins"
            case ast.Name(id=name):
                return self.origins.get(name, f"builtins.{name}" if hasattr(builtins, name) else "")
            case ast.Attribute(value=base, attr=name):
                return self._member(base, name)
            case ast.Call(func=func, args=[base, key, *_]) if self.full_name(func) == "builtins.getattr":
                return self._member(base, key)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if self.full_name(func) in _IMPORTERS:
                return name
            case ast.Subscript(value=base, slice=ast.Constant(value=str(name))) if (
                self.full_name(base) == "sys.modules"
            ):
                return name
            case ast.Subscript(value=base, slice=ast.Name(id="__name__")) if self._is_modules(base):
                return ""
            case ast.Subscript(value=base, slice=key) if self.full_name(base) in ("builtins", "sys.modules"):
                return self._member(base, key)
        return ""

    def _is_modules(self, node: ast.expr) -> bool:
        return self.full_name(node) == "sys.modules"

    def _member(self, base: ast.expr, key: ast.expr | str) -> str:
        match key:
            case str(name) | ast.Constant(value=str(name)):
                pass
            case _:
                name = "*"
        whole = self.full_name(base)
        return f"{whole}.{name}" if whole else ""

    def reached(self) -> Iterator[str]:
        """Every full name that is imported or used, and `module.*` where a guarded module is handed on whole."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name for name in names if name not in _IMPORTERS)
            elif isinstance(node, ast.Constant) and node.value == "__builtins__":
                yield "builtins.*"
            elif isinstance(node, ast.Name | ast.Attribute | ast.Subscript | ast.Call):
                name = self.full_name(node)
                if name and self._counts(node, name):
                    yield f"{name}.*" if name in _GUARDED else name

    def _counts(self, node: ast.expr, name: str) -> bool:
        """Whether a name is used here for itself, and not as the beginning of a longer one."""
        parent = self.parents.get(node)
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return False
        if name in _IMPORTERS and isinstance(parent, ast.Call) and parent.func is node and self.full_name(parent):
            return name == "builtins.__import__"
        if name not in _GUARDED:
            return True
        if isinstance(parent, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.Compare | ast.Expr):
            return False
        if isinstance(parent, ast.Call) and parent.args and parent.args[0] is node:
            return self.full_name(parent.func) not in ("builtins.getattr", "builtins.hasattr")
        return not isinstance(parent, ast.Attribute | ast.Subscript)

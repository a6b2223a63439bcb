"""Whether a code task hands what a model wrote to the sandbox, and to nothing else.

A task's functions are trusted as any installed code is, and may be careless: this reads their source, and that of the
modules beside it which they import, for the ways to run code, by whatever name they are reached.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from loraflow.errors import SandboxError
from loraflow.evaluation.harness.code_eval import METRIC, Replacement, SandboxedCodeEval
from loraflow.evaluation.sandbox import run_many, run_tests
from loraflow.evaluation.scoring import CodeTests, get_scorer

_SANDBOX = (run_tests, run_many, get_scorer, CodeTests, SandboxedCodeEval)
# Full names of what runs code or programs outside the sandbox; `*` is any name. The group is what messages say.
_RUNNER = re.compile(
    r"^(subprocess|multiprocessing|concurrent|ctypes|pty|runpy|code|codeop|pexpect|_posixsubprocess|IPython|human_eval"
    r"|evalplus|bigcode_eval)\b"
    # Libraries import these too: `shutil.os.system`, `tempfile._os.system`.
    r"|(?:^|\.)_?((?:os|posix|nt)\.(?:(?:system|popen|exec|spawn|posix_spawn|fork|startfile)\w*|\*|__dict__))"
    r"|\._?(subprocess|ctypes)\b"
    r"|(?:^|\.)builtins\.(exec|eval|compile|__import__)\b|(?:^|\.)(builtins\.(?:\*|__dict__))"
    r"|^(asyncio\.(?:create_subprocess_exec|create_subprocess_shell|subprocess)|c?[pP]rofile\.run(?:ctx)?|marshal\.loads?"
    r"|importlib\.(?:__import__|import_module|machinery|\*|util\.(?:module_from_spec|spec_from_file_location))"
    r"|pdb\.run(?:eval)?|sys\.modules\.(?:get|pop|values|items|\*)|timeit\.(?:Timer|repeat|timeit))(?:\.|$)"
)
# Modules whose names are looked at one by one, so that they may not be handed around whole.
_GUARDED = frozenset({"os", "posix", "nt", "builtins", "importlib", "sys.modules"})
_IMPORTERS = frozenset({"importlib.import_module", "builtins.__import__"})


def check_code_task(task: str, functions: Any, replacement: Replacement) -> None:
    """Refuse a task that runs generated code by any other means than the sandbox.

    This finds those that hand a model's answer to something else, as lm-eval's `cruxeval` and `longproc` do.

    Raises:
        SandboxError: if its functions use neither `code_eval` nor the sandbox, or run code by themselves.
    """
    sources: dict[str, _Source] = {}
    for module in filter(None, map(inspect.getmodule, _functions(functions))):
        _Source(module.__name__, vars(module)).follow(sources)
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
    return _Source(module.__name__, vars(module)).own_means()


def _functions(value: Any) -> Iterator[Callable[..., Any]]:
    if isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _functions(each)
    elif callable(value):
        yield value


class _Source:
    """A module as it is written (in its file) and, if it is loaded, as it is (its values)."""

    def __init__(self, name: str, values: Mapping[str, Any], file: Path | None = None) -> None:
        self.name, self.values = name, values
        self.file = file or Path(str(values.get("__file__")))
        # A library that has no task in it.
        self.trusted = re.match(r"loraflow(\.|$)|lm_eval(\.(?!tasks\.)|$)", name) is not None
        self.reached: list[str] | None = None
        with contextlib.suppress(OSError, ValueError, SyntaxError):
            self.reached = None if self.trusted else list(_Names(ast.parse(self.file.read_text("utf-8"))).reached())

    def follow(self, found: dict[str, _Source]) -> None:
        """Add it and the modules that it imports from its folder, or from lm-eval's other tasks."""
        key = self.name if self.reached is None else str(self.file)
        if key in found:
            return
        found[key] = self
        for name in self.reached or ():
            parts = name.lstrip(".").split(".")
            folder = self.file.parents[max(len(name) - len(name.lstrip(".")), 1) - 1]
            if parts[:2] == ["lm_eval", "tasks"] and "lm_eval" in sys.modules:
                folder = Path(str(sys.modules["lm_eval"].__file__)).parents[1]
            for place in (folder.joinpath(*parts[: end + 1]) for end in range(len(parts))):
                for file in (place.with_suffix(".py"), place / "__init__.py"):
                    if file.is_file():
                        loaded = (m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(file))
                        _Source(place.name, vars(next(loaded, object)), file).follow(found)

    def own_means(self) -> str | None:
        """How it runs code by itself, or None."""
        if self.trusted:
            return None
        if any(getattr(value, "name", None) == METRIC and not _is_sandboxed(value) for value in self.values.values()):
            return "the stock `code_eval`"
        if self.reached is None:
            return "means that cannot be read"
        own = self.values.get("__name__")
        held = (_name_of(value) for value in self.values.values() if getattr(value, "__module__", None) != own)
        runner = next(filter(None, map(_RUNNER.search, (*self.reached, *held))), None)
        return None if runner is None else f"`{next(filter(None, runner.groups()))}`"

    def uses_sandbox(self) -> bool:
        """Whether it holds, or names, what runs code in the sandbox."""
        named = (_found(name) for name in self.reached or () if name.startswith("loraflow."))
        return any(map(_is_sandboxed, (*self.values.values(), *named)))


def _name_of(value: Any) -> str:
    """The full name of what a module may hold under another."""
    if isinstance(value, ModuleType):
        return value.__name__
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__name__', '')}"
    return re.sub(r"^(posix|nt)\.", "os.", name)


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
        own = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        self.origins = {node.name: "" for node in tree.body if isinstance(node, own)}
        assigned = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias, name in zip(node.names, _imported(node), strict=True):
                    short = name if isinstance(node, ast.ImportFrom) else name.partition(".")[0]
                    self.origins[alias.asname or alias.name.partition(".")[0]] = name if alias.asname else short
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                assigned += [(target.id, node.value) for target in targets if isinstance(target, ast.Name)]
        # A name may be assigned before, in the text, what it is made of is.
        for name, value in assigned * 2:
            self.origins[name] = self.full_name(value) or self.origins.get(name, "")

    def full_name(self, node: ast.AST) -> str:
        """`os.system` for all ways to write it; empty for what is not of an imported module or a builtin."""
        match node:
            case ast.Name(id="__builtins__"):
                return "builtins"
            case ast.Name(id=name):
                return self.origins.get(name, f"builtins.{name}" if hasattr(builtins, name) else "")
            case ast.Attribute(value=base, attr=name):
                return self._member(base, ast.Constant(name))
            case ast.Call(func=func, args=[base, key, *_]) if self.full_name(func) == "builtins.getattr":
                return self._member(base, key)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if self.full_name(func) in _IMPORTERS:
                return name
            case ast.Subscript(value=base, slice=key) if self.full_name(base) in ("builtins", "sys.modules"):
                return (
                    ""
                    if ast.unparse(key) == "__name__"
                    else re.sub(r"^sys\.modules\.(?!\*)", "", self._member(base, key))
                )
        return ""

    def _member(self, base: ast.expr, key: ast.expr) -> str:
        whole = self.full_name(base)
        name = str(key.value) if isinstance(key, ast.Constant) else "*"
        return f"{whole}.{name}" if whole else ""

    def reached(self, node: ast.AST | None = None, parent: ast.AST | None = None) -> Iterator[str]:
        """Every full name that is imported or used, and `module.*` where a guarded module is handed on whole."""
        node = node or self.tree
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for name in _imported(node) if name not in _IMPORTERS)
        elif isinstance(node, ast.Constant) and node.value == "__builtins__":
            yield "builtins.*"
        name = self.full_name(node) if isinstance(getattr(node, "ctx", ast.Load()), ast.Load) else ""
        if name in _GUARDED and not isinstance(parent, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.Compare):
            yield f"{name}.*"
        elif name:
            yield name
        # What a longer name begins with is not used for itself.
        begins = {getattr(node, "value", None)} if isinstance(node, ast.Attribute | ast.Subscript) else set()
        if isinstance(node, ast.Call) and (name or self.full_name(node.func) == "builtins.hasattr"):
            begins = {node.func, node.args[0]}
        for child in ast.iter_child_nodes(node):
            if child not in begins or not (name or self.full_name(child) in _GUARDED):
                yield from self.reached(child, node)


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The full names in an import statement, of relative ones with their dots."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{'.' * node.level}{node.module or ''}{'.' if node.module else ''}{alias.name}" for alias in node.names]

"""Adapters found in a folder, and names for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from loraflow.adapters.base import CONFIG_FILE, WEIGHTS_FILE, AdapterSource
from loraflow.adapters.files import PICKLE_FILE
from loraflow.errors import AdapterError

_DEPTH = 3


def find_adapters(folder: Path) -> dict[str, str]:
    """The adapters in a folder, in the order of their names: `zh`, or `zh.math` for that in its subfolder `zh/math`.

    What is inside an adapter, such as the checkpoints of its training, is none.

    Raises:
        AdapterError: if it is no folder, an adapter itself, or has none, or if two get the same name.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a directory. Give a folder with adapters in it.")
    if _is_adapter(folder):
        raise AdapterError(f"{folder} is one adapter. Give the folder that it is in: {folder.parent}.")
    found: dict[str, str] = {}
    for path in _inside(folder, _DEPTH):
        name = ".".join(path.relative_to(folder).parts)
        if name in found:
            raise AdapterError(f"{found[name]} and {path} would both be called {name!r}. Rename one of them.")
        found[name] = str(path)
    if not found:
        raise AdapterError(
            f"{folder} has no adapter in it, {_DEPTH} levels deep. Give a folder whose subfolders have an "
            f"{CONFIG_FILE}."
        )
    return dict(sorted(found.items()))


def names_of(sources: Sequence[str | Path | AdapterSource]) -> dict[str, AdapterSource]:
    """Sources by their last parts; those that would have the same name, by as many more as tell them apart.

    Raises:
        AdapterError: if the same one is given twice.
    """
    parsed = [AdapterSource.parse(source) for source in sources]
    parts = [Path(one.path).parts for one in parsed]
    lengths = [1] * len(parts)
    while True:
        names = [".".join(part.strip("/") for part in one[-n:]) for one, n in zip(parts, lengths, strict=True)]
        count = Counter(names)
        clashing = [index for index, name in enumerate(names) if count[name] > 1]
        if not clashing:
            return dict(zip(names, parsed, strict=True))
        longer = [index for index in clashing if lengths[index] < len(parts[index])]
        if not longer:
            raise AdapterError(f"{parsed[clashing[0]].path!r} is given twice. Give each adapter once, or name them.")
        for index in longer:
            lengths[index] += 1


def _inside(folder: Path, depth: int) -> Iterator[Path]:
    for path in _folders(folder.iterdir()):
        if _is_adapter(path):
            yield path
        elif depth > 1:
            yield from _inside(path, depth - 1)


def _folders(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_dir() and not path.name.startswith("."))


def _is_adapter(path: Path) -> bool:
    # One that lacks a file is an adapter too, a broken one.
    return any((path / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE))

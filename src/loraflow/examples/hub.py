"""Rows of a data set: one on the Hub, or a folder, through the package `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraflow.errors import DataError, did_you_mean
from loraflow.examples.base import Row

# What `Dataset.save_to_disk` leaves in a folder, of one split and of several.
_SAVED = ("state.json", "dataset_dict.json")


def dataset_rows(path: str, *, config: str | None, revision: str | None, split: str | None) -> Iterator[Row]:
    """Rows of a data set, fetched as they are asked for; each with the data set's name and its number, from 1.

    Args:
        path: a folder, or an id on the Hub.
        config: which of its configurations, where it has several.
        revision: branch, tag or commit on the Hub.
        split: may be left out where there is one only.

    Yields:
        Origin and record.

    Raises:
        DataError: if it cannot be read, or the split is missing or unknown.
    """
    place = Path(path).expanduser()
    local = place.is_dir()
    try:
        import datasets
    except ImportError as error:
        what = "is a folder" if local else "is no file here, and may be a data set of the Hub"
        raise DataError(f"{path!r} {what}, which `datasets` reads. Run: pip install 'loraflow[data]'") from error
    try:
        if local and any((place / name).is_file() for name in _SAVED):
            loaded: Any = datasets.load_from_disk(str(place))
        else:
            where = str(place) if local else path
            loaded = datasets.load_dataset(where, config, split=split, revision=revision, streaming=True)
        chosen, name = _chosen(loaded, path, split)
        for number, record in enumerate(chosen, start=1):
            yield f"{name}, row {number}", record
    except DataError:
        raise
    except Exception as error:
        # Networks, readers of many formats, the data set's own builder: each has errors of its own.
        what = "the folder cannot be read" if local else "is neither a file here nor a data set that can be read"
        raise DataError(f"{path!r}: {what} ({type(error).__name__}: {' '.join(str(error).split())})") from error


def _chosen(loaded: Any, path: str, split: str | None) -> tuple[Any, str]:
    """A split of what was loaded, and what its rows are called."""
    if not isinstance(loaded, Mapping):
        return loaded, f"{path}[{split}]" if split is not None else path
    splits = list(loaded)
    if split is None and len(splits) > 1:
        raise DataError(f"{path!r} has the splits {', '.join(splits)}. Say which: {path}[{splits[0]}]")
    if split is not None and split not in splits:
        raise DataError(f"{path!r} has no split {split!r}. {did_you_mean(split, splits)}")
    name = split or splits[0]
    return loaded[name], f"{path}[{name}]"

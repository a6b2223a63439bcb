"""An adapter's files: found on disk or on the Hub, and their tensors read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from loraflow.adapters.base import CONFIG_FILE, WEIGHTS_FILE, AdapterSource
from loraflow.adapters.foreign import kind_of_files
from loraflow.errors import AdapterError

PICKLE_FILE = "adapter_model.bin"
# What the Hub's own error is of: the HTTP client's, of whichever client huggingface_hub has. A connection that is cut
# raises it as it is.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def locate_config(name: str, source: AdapterSource) -> tuple[Path, AdapterSource]:
    """An adapter's configuration, downloaded where it is on the Hub, and the exact source of both of its files.

    Raises:
        AdapterError: if it is missing, or cannot be reached.
    """
    if source.is_local:
        return _config_in_directory(name, source)
    where = _on_the_hub(source)
    with _hub_errors(name, where, f"{where} has no {CONFIG_FILE}. Is it a PEFT adapter, or in a subfolder?"):
        path = _download(source, CONFIG_FILE)
    # Files are laid out as .../snapshots/<commit>/...: the commit makes the source exact, and the weights its own.
    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else source.revision
    return path, AdapterSource(source.path, commit)


def locate_weights(name: str, source: AdapterSource) -> Path:
    """The weights of an adapter whose configuration was found, from the same source.

    Raises:
        AdapterError: if they are missing, pickled or another library's, or cannot be reached.
    """
    if source.is_local:
        directory = Path(source.path)
        if not (directory / WEIGHTS_FILE).is_file():
            pickled = (directory / PICKLE_FILE).is_file()
            raise AdapterError(
                _other_kind(name, directory) or f"Adapter {name!r}: {_no_weights(str(directory), pickled=pickled)}"
            )
        return directory / WEIGHTS_FILE
    where = _on_the_hub(source)
    with _hub_errors(name, where, _no_weights(where, pickled=True)):
        return _download(source, WEIGHTS_FILE)


def read_tensors(name: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as they are in it.

    Raises:
        AdapterError: if it is none.
    """
    # It opens the file twice, the second time through torch, which raises a RuntimeError where it is gone by then.
    with _file_errors(name, path):
        return load_file(path)


def read_header(name: str, source: AdapterSource) -> dict[str, Tensor]:
    """What the weights' file of an adapter says of its tensors: each on the meta device, in its shape and precision.

    Of a file on the Hub nothing else is downloaded. The adapter's configuration was found at the same source.

    Raises:
        AdapterError: if it is missing or no safetensors file, or cannot be reached.
    """
    if source.is_local or _is_cached(source):
        path = locate_weights(name, source)
        with _file_errors(name, path), safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            said = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    else:
        where = _on_the_hub(source)
        with _hub_errors(name, where, _no_weights(where, pickled=True)):
            repo, folder = _in_repo(source)
            path_in_repo = _path_in_repo(folder, WEIGHTS_FILE)
            header = HfApi().parse_safetensors_file_metadata(repo, path_in_repo, revision=source.revision)
        said = {key: (tensor.dtype, tensor.shape) for key, tensor in header.tensors.items()}
    unknown = {dtype for dtype, _ in said.values()} - str_to_torch_dtype.keys()
    if unknown:
        raise AdapterError(
            f"Adapter {name!r}: {source.path} has tensors of the type {min(unknown)}, which torch does not have. Save "
            "the adapter again, in float32 or bfloat16."
        )
    return {
        key: torch.empty(tuple(shape), dtype=str_to_torch_dtype[dtype], device="meta")
        for key, (dtype, shape) in said.items()
    }


def models_of_collection(slug: str) -> list[str]:
    """The ids of the models in a collection on the Hub, in its order.

    Raises:
        AdapterError: if it cannot be read, or has none.
    """
    from huggingface_hub import get_collection

    where = f"The collection {slug!r} on the Hugging Face Hub"
    try:
        models = [item.item_id for item in get_collection(slug).items if item.item_type == "model"]
    except (_HTTP_ERROR, HFValidationError, OSError) as error:
        raise AdapterError(
            f"{where} cannot be read: {error}. Check its name (`user/title-0123456789abcdef`), the token and the "
            "network, or give the adapters themselves."
        ) from error
    if not models:
        raise AdapterError(f"{where} has no models in it. Give one that has, or the adapters themselves.")
    return models


@contextmanager
def _file_errors(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AdapterError(
            f"Adapter {name!r}: {path} is not a readable safetensors file ({error}). Download or save it again."
        ) from error


def _config_in_directory(name: str, source: AdapterSource) -> tuple[Path, AdapterSource]:
    directory = Path(source.path).expanduser()
    if not directory.is_dir():
        raise AdapterError(
            f"Adapter {name!r}: {source.path!r} is not a directory. Give a directory with {CONFIG_FILE} in it, "
            "or a Hub id such as 'user/repo'."
        )
    if source.revision is not None:
        raise AdapterError(
            f"Adapter {name!r}: a revision ({source.revision!r}) needs a Hub id, not the directory {source.path!r}."
        )
    if not (directory / CONFIG_FILE).is_file():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
        hint = f" Its subfolders {inside} have one: give one of those." if inside else ""
        raise AdapterError(
            _other_kind(name, directory)
            or f"Adapter {name!r}: {directory} has no {CONFIG_FILE}.{hint or ' Is it a PEFT adapter?'}"
        )
    # Absolute from here on: a later change of the working directory must not change what the path means.
    return directory / CONFIG_FILE, AdapterSource(str(directory.resolve()))


def _other_kind(name: str, directory: Path) -> str | None:
    """What a directory without PEFT's files is, where its own files tell."""
    found = kind_of_files([path.name for path in directory.iterdir()])
    if found is None:
        return None
    kind, file = found
    return (
        f"Adapter {name!r} cannot be fused: {directory} has {file!r}: it is of {kind.name}, not of PEFT. {kind.remedy}"
    )


def _on_the_hub(source: AdapterSource) -> str:
    return f"{source.path!r} on the Hugging Face Hub"


def _in_repo(source: AdapterSource) -> tuple[str, str | None]:
    """The repository that a source is in, and its folder there."""
    user, repo, *folders = source.path.strip("/").split("/")
    return f"{user}/{repo}", "/".join(folders) or None


def _path_in_repo(folder: str | None, file: str) -> str:
    return file if folder is None else f"{folder}/{file}"


def _download(source: AdapterSource, file: str) -> Path:
    repo, folder = _in_repo(source)
    return Path(hf_hub_download(repo, file, subfolder=folder, revision=source.revision))


def _is_cached(source: AdapterSource) -> bool:
    repo, folder = _in_repo(source)
    path = _path_in_repo(folder, WEIGHTS_FILE)
    return isinstance(try_to_load_from_cache(repo, path, revision=source.revision), str)


@contextmanager
def _hub_errors(name: str, where: str, missing: str) -> Iterator[None]:
    """The Hub's errors as this library's; `missing` says what it means that a file is not there."""
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise AdapterError(
            f"Adapter {name!r}: {where} cannot be reached and is not in the local cache. "
            "Check the network, or give a directory."
        ) from error
    except EntryNotFoundError as error:
        raise AdapterError(f"Adapter {name!r}: {missing}") from error
    except SafetensorsParsingError as error:
        raise AdapterError(
            f"Adapter {name!r}: {WEIGHTS_FILE} of {where} is no readable safetensors file ({error}). Upload it again."
        ) from error
    except (_HTTP_ERROR, HFValidationError, OSError) as error:
        raise AdapterError(f"Adapter {name!r}: {where} cannot be read: {error}") from error


def _no_weights(where: str, *, pickled: bool) -> str:
    if pickled:
        return (
            f"{where} has no {WEIGHTS_FILE}; pickled weights ({PICKLE_FILE}) can run code and are not read. "
            "Load it with PEFT and save it again with `save_pretrained` (safetensors is its default)."
        )
    return f"{where} has no {WEIGHTS_FILE}. Save the adapter again."

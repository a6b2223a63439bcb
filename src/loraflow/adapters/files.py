"""An adapter's files: found on disk or on the Hub, and their tensors read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loraflow.adapters.base import CONFIG_FILE, WEIGHTS_FILE, AdapterSource
from loraflow.errors import AdapterError

PICKLE_FILE = "adapter_model.bin"


def locate(name: str, source: AdapterSource) -> tuple[Path, Path, AdapterSource]:
    """The configuration and the weights of an adapter, downloaded where it is on the Hub, and its exact source.

    Raises:
        AdapterError: if one of them is missing, or cannot be reached.
    """
    return (_locate_local if source.is_local else _locate_on_hub)(name, source)


def read_tensors(name: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as they are in it.

    Raises:
        AdapterError: if it is none.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        # It opens the file twice, the second time through torch, which raises a RuntimeError where it is gone by then.
        raise AdapterError(
            f"Adapter {name!r}: {path} is not a readable safetensors file ({error}). Download or save it again."
        ) from error


def _locate_local(name: str, source: AdapterSource) -> tuple[Path, Path, AdapterSource]:
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
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    if not config_path.is_file():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
        hint = f" Its subfolders {inside} have one: give one of those." if inside else ""
        raise AdapterError(f"Adapter {name!r}: {directory} has no {CONFIG_FILE}.{hint or ' Is it a PEFT adapter?'}")
    if not weights_path.is_file():
        raise AdapterError(_no_weights(name, str(directory), pickled=(directory / PICKLE_FILE).is_file()))
    # Absolute from here on: a later change of the working directory must not change what the path means.
    return config_path, weights_path, AdapterSource(str(directory.resolve()))


def _locate_on_hub(name: str, source: AdapterSource) -> tuple[Path, Path, AdapterSource]:
    user, repo, *folders = source.path.strip("/").split("/")
    repo_id, subfolder = f"{user}/{repo}", "/".join(folders) or None
    where = f"{source.path!r} on the Hugging Face Hub"
    wanted, commit = CONFIG_FILE, source.revision
    try:
        config_path = Path(hf_hub_download(repo_id, CONFIG_FILE, subfolder=subfolder, revision=commit))
        # Files are laid out as .../snapshots/<commit>/...: the commit makes the source exact, and the weights its own.
        parts = config_path.parts
        commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else commit
        wanted = WEIGHTS_FILE
        weights_path = Path(hf_hub_download(repo_id, WEIGHTS_FILE, subfolder=subfolder, revision=commit))
    except LocalEntryNotFoundError as error:
        raise AdapterError(
            f"Adapter {name!r}: {where} cannot be reached and is not in the local cache. "
            "Check the network, or give a directory."
        ) from error
    except EntryNotFoundError as error:
        if wanted == WEIGHTS_FILE:
            raise AdapterError(_no_weights(name, where, pickled=True)) from error
        raise AdapterError(
            f"Adapter {name!r}: {where} has no {CONFIG_FILE}. Is it a PEFT adapter, or in a subfolder?"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(f"Adapter {name!r}: {where} cannot be read: {error}") from error
    return config_path, weights_path, AdapterSource(source.path, commit)


def _no_weights(name: str, where: str, *, pickled: bool) -> str:
    if pickled:
        return (
            f"Adapter {name!r}: {where} has no {WEIGHTS_FILE}; pickled weights ({PICKLE_FILE}) can run code and are "
            "not read. Load it with PEFT and save it again with `save_pretrained` (safetensors is its default)."
        )
    return f"Adapter {name!r}: {where} has no {WEIGHTS_FILE}. Save the adapter again."

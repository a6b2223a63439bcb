"""What a saved fusion brings to those that are served."""

from __future__ import annotations

from loraflow.adapters import Adapter
from loraflow.errors import FusionError, LoraflowError
from loraflow.saved.fusion import Permit, SavedFusion
from loraflow.saved.records import FusionConfig


def check_reads_nothing_else(config: FusionConfig) -> None:
    """Refuse methods that would open another model, wherever that may be.

    Raises:
        LoraflowError: if the fusion's is such a one.
    """
    encoder = config.method.parameters.get("encoder", "base")
    if encoder != "base":
        raise LoraflowError(
            f"The method {config.method.name!r} reads another model (`encoder`={encoder!r}), which is not loaded while "
            "the server runs. Name the fusion when the server is started."
        )


def add_adapters(
    fusion: SavedFusion, known: dict[str, Adapter], permit: Permit = lambda path: path
) -> tuple[SavedFusion, list[str]]:
    """A fusion with the names of its adapters among all, to which those that are missing are added.

    Equal ones under several names are one; another one of the same name gets the fusion's name before its own.

    Raises:
        FusionError: if that name is another adapter's too.
    """
    fusion, adapters = fusion.load(loaded=known.values(), permit=permit)
    names = []
    for adapter in adapters:
        name = next((name for name, other in known.items() if other.digest == adapter.digest), None)
        if name is None:
            name = adapter.name if adapter.name not in known else f"{fusion.name}.{adapter.name}"
            if name in known:
                raise FusionError(
                    f"The adapter {adapter.name!r} of the fusion {fusion.name!r} would be called {name!r}, and another "
                    "adapter is called so already. Unload that first, or give the fusion another name."
                )
            known[name] = adapter.called(name)
        names.append(name)
    return fusion, names

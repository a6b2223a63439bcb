"""Options of `loraflow serve` for the model `auto`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from loraflow.cli.groups import panel
from loraflow.cli.values import parse_method_options
from loraflow.errors import LoraflowError
from loraflow.serving.auto import TOP_K, Auto

_auto = panel("Adapters picked by the request")


@dataclass(frozen=True)
class AutoOptions:
    """What picks adapters for requests to the model `auto`."""

    auto: Annotated[
        str | None,
        _auto(
            "--auto",
            help="Offer the model `auto`, for which a method picks adapters by each prompt: logo, qa-flora, another "
            "that learns nothing, or by the name of a fusion that is served its method, from its own adapters.",
            metavar="METHOD",
            show_default=False,
        ),
    ] = None
    auto_option: Annotated[
        list[str],
        _auto("--auto-option", help="Parameters of that method, as `key=value`.", show_default=False),
    ] = field(default_factory=list)
    auto_top_k: Annotated[
        int | None,
        _auto(
            "--auto-top-k",
            help="Adapters that are picked at most; of methods that weigh each token, for each token.  "
            f"[default: {TOP_K}, or those methods' own]",
            min=1,
        ),
    ] = None
    auto_floor: Annotated[
        float | None,
        _auto(
            "--auto-floor",
            help="An adapter that scores less is not picked; where all do, the base answers alone.  [default: none]",
        ),
    ] = None

    def settings(self) -> Auto | None:
        """The same as the catalog takes it.

        Raises:
            LoraflowError: if something is said of what is not offered.
        """
        options = parse_method_options(self.auto_option, "--auto-option")
        if self.auto is not None:
            return Auto(self.auto, options, self.auto_top_k, self.auto_floor)
        if options or self.auto_top_k is not None or self.auto_floor is not None:
            raise LoraflowError("`--auto-option`, `--auto-top-k` and `--auto-floor` need `--auto METHOD`. Give it too.")
        return None

"""A trace, as `FusedModel.trace` returns it: traced weights that make their own pictures."""

from __future__ import annotations

from pathlib import Path

from loraflow.visual.explorer import save_explorer
from loraflow.visual.notebook import trace_html
from loraflow.visual.traced_weights import TracedWeights


class Trace(TracedWeights):
    """The fusion weights of every position, layer and adapter; shows itself in a notebook.

    The attributes are those of `TracedWeights`.
    """

    def save_html(self, path: str | Path, *, row: int = 0) -> None:
        """Write the explorer: one page to be opened in a browser, without network.

        Raises:
            LoraflowError: if the file cannot be written.
        """
        save_explorer({self.method or "weights": self}, path, row=row)

    def _repr_html_(self) -> str:
        return trace_html(self)

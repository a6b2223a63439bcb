"""What a fit would take of memory, before the base's weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraflow.errors import LoraflowError
from loraflow.training.config import FitConfig

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.core.attach import Attachment

_LENGTHS = (256, 512, 1024, 2048)


def print_plan(attachment: Attachment, weights: float, console: Console) -> None:
    """Print a table of what steps of LoRA-Flow's recipe take, by the length of their examples.

    Args:
        attachment: adapters in a base without weights, in the precision of its activations.
        weights: bytes of base and adapters where they are loaded, quantised perhaps.
        console: where it is printed.
    """
    from rich.table import Table

    from loraflow.methods import LoraFlow
    from loraflow.training.data import longest_example
    from loraflow.training.plan import Shape, footprints_of_empty, size_text

    model: Any = attachment.model
    method = LoraFlow(start="average")
    attachment.install(method, attachment.make_gates(method))
    try:
        plain, frugal = footprints_of_empty(model, attachment.layers)
    except LoraflowError as error:
        console.print(f"plan of a fit: only when the base is loaded. {error}", soft_wrap=True, markup=False)
        return
    rows, longest = FitConfig.batch_size, longest_example(model)
    table = Table("tokens", "activations", "logits", "peak", "checkpointing", "TFLOP a step", box=None)
    for width in dict.fromkeys(min(width, longest) for width in _LENGTHS):
        shape = Shape(rows, width, rows * width)
        logits, operations = plain.head.cost(shape)
        operations += round(plain.operations.at(rows, width))
        taken = (plain.kept.at(rows, width), logits, weights + plain.peak(shape), weights + frugal.peak(shape))
        table.add_row(f"{rows} x {width}", *map(size_text, taken), f"{operations / 1e12:.3g}")
    console.print(
        f"plan of a fit (lora-flow, {rows} examples in a forward), peaks with weights, without and with gradient "
        "checkpointing:",
        soft_wrap=True,
    )
    console.print(table)

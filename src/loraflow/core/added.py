r"""Updates that gates of linears add of their own, $y \mathrel{+}= U\, C\, D\, x$, beside the weighted adapters."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loraflow.core.context import LayerContext
from loraflow.core.rows import Rows
from loraflow.errors import ArchitectureError
from loraflow.methods.base import AddsUpdate, LowRank


def add_own_updates(
    context: LayerContext,
    name: str,
    rows: Rows,
    x: Float[Tensor, "*batch in_features"],
    result: Float[Tensor, "*batch out_features"],
) -> Float[Tensor, "*batch out_features"]:
    """A linear's output, which is nobody else's yet, plus the updates that its gates in the running lanes add.

    Args:
        context: of its decoder layer.
        name: of the linear, within the layer.
        rows: what the rows of its input are.
        x: that input.
        result: its output without them.

    Raises:
        ArchitectureError: if requests differ, and it cannot be told which rows are whose.
    """
    if context.alone is not None:
        return result
    lanes, batch = context.running, context.shape[0]
    for lane in lanes.lanes:
        gate = lane.gate(context.index, name) if lane.adds else None
        if gate is None:
            continue
        update = cast(AddsUpdate, gate).factors()
        if lanes.only is not None:
            return _add(result, x, update)
        if rows == "unknown" or (lanes.flat and rows != "tokens"):
            raise ArchitectureError(
                f"'{name}' of decoder layer {context.index} reads rows of which it cannot be told whose they are, so "
                "a method that adds an update of its own cannot answer beside others. Answer with one method at a time."
            )
        own = lanes.rows_of(lane, batch, x.device)
        read, written = (tensor.reshape(batch, -1, tensor.shape[-1]) for tensor in (x, result))
        result = written.index_copy(0, own, _add(written[own], read[own], update)).view(result.shape)
    return result


def _add(
    result: Float[Tensor, "*batch out_features"], x: Float[Tensor, "*batch in_features"], update: LowRank
) -> Float[Tensor, "*batch out_features"]:
    down, core, up = update
    read = F.linear(x.reshape(-1, x.shape[-1]).to(down.dtype), down)
    written = F.linear(read.to(core.dtype), core).to(result.dtype)
    flat = result.reshape(-1, result.shape[-1])
    up = up.to(result.dtype)
    if torch.is_grad_enabled():
        return torch.addmm(flat, written, up.T).view(result.shape)
    return flat.addmm_(written, up.T).view(result.shape)

"""Where the rows and columns of an adapter's matrices go in a linear of vLLM, which packs several and splits them.

vLLM computes q, k and v in one linear, gate and up in another. With tensor parallelism a column-parallel linear
computes some of the output's rows on each rank, and a row-parallel one reads some of the input's columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from loraflow.core.stack import StackedLora


@dataclass(frozen=True)
class Rank:
    """One rank of a tensor-parallel group.

    Attributes:
        index: which.
        size: of how many.
    """

    index: int = 0
    size: int = 1

    def share(self, width: int) -> slice:
        """This rank's share of something that is split evenly."""
        each = width // self.size
        return slice(self.index * each, (self.index + 1) * each)


@dataclass(frozen=True)
class Part:
    """One of the linears that a linear of vLLM packs, as a rank computes it.

    Attributes:
        out_features: of the whole linear, on all ranks.
        rows: which of them this rank computes; indices where they are not one behind the other.
        start: where they begin in the rank's output.
    """

    out_features: int
    rows: slice | list[int]
    start: int

    @property
    def stop(self) -> int:
        """Where they end in the rank's output."""
        return self.start + len(_indices(self.rows))


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer, on all ranks."""

    query: int
    key_value: int
    size: int
    value_size: int


def even_parts(out_features: Sequence[int], rank: Rank) -> list[Part]:
    """Packed linears, each split evenly."""
    parts: list[Part] = []
    for width in out_features:
        parts.append(Part(width, rank.share(width), parts[-1].stop if parts else 0))
    return parts


def attention_parts(heads: Heads, rank: Rank) -> list[Part]:
    """q, k and v split by heads; where there are fewer key-value heads than ranks, several ranks share one."""
    replicas = max(1, rank.size // heads.key_value)
    kv_rank = Rank(rank.index // replicas, min(rank.size, heads.key_value))
    query = Part(heads.query * heads.size, rank.share(heads.query * heads.size), 0)
    key = Part(heads.key_value * heads.size, kv_rank.share(heads.key_value * heads.size), query.stop)
    value = Part(heads.key_value * heads.value_size, kv_rank.share(heads.key_value * heads.value_size), key.stop)
    return [query, key, value]


def join(parts: Sequence[Part]) -> Part:
    """Linears that the checkpoint itself fuses (Phi-3's): one in transformers, whose rows a rank splits as ever."""
    rows: list[int] = []
    width = 0
    for part in parts:
        rows += [width + row for row in _indices(part.rows)]
        width += part.out_features
    return Part(width, rows, parts[0].start)


def _indices(rows: slice | list[int]) -> range | list[int]:
    return range(rows.start, rows.stop) if isinstance(rows, slice) else rows


def cut(stack: StackedLora, rows: slice | list[int], columns: slice) -> StackedLora:
    """The rows of the output and columns of the input that a rank computes."""
    return dataclasses.replace(stack, lora_A=stack.lora_A[:, columns], lora_B=stack.lora_B[:, rows])

"""What gates of linears may offer that weigh the adapters by what those have read, beside the contract in `base`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

Starts = tuple[int, ...]
"""Where each adapter's part of all slots begins."""


@runtime_checkable
class WeighsSlots(Protocol):
    r"""A gate of one linear that can weigh the adapters by what they have read, $u_i = A_i x$.

    The fused pass has that anyway; `forward` gives the same weights from the input itself.

    Attributes:
        by_slots: whether it can; where not, `forward` is called.
        score_rows: how many rows as wide as the input `forward` multiplies.
    """

    by_slots: bool
    score_rows: int

    def weigh_slots(self, u: Float[Tensor, "*batch slots"], starts: Starts) -> Float[Tensor, "*batch adapters"]:
        """The fusion weights from u, and where in it the slots of each adapter begin (those of a `lora_bias` last)."""

    def read_inputs(self) -> None:
        """Make what `forward` needs beyond that."""


@runtime_checkable
class Shortlists(Protocol):
    """A gate that `WeighsSlots`, of which only those of a few candidates are needed.

    Attributes:
        lists: whether it can tell candidates from the input at this linear.
        candidates: how many it names at each position.
        list_rows: how many rows as wide as the input it multiplies for that.
    """

    lists: bool
    candidates: int
    list_rows: int

    def shortlist(self, x: Float[Tensor, "tokens features"]) -> Int[Tensor, "tokens candidates"]:
        """Candidates for each position, none of them twice."""

    def weigh_listed(
        self, u: Float[Tensor, "tokens candidates width"], listed: Int[Tensor, "tokens candidates"]
    ) -> Float[Tensor, "tokens candidates"]:
        """The fusion weights of the candidates, from what those have read, zero-padded to one width."""

r"""The contract of a merge: from every adapter's update of every linear, one update of each.

$D_i = \omega_i s_i B_i A_i$ is adapter i's update of one linear, with its scaling $s_i$ and a weight $\omega_i$ that
its user gives it (1 by default). All arithmetic is float64, on the factors: while the ranks together are fewer than
a linear's features, no matrix is as large as the base's. What KnOTS keeps beside the factors, it says itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.errors import MethodError
from loraflow.methods.checks import check_positive, check_weights


class Factors(NamedTuple):
    """A low-rank matrix: `lora_B @ lora_A`."""

    lora_A: Float[Tensor, "rank in_features"]
    lora_B: Float[Tensor, "out_features rank"]


class Update(NamedTuple):
    """One adapter's update of one linear: `scale * lora_B @ lora_A`, in float64.

    Attributes:
        lora_A: down projection.
        lora_B: up projection, without its scaling.
        scale: the adapter's scaling times the weight that it is merged with.
    """

    lora_A: Float[Tensor, "rank in_features"]
    lora_B: Float[Tensor, "out_features rank"]
    scale: float

    @property
    def up(self) -> Float[Tensor, "out_features rank"]:
        """The up projection with its scale."""
        return self.scale * self.lora_B


Places = Mapping[str, Sequence[Update | None]]
"""Each adapter's update by place (a linear, or one expert's matrix); None where one does not target it."""


@dataclass(frozen=True)
class Merge(ABC):
    """A way to make one update of several. Subclasses are frozen dataclasses of their options.

    Attributes:
        weights: by adapter name, what each adapter's update is multiplied with beforehand; 1 for those not named.
        name: what users call it.
        paper: arXiv number of its paper; empty where there is none.
        draws: whether it draws at random, by its option `seed`.
        of_parameters: whether it merges the A's with each other and the B's, so that ranks must be equal and biases
            are tensors of their own; else a bias is the update of one more input, which is always 1.
    """

    weights: Mapping[str, float] = field(default_factory=dict)

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    draws: ClassVar[bool] = False
    of_parameters: ClassVar[bool] = False

    @abstractmethod
    def merge(self, places: Places) -> dict[str, Factors]:
        """The merged update of every place.

        Raises:
            MethodError: if the merge has no meaning for these updates.
        """

    def merge_biases(self, places: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """The merged bias of every place, where the merge is of parameters: of biases with their scales applied.

        Raises:
            MethodError: where it is not, and biases are inputs.
        """
        raise MethodError(f"The merge {self.name!r} reads biases as inputs of their updates.")

    def check(self, adapters: Sequence[str]) -> None:
        """Check the options against the adapters that are to be merged.

        Raises:
            MethodError: if there are fewer than two adapters, or weights are for others.
        """
        if len(adapters) < 2:
            raise MethodError(f"The merge {self.name!r} is of two adapters or more, found {list(adapters)}. Give more.")
        check_weights(self.weights, adapters, "weights")

    def weight_of(self, adapter: str) -> float:
        """The weight of an adapter."""
        return float(self.weights.get(adapter, 1.0))


def check_density(density: Any) -> None:
    """Check a share of values to keep.

    Raises:
        MethodError: if it is none.
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise MethodError(f"`density` (={density!r}) must be a share of the values, above 0 and at most 1.")


def check_seed(seed: Any) -> None:
    """Check the seed of what is drawn at random.

    Raises:
        MethodError: if it is no whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise MethodError(f"`seed` (={seed!r}) must be a whole number of at least 0.")


def check_scale(scale: Any) -> None:
    """Check what a merged update is multiplied with."""
    check_positive(scale, "scale")


def stacked(updates: Sequence[Update | None]) -> Factors:
    """The sum of updates, with their matrices concatenated along the rank."""
    present = [update for update in updates if update is not None]
    return Factors(torch.cat([one.lora_A for one in present]), torch.cat([one.up for one in present], dim=1))


def nothing(updates: Sequence[Update | None]) -> Factors:
    """The update that changes nothing, of rank 1: what is merged where all of a linear's updates are zero."""
    present = next(update for update in updates if update is not None)
    return Factors(torch.zeros_like(present.lora_A[:1]), torch.zeros_like(present.lora_B[:, :1]))


def core_of(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    r"""$Q_B$, $R_B R_A^T$ and $Q_A$ of $B = Q_B R_B$ and $A^T = Q_A R_A$: the matrix is $Q_B (R_B R_A^T) Q_A^T$.

    The one in the middle is only as large as the rank, and has all of its singular values and its norm.
    """
    Q_B, R_B = torch.linalg.qr(factors.lora_B)
    Q_A, R_A = torch.linalg.qr(factors.lora_A.T)
    return Q_B, R_B @ R_A.T, Q_A


def truncated(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The nearest matrix of a lower rank, the squared Frobenius norm of the difference, and that of the matrix."""
    Q_B, core, Q_A = core_of(factors)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    norm = S.square().sum().item()
    if factors.lora_A.shape[0] <= rank:
        return factors, 0.0, norm
    root = S[:rank].sqrt()
    nearest = Factors(root[:, None] * (Vh[:rank] @ Q_A.T), (Q_B @ U[:, :rank]) * root)
    return nearest, S[rank:].square().sum().item(), norm


def square_norm(factors: Factors) -> float:
    """The squared Frobenius norm of a low-rank matrix."""
    return core_of(factors)[1].square().sum().item()

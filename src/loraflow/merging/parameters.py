r"""Merges of parameters: the A's with each other and the B's with each other, by PEFT's own functions.

$A = f(\sqrt{|\omega_i s_i|}\,\mathrm{sgn}(\omega_i s_i), A_i)$ and $B = f(\sqrt{|\omega_i s_i|}, B_i)$, entry by entry,
as PEFT's `add_weighted_adapter` has it; the product has cross terms between one adapter's B and another's A. PEFT's
variants that end in `_svd` work on the product itself, which is as large as the base's weight; KnOTS and Core space are
what there is here instead.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from loraflow.errors import MethodError
from loraflow.merging.base import Factors, Merge, Places, Update, check_density, check_seed
from loraflow.merging.voting import seeded
from loraflow.methods.checks import check_choice

Together = Callable[[list[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class OfParameters(Merge):
    """What these merges share."""

    of_parameters: ClassVar[bool] = True

    @abstractmethod
    def together(self, tensors: list[Tensor], weights: Tensor) -> Tensor:
        """PEFT's function of tensors of one shape and their weights."""

    def merge(self, places: Places) -> dict[str, Factors]:  # noqa: D102
        with self._drawing():
            return {place: self._merge_one(place, updates) for place, updates in places.items()}

    def merge_biases(self, places: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:  # noqa: D102
        with self._drawing():
            return {
                place: self.together(list(found), torch.ones(len(found)).double()) for place, found in places.items()
            }

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        with seeded(getattr(self, "seed", 0)), warnings.catch_warnings():
            # At density 1 nothing is pruned, as was asked for.
            warnings.filterwarnings("ignore", message="The density")
            yield

    def _merge_one(self, place: str, updates: Sequence[Update | None]) -> Factors:
        present = [update for update in updates if update is not None]
        ranks = [update.lora_A.shape[0] for update in present]
        if len(set(ranks)) > 1:
            raise MethodError(
                f"The merge {self.name!r} adds up matrices of one shape, and at '{place}' the adapters have the ranks "
                f"{ranks}. Take 'sum', or one of 'knots-ties', 'core-ties' and 'lego', which take any ranks."
            )
        roots = torch.tensor([math.sqrt(abs(update.scale)) for update in present]).double()
        signs = torch.tensor([math.copysign(1.0, update.scale) for update in present]).double()
        return Factors(
            self.together([update.lora_A for update in present], roots * signs),
            self.together([update.lora_B for update in present], roots),
        )


@dataclass(frozen=True)
class Linear(OfParameters):
    """Sums of the parameters, PEFT's "linear"."""

    name: ClassVar[str] = "linear"

    def together(self, tensors: list[Tensor], weights: Tensor) -> Tensor:  # noqa: D102
        return task_arithmetic(tensors, weights)


@dataclass(frozen=True)
class _Pruned(OfParameters):
    def __post_init__(self) -> None:
        check_density(getattr(self, "density", 1.0))
        check_choice(getattr(self, "sign", "total"), ("total", "frequency"), "sign")
        check_seed(getattr(self, "seed", 0))


@dataclass(frozen=True)
class Ties(_Pruned):
    """TIES on the parameters ([Yadav et al. 2023](https://arxiv.org/abs/2306.01708)), PEFT's "ties".

    Attributes:
        density: share of the entries that is kept, the largest of each tensor; the paper's 20 %.
        sign: whose sign wins an entry: that of the "total", or the more "frequency" has.
    """

    density: float = 0.2
    sign: Literal["total", "frequency"] = "total"

    name: ClassVar[str] = "ties"
    paper: ClassVar[str] = "2306.01708"

    def together(self, tensors: list[Tensor], weights: Tensor) -> Tensor:  # noqa: D102
        return ties(tensors, weights, self.density, self.sign)


@dataclass(frozen=True)
class DareLinear(_Pruned):
    """DARE on the parameters ([Yu et al. 2023](https://arxiv.org/abs/2311.03099)), then sums; PEFT's "dare_linear".

    Attributes:
        density: share of the entries that is kept, at random, and divided by it.
        seed: of what is drawn.
    """

    density: float = 0.5
    seed: int = 0

    name: ClassVar[str] = "dare-linear"
    paper: ClassVar[str] = "2311.03099"
    draws: ClassVar[bool] = True

    def together(self, tensors: list[Tensor], weights: Tensor) -> Tensor:  # noqa: D102
        return dare_linear(tensors, weights, self.density)


@dataclass(frozen=True)
class DareTies(_Pruned):
    """DARE on the parameters, then TIES; PEFT's "dare_ties".

    Attributes:
        density: share of the entries that is kept, at random, and divided by it.
        sign: as for `Ties`.
        seed: of what is drawn.
    """

    density: float = 0.5
    sign: Literal["total", "frequency"] = "total"
    seed: int = 0

    name: ClassVar[str] = "dare-ties"
    paper: ClassVar[str] = "2311.03099"
    draws: ClassVar[bool] = True

    def together(self, tensors: list[Tensor], weights: Tensor) -> Tensor:  # noqa: D102
        return dare_ties(tensors, weights, self.density, self.sign)


@dataclass(frozen=True)
class MagnitudePrune(_Pruned):
    """The largest entries of each tensor, then sums; PEFT's "magnitude_prune".

    Attributes:
        density: share of the entries that is kept.
    """

    density: float = 0.5

    name: ClassVar[str] = "magnitude-prune"

    def together(self, tensors: list[Tensor], weights: Tensor) -> Tensor:  # noqa: D102
        return magnitude_prune(tensors, weights, self.density)

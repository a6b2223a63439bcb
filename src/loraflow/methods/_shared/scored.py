r"""Gates of one linear that score an adapter by the length of a projection, $\lVert D_i x \rVert$ with $D_i = M_i A_i$.

Where that is the same but for little rounding, the score is had from what the adapters have read anyway,
$\lVert M_i u_i \rVert$ with $u_i = A_i x$: the gate then holds one small matrix for each adapter, and nothing as wide
as the input (`loraflow.methods._shared.projections`). Else, and for whoever has the input alone, it multiplies that
with all $D_i$, which are made when they are first needed.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from loraflow.adapters import LoraModule
from loraflow.errors import MethodError
from loraflow.methods._shared.projections import MOST_AMPLIFIED, Projection
from loraflow.methods._shared.scores import linear_scores, top_k_equal, top_k_softmax
from loraflow.methods.base import Site
from loraflow.methods.slots import Starts

Weighting = Literal["equal", "softmax"]
WEIGHTINGS = ("equal", "softmax")

Project = Callable[[LoraModule], Projection]


class Bucket(NamedTuple):
    """Adapters of one rank, whose small matrices are one tensor.

    Attributes:
        rank: theirs.
        adapters: their positions.
    """

    rank: int
    adapters: tuple[int, ...]


class Places(NamedTuple):
    """Where the slots and adapters of a bucket are among all; None where they are all, in order."""

    slots: Tensor | None
    adapters: Tensor | None


class ProjectionGate(nn.Module, ABC):
    """What gates share that score by projections; a subclass makes weights of the projected input.

    An adapter that adds nothing in the linear counts as one that does not target it. Where only B A is zero, beside a
    DoRA magnitude or a bias, the score is 0.

    Attributes:
        by_slots: whether the weights can be had from what the adapters have read.
        score_rows: how many rows as wide as the input the scores take without that.
        height: rows of a projection, at most.
        targets: which adapters can be chosen, `[adapters]`.
        chooses: whether there is one.
        rows: D, zero-padded to one height, `[adapters, height, features]`; None until it is needed.
        buckets: where the small matrices are; none unless `by_slots`.
    """

    by_slots: bool
    score_rows: int
    height: int
    targets: Bool[Tensor, " adapters"]
    chooses: bool
    rows: Tensor | None
    buckets: tuple[Bucket, ...]

    def __init__(self, site: Site, project: Project) -> None:
        super().__init__()
        self.updates = site.updates[site.module or ""]
        self.features = site.features
        self._project = project
        found = [None if update is None else project(update) for update in self.updates]
        present = [(u, one) for u, one in zip(self.updates, found, strict=True) if u is not None and one is not None]
        self.height = max((len(one.rows) for _, one in present), default=1)
        self.score_rows = len(found) * self.height
        targets = [
            u is not None and one is not None and _adds(u, one) for u, one in zip(self.updates, found, strict=True)
        ]
        self.chooses = any(targets)
        self.register_buffer("targets", torch.tensor(targets), persistent=False)
        self.register_buffer("rows", None, persistent=False)
        self.by_slots = all(u.experts == 1 and one.amplifies(u.lora_A) <= MOST_AMPLIFIED for u, one in present)
        self.buckets = self._fill(found) if self.by_slots else ()
        self._indices: dict[tuple[Starts, torch.device], list[Places]] = {}
        if not self.by_slots:
            self.read_inputs()

    def _fill(self, found: Sequence[Projection | None]) -> tuple[Bucket, ...]:
        by_rank: dict[int, list[int]] = {}
        for position, one in enumerate(found):
            if one is not None:
                by_rank.setdefault(one.small.shape[1], []).append(position)
        buckets = tuple(Bucket(rank, tuple(positions)) for rank, positions in by_rank.items())
        for bucket in buckets:
            own = [one for one in (found[position] for position in bucket.adapters) if one is not None]
            padded = [F.pad(one.small, (0, 0, 0, self.height - len(one.small))) for one in own]
            self.register_buffer(f"small_{bucket.rank}", torch.stack(padded), persistent=False)
        return buckets

    def small(self, bucket: Bucket) -> Float[Tensor, "adapters height rank"]:
        """M of a bucket's adapters, zero-padded to one height."""
        return getattr(self, f"small_{bucket.rank}")

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the scores."""
        held = self.small(self.buckets[0]) if self.buckets else self.rows
        return torch.float64 if held is None else held.dtype

    def read_inputs(self) -> None:
        """Make what `forward` multiplies inputs with, if it is not there."""
        if self.rows is not None:
            return
        with lasting():
            rows = torch.zeros(len(self.updates), self.height, self.features, dtype=torch.float64)
            for position, update in enumerate(self.updates):
                if update is not None:
                    own = self._project(update).rows
                    rows[position, : len(own)] = own
            # Those of a gate that was never moved are in float64.
            self.rows = rows.to(self.targets.device, self.dtype)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch adapters"]:
        """Fusion weights of each position."""
        self.read_inputs()
        assert self.rows is not None
        projected = linear_scores(x, self.rows.flatten(0, 1)).unflatten(-1, (len(self.updates), self.height))
        return self.choose(projected) if self.chooses else self._nobody(projected)

    def weigh_slots(self, u: Float[Tensor, "*batch slots"], starts: Starts) -> Float[Tensor, "*batch adapters"]:
        """The same, from what the adapters have read, and where each one's part of that begins."""
        flat = u.reshape(-1, u.shape[-1]).to(self.dtype)
        projected = None
        for bucket, places in zip(self.buckets, self._places(starts, flat), strict=True):
            own = flat if places.slots is None else flat.index_select(-1, places.slots)
            by_adapter = own.reshape(len(flat), len(bucket.adapters), bucket.rank).transpose(0, 1)
            with exactly(flat):
                part = torch.bmm(by_adapter, self.small(bucket).mT).transpose(0, 1)
            if places.adapters is not None:
                if projected is None:
                    projected = flat.new_zeros(len(flat), len(self.updates), self.height)
                part = projected.index_copy(1, places.adapters, part)
            projected = part
        assert projected is not None
        projected = projected.reshape(*u.shape[:-1], len(self.updates), self.height)
        return self.choose(projected) if self.chooses else self._nobody(projected)

    def _places(self, starts: Starts, u: Float[Tensor, "tokens slots"]) -> list[Places]:
        """Which slots and adapters are each bucket's."""
        key = (starts, u.device)
        if key in self._indices:
            return self._indices[key]
        found = []
        with lasting():
            for rank, adapters in self.buckets:
                slots = [starts[adapter] + slot for adapter in adapters for slot in range(rank)]
                found.append(Places(_index(slots, u.shape[-1], u), _index(adapters, len(self.updates), u)))
        if not torch.compiler.is_compiling():
            self._indices[key] = found
        return found

    def _nobody(self, projected: Float[Tensor, "*batch adapters height"]) -> Float[Tensor, "*batch adapters"]:
        return projected.new_zeros(projected.shape[:-1])

    @abstractmethod
    def choose(self, projected: Float[Tensor, "*batch adapters height"]) -> Float[Tensor, "*batch adapters"]:
        """Fusion weights from the projected input, of a linear where somebody can be chosen."""


class RoutedGate(ProjectionGate):
    """The adapters with the longest projections."""

    def __init__(
        self, site: Site, project: Project, top_k: int, weighting: Weighting = "softmax", temperature: float = 1.0
    ) -> None:
        super().__init__(site, project)
        self.top_k, self.weighting, self.temperature = top_k, weighting, temperature

    @property
    def most(self) -> int:
        """How many adapters have a weight at one position, at most."""
        return self.top_k

    def choose(self, projected: Float[Tensor, "*batch adapters height"]) -> Float[Tensor, "*batch adapters"]:
        """Equal weights, or softmax, of those with the largest scores."""
        scores = lengths(projected)
        if self.weighting == "equal":
            return top_k_equal(scores, self.top_k, self.targets)
        return top_k_softmax(scores, self.top_k, self.temperature, self.targets)


def _index(places: Sequence[int], count: int, like: Tensor) -> Tensor | None:
    return None if list(places) == list(range(count)) else torch.tensor(places, device=like.device)


def lengths(projected: Float[Tensor, "*batch height"]) -> Float[Tensor, "*batch"]:
    """The length of each projection, whose gradient at zero is zero."""
    if projected.shape[-1] == 1:
        return projected[..., 0].abs()
    return torch.linalg.vector_norm(projected, dim=-1)


def linears_only(site: Site, method: str) -> None:
    """Check that what adapters update at a site is a linear.

    Raises:
        MethodError: if it is the matrices of experts.
    """
    if any(update is not None and update.experts > 1 for update in site.updates[site.module or ""]):
        raise MethodError(
            f"'{site.module}' of decoder layer {site.layer} are matrices of experts, each of which would score a token "
            f"otherwise. The method {method!r} takes adapters of linear modules; take another method, or leave the "
            "experts out of `target_parameters`."
        )


def _adds(update: LoraModule, projection: Projection) -> bool:
    """Whether an update adds anything to the linear's output."""
    low_rank = update.scaling != 0 and bool(projection.rows.any() or update.bias is not None)
    return low_rank or update.magnitude is not None


def lasting() -> contextlib.AbstractContextManager[None]:
    """Where tensors are made that outlive a forward: what is made in inference mode, no backward may use."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def exactly(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """In the precision of what is multiplied, under autocast too."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()

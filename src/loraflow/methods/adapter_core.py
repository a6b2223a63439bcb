r"""A core between frozen adapters: they read and write through each other's directions.

Each linear has constant fusion weights $w_i$, those of the start, and one small matrix M more, which alone is learned:

$$y = W x + \sum_i w_i s_i B_i A_i x + Q_b\, (\beta \odot M \odot \alpha^T)\, Q_a^T x$$

- The columns of $Q_a$ are orthonormal directions that stand for the rows of all $A_i$, those of $Q_b$ for the columns
  of all $B_i$ (`loraflow.methods._shared.directions`; a row in the span of others, but for $10^{-5}$ of its norm, has
  none of its own). So each entry of M lets what one adapter reads be written where another writes.
- $\alpha_q = \lVert A_j \rVert_F / \sqrt{r_j}$ and $\beta_p = s_i \lVert B_i \rVert_F / \sqrt{r_i}$, of the adapters
  that the directions stand for: M is in units of fusion weights, whatever the adapters' ranks and scalings are, so
  that one learning rate serves. Weight decay draws it to zero, the start.

Nothing depends on the input: the fusion is exactly one LoRA of rank $\sum_i r_i$ at most (`loraflow export`). No paper;
[LoRA-XS](https://arxiv.org/abs/2405.17604) learns such a matrix between the singular vectors of W. DoRA's updates and
biases have their start weights, and no part in M. Cost: exported, that of one LoRA; $(\sum_i r_i)^2$ values for each
linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.adapters import LoraModule
from loraflow.errors import MethodError
from loraflow.methods._shared.directions import own_directions
from loraflow.methods._shared.fitted import FittedOnExamples
from loraflow.methods.base import Learning, Level, LowRank, Method, Place, Site


class CoreGate(nn.Module):
    """The start weights of one linear, and the core between all adapters there.

    Attributes:
        start: the constant fusion weights, `[adapters]`.
        core: M, `[directions out, directions in]`.
        down: `alpha Q_a^T`, `[directions in, in_features]`.
        up: `Q_b beta`, `[out_features, directions out]`.
    """

    start: Float[Tensor, " adapters"]
    core: nn.Parameter
    down: Float[Tensor, "reads in_features"]
    up: Float[Tensor, "out_features writes"]

    def __init__(self, updates: Sequence[LoraModule | None]) -> None:
        super().__init__()
        present = [update for update in updates if update is not None]
        down = _scaled_directions([update.lora_A.double() for update in present])
        up = _scaled_directions([update.scaling * update.lora_B.double().T for update in present]).T
        self.register_buffer("start", torch.zeros(len(updates)))
        self.register_buffer("down", down.float(), persistent=False)
        self.register_buffer("up", up.float().contiguous(), persistent=False)
        self.core = nn.Parameter(torch.zeros(up.shape[1], down.shape[0]))

    def start_at(self, weights: Sequence[float]) -> None:
        """Forget what was learned and give these fusion weights."""
        with torch.no_grad():
            self.start.copy_(torch.tensor(weights))
            self.core.zero_()

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, " adapters"]:
        """The constant weights, to be broadcast over the batch and the sequence."""
        return self.start

    def known_weights(self) -> Float[Tensor, " adapters"]:
        """The weights, before anything is read."""
        return self.start

    def factors(self) -> LowRank:
        """What the core adds to the linear."""
        return LowRank(self.down, self.core, self.up)


def _scaled_directions(matrices: Sequence[Float[Tensor, "_rank features"]]) -> Float[Tensor, "directions features"]:
    """Directions of all rows, each as long as a row of its matrix is in the root mean square."""
    directions, rows = own_directions(torch.cat(list(matrices)))
    lengths = torch.cat([matrix.square().sum(dim=1).mean().sqrt().expand(len(matrix)) for matrix in matrices])
    return lengths[rows, None] * directions


@dataclass(frozen=True)
class AdapterCore(FittedOnExamples, Method):
    """A learned core between frozen adapters.

    Attributes:
        start: the constant fusion weights that the core is learned on top of: "best" (what has the lowest loss on the
            training examples of each adapter alone, and all of them with equal weights of 1/k, 1/sqrt(k) and 1),
            "average", an adapter's name, or weights by adapter name.
    """

    start: str | Mapping[str, float] = "best"

    name: ClassVar[str] = "adapter-core"
    level: ClassVar[Level] = "task"
    place: ClassVar[Place] = "module"
    learns: ClassVar[Learning] = "gradient"
    adds: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {"learning_rate": 2e-2, "min_steps": 125}

    def starts(self, adapters: Sequence[str]) -> dict[str, list[float]]:
        """Each adapter alone, and all of them with equal weights, where training starts at the best of these."""
        alone, count = super().starts(adapters), len(adapters)
        if not alone or count == 1:
            return alone
        # A core mends what adapters do to each other; that an adapter is missing, it mends far more slowly.
        equal = {f"all by {weight:.3g}": [weight] * count for weight in (1 / count, count**-0.5, 1.0)}
        return {**alone, **equal}

    def gate(self, site: Site) -> CoreGate:
        """The core of one linear.

        Raises:
            MethodError: if what the adapters update there are the matrices of experts.
        """
        (updates,) = site.updates.values()
        if any(update is not None and update.experts > 1 for update in updates):
            raise MethodError(
                f"'{site.module}' of decoder layer {site.layer} are matrices of experts, between which there is no one "
                f"core. The method {self.name!r} takes adapters of linear modules; take another method."
            )
        gate = CoreGate(updates)
        gate.start_at(self.start_weights(site.adapters, best=None))
        return gate

r"""RAMoLE: a router LoRA in each linear asks all adapters, whichever they are, what they would say of a token.

With the adapters' own $u_i = A_i x$, the query, the keys and the fusion weights of a linear are

$$q = A_r x, \qquad k_i = B_r^T (s_i B_i u_i), \qquad
w = \operatorname{softmax}_i\big(\langle q, k_i \rangle / \sqrt{r_r}\big)$$

and only the router's $A_r$ (as a LoRA's, random at first) and $B_r$ (zero, so that all adapters weigh the same) learn,
on the adapters' own data together. In each forward an adapter is left out with probability p, but two stay. Nothing
that is learned belongs to an adapter, so one that joins later is weighed like the others, without training.

With `retrieve`, the adapters are the few whose own data is nearest to the prompt: those of the largest inner product
of the prompt's vector, of length 1, and the mean vector of samples of an adapter's data, as LoraRetriever finds them.
While the router learns, it is among all of them.

A score is $u_i^T (s_i B_i^T B_r)\, q / \sqrt{r_r}$: of an adapter it needs u and a matrix of $[r_i, r_r]$. A
`lora_bias` is a part of what its adapter would say, and of its key; a DoRA is asked by its $B A$.

Paper: Zhao et al. 2024, "Retrieval-Augmented Mixture of LoRA Experts for Uploadable Machine Learning",
[arXiv 2406.16989](https://arxiv.org/abs/2406.16989). Cost: a second product with all A, and for each linear one
of the router's rank; $r_r (d_{in} + d_{out})$ values for each linear, however many adapters there are, learned from
their own data or from that of some of them; no examples of the task at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from loraflow.adapters import LoraModule
from loraflow.errors import MethodError
from loraflow.methods._shared.centroids import BASE, Centroids, EmbedsPrompts
from loraflow.methods._shared.scores import linear_scores, softmax_among, targets_of
from loraflow.methods.base import Learning, Level, Method, Place, Query, Site
from loraflow.methods.checks import check_count, check_share, check_top_k


class RouterGate(nn.Module):
    """The router of one linear.

    Attributes:
        lora_A: A_r, `[rank, in_features]`.
        lora_B: B_r, `[out_features, rank]`.
        reads: the adapters' A, one below the other, `[slots, in_features]`; a `lora_bias` has zeros.
        writes: their `s B`, and their biases, `[slots, out_features]`.
        constant: 1 where a slot is a bias, whose u is 1, `[slots]`.
        owners: 1 where a slot is an adapter's, `[slots, adapters]`.
        targets: which adapters target the linear, `[adapters]`.
        among: while it learns, the adapters that are weighed; None weighs all.
        retrieves: whether those are weighed that were retrieved for a prompt.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    reads: Float[Tensor, "slots in_features"]
    writes: Float[Tensor, "slots out_features"]
    constant: Float[Tensor, " slots"]
    owners: Float[Tensor, "slots adapters"]
    targets: Bool[Tensor, " adapters"]
    among: Bool[Tensor, " adapters"] | None
    retrieves: bool

    def __init__(self, site: Site, rank: int, *, retrieves: bool = False) -> None:
        super().__init__()
        updates = site.updates[site.module or ""]
        present = [(position, update) for position, update in enumerate(updates) if update is not None]
        owners = [position for position, update in present for _ in range(_slots(update))]
        constant = [
            one for _, update in present for one in [0.0] * update.rank + [1.0] * (_slots(update) - update.rank)
        ]
        self.register_buffer("reads", torch.cat([_reads(update) for _, update in present]), persistent=False)
        self.register_buffer("writes", torch.cat([_writes(update) for _, update in present]), persistent=False)
        self.register_buffer("constant", torch.tensor(constant), persistent=False)
        self.register_buffer("owners", F.one_hot(torch.tensor(owners), len(updates)).float(), persistent=False)
        self.register_buffer("targets", targets_of(site), persistent=False)
        self.lora_A = nn.Parameter(torch.empty(rank, site.features))
        self.lora_B = nn.Parameter(torch.zeros(self.writes.shape[1], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.retrieves = retrieves
        self.among = None
        self._kept: tuple[nn.Parameter, int, Tensor] | None = None

    def forward(
        self, x: Float[Tensor, "*batch in_features"], prior: Float[Tensor, "*batch adapters"] | None = None
    ) -> Float[Tensor, "*batch adapters"]:
        """Fusion weights of each position, among the adapters that `prior` does not exclude.

        Raises:
            MethodError: if some were to be retrieved, and no prompt was read.
        """
        # While it learns it weighs whom it is told to; a plan of a step passes before anybody is drawn.
        if self.retrieves and prior is None and self.among is None and not self.training:
            raise MethodError(
                "The router weighs what was retrieved for a prompt, and a bare forward does not say what the prompt "
                "is. Call `generate`, or give `prompt_mask`, 1 at its tokens."
            )
        query = linear_scores(x, self.lora_A)
        u = linear_scores(x, self.reads) + self.constant
        scores = linear_scores(u * linear_scores(query, self._small()), self.owners.T)
        among = self.targets if self.among is None else self.targets & self.among.to(self.targets.device)
        among = among.expand(scores.shape) if prior is None else among & prior.isfinite()
        return softmax_among(scores / self.lora_A.shape[0] ** 0.5, among)

    def _small(self) -> Float[Tensor, "slots rank"]:
        """What is needed of the adapters beside u: each one's `s B^T B_r`, one below the other."""
        learns = torch.is_grad_enabled() and self.lora_B.requires_grad
        if learns or torch.compiler.is_compiling() or self.lora_B.is_inference():
            return linear_scores(self.writes, self.lora_B.T)
        of, version = self.lora_B, self.lora_B._version
        if self._kept is None or self._kept[0] is not of or self._kept[1] != version:
            # What outlives a call in inference mode, others could not use.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = of, version, linear_scores(self.writes, of.T)
        return self._kept[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept = None
        return super()._apply(fn, recurse)


def _slots(update: LoraModule) -> int:
    return update.rank + (update.bias is not None)


def _reads(update: LoraModule) -> Float[Tensor, "slots in_features"]:
    rows = update.lora_A.double()
    return rows if update.bias is None else torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _writes(update: LoraModule) -> Float[Tensor, "slots out_features"]:
    columns = update.lora_B.double().T
    columns = columns if update.bias is None else torch.cat([columns, update.bias.to(columns)[None]])
    return update.scaling * columns


@dataclass(frozen=True)
class _Finder(EmbedsPrompts):
    """What compares a prompt with samples of the adapters' data, by vectors of length 1."""

    layer: int
    encoder: str
    instruction: str

    def embed(self, query: Query, gate: Any) -> Float[Tensor, " hidden"]:
        return F.normalize(super().embed(query, gate), dim=0)


@dataclass(frozen=True)
class Ramole(Method):
    """RAMoLE's routing.

    Attributes:
        rank: of the router.
        drop: the probability with which an adapter is left out of a forward while the router learns; two stay.
        retrieve: how many adapters are retrieved for each prompt, and weighed; None weighs all.
        layer: by which decoder layer's output of the base, averaged over the prompt, they are found; -1 is the last.
        encoder: "base", or the Hub id or directory of another model that embeds texts (`loraflow.encoders`).
        instruction: what another model reads before each text.
    """

    rank: int = 8
    drop: float = 0.5
    retrieve: int | None = None
    layer: int = -1
    encoder: str = BASE
    instruction: str = ""

    name: ClassVar[str] = "ramole"
    paper: ClassVar[str] = "2406.16989"
    level: ClassVar[Level] = "token"
    place: ClassVar[Place] = "module"
    learns: ClassVar[Learning] = "together"
    # Chosen on the small world; the paper's own recipe is not known to us.
    recipe: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-2, "max_steps": 100}

    def __post_init__(self) -> None:
        check_count(self.rank, "rank")
        check_share(self.drop, "drop")
        given = {"layer": self.layer != -1, "encoder": self.encoder != BASE, "instruction": bool(self.instruction)}
        if self.retrieve is None and any(given.values()):
            idle = next(name for name, is_it in given.items() if is_it)
            raise MethodError(
                f"`{idle}` (={getattr(self, idle)!r}) says how adapters are retrieved, and `retrieve` is None, which "
                "weighs all. Set that, or leave it out."
            )
        _Finder(self.layer, self.encoder, self.instruction)

    @property
    def reads_prompt(self) -> bool:
        """Where adapters are retrieved."""
        return self.retrieve is not None

    def keeper(self, site: Site) -> Centroids | None:
        """Make the place for the adapters' vectors, where they are retrieved by those."""
        return None if self.retrieve is None else self._finder.gate(site)

    def embed(self, query: Query, gate: Any) -> Float[Tensor, " hidden"]:
        """The vector of a prompt, of length 1."""
        return self._finder.embed(query, gate)

    def prior(self, query: Query, keeper: Any) -> Float[Tensor, " adapters"]:
        """0 for the adapters that are retrieved, minus infinity for the others; of equal ones, those named first.

        Raises:
            MethodError: if the adapters have no vectors yet.
        """
        # The states of one base lie in a narrow cone, whose axis says nothing.
        embedding, centroids = self._finder.compared(query, keeper, center=self.encoder == BASE)
        nearest = (centroids @ embedding).argsort(descending=True, stable=True)[: self.retrieve]
        return torch.full((len(centroids),), -torch.inf).index_fill(0, nearest.cpu(), 0.0)

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        check_top_k(self.retrieve, adapters, "retrieve")

    @property
    def _finder(self) -> _Finder:
        return _Finder(self.layer, self.encoder, self.instruction)

    def gate(self, site: Site) -> RouterGate:
        """The router of one linear.

        Raises:
            MethodError: if what the adapters update there are the matrices of experts.
        """
        if any(update is not None and update.experts > 1 for update in site.updates[site.module or ""]):
            raise MethodError(
                f"'{site.module}' of decoder layer {site.layer} are matrices of experts, which read only what is sent "
                f"to them. The method {self.name!r} takes adapters of linear modules; take another method."
            )
        return RouterGate(site, self.rank, retrieves=self.retrieve is not None)

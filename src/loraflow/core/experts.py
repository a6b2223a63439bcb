r"""The fused pass of a mixture's experts, whose matrices are one parameter each.

A router sends each token to a few experts. For a token x at expert e, every method computes

$$y = W_e x + B_e\,(E w \odot A_e x)$$

with the fusion weights w of the token: they follow it to its experts. `transformers` gives all such modules one form
(`use_experts_implementation`), and what is between the two products is their own; their forward is computed here again,
for an update enters between. That it is the same without updates is tried when adapters are put in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loraflow.adapters import LoraModule
from loraflow.core.active import Active
from loraflow.core.context import LayerContext
from loraflow.core.cuts import Cuts
from loraflow.core.linear import FusedLinear
from loraflow.core.products import mix_slots
from loraflow.core.routed import Routed
from loraflow.core.rows import Rows
from loraflow.core.stock import Shelf
from loraflow.core.swap import swap_class
from loraflow.errors import ArchitectureError

# The grouped kernels want rows of whole 16 bytes.
_ALIGNED = 8


@dataclass(eq=False)
class ExpertPart:
    """The updates of some adapters, or of all, as in `ExpertStack`.

    Attributes:
        lora_A: as there.
        lora_B: as there.
        owners: as there.
        places: as there.
    """

    lora_A: Tensor
    lora_B: Tensor
    owners: Tensor
    places: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return self.lora_A.nbytes + self.lora_B.nbytes


class ExpertStack(nn.Module):
    """All adapters' updates of one parameter of a mixture's experts, concatenated along the rank.

    Attributes:
        names: of the parameter, within its decoder layer.
        rows: what the rows of the mixture's input are.
        lora_A: every expert's stacked A, transposed, `[experts, in_features, slots]`.
        lora_B: every expert's stacked B, transposed, with the scaling folded in, `[experts, slots, out_features]`.
        owners: the adapter of each slot, `[slots]`.
        places: its place within that adapter's rank, `[slots]`.
        dropout: probability with which inputs of A are dropped in training.
        shelf: where the updates are, made as they are used (`core/stock.py`); None where those of all adapters are
            here. `lora_A` has no slots then.
    """

    names: tuple[str, ...]
    rows: Rows
    lora_A: Tensor
    lora_B: Tensor
    owners: Tensor
    places: Tensor
    dropout: float
    shelf: Shelf[ExpertPart] | None

    def __init__(
        self,
        name: str,
        rows: Rows,
        updates: Sequence[LoraModule | None],
        dtype: torch.dtype,
        device: torch.device,
        shelf: Shelf[ExpertPart] | None = None,
    ) -> None:
        super().__init__()
        self.shelf = shelf
        self.place_count = max(update.rank for update in updates if update is not None)
        if shelf is not None:
            updates = [_emptied(next(update for update in updates if update is not None))]
        self.names, self.rows, self.dropout = (name,), rows, 0.0
        wide = torch.promote_types(dtype, torch.float32)
        rows_A, rows_B = [], []
        owners: list[int] = []
        places: list[int] = []
        for owner, update in enumerate(updates):
            if update is None:
                continue
            rows_A.append(update.lora_A.to(wide).unflatten(0, (update.experts, update.rank)))
            lora_B = update.lora_B.to(wide) * update.scaling
            rows_B.append(lora_B.T.unflatten(0, (update.experts, update.rank)))
            owners += [owner] * update.rank
            places += range(update.rank)
        lora_A, lora_B = torch.cat(rows_A, dim=1), torch.cat(rows_B, dim=1)
        missing = -lora_A.shape[1] % _ALIGNED
        lora_A, lora_B = (F.pad(matrix, (0, 0, 0, missing)) for matrix in (lora_A, lora_B))
        filled = torch.tensor([owners + [0] * missing, places + [0] * missing])
        self.register_buffer("lora_A", lora_A.mT.contiguous().to(device, dtype), persistent=False)
        self.register_buffer("lora_B", lora_B.to(device, dtype), persistent=False)
        self.register_buffer("owners", filled[0].to(device), persistent=False)
        self.register_buffer("places", filled[1].to(device), persistent=False)
        self._slots = tuple(owners)
        self._cuts: Cuts[ExpertPart] = Cuts()

    def part(self, active: Active | None) -> ExpertPart:
        """The updates of these adapters, or of all, cut out once as long as they are used."""
        if self.shelf is not None:
            return self.shelf.of(active)
        return self._cuts.of(active, self.lora_A, self._cut)

    def _cut(self, active: Active | None) -> ExpertPart:
        if active is None:
            return ExpertPart(self.lora_A, self.lora_B, self.owners, self.places)
        kept = [slot for slot, owner in enumerate(self._slots) if owner in active]
        missing, index = -len(kept) % _ALIGNED, torch.tensor(kept, dtype=torch.long, device=self.lora_A.device)
        return ExpertPart(
            F.pad(self.lora_A.index_select(2, index), (0, missing)),
            F.pad(self.lora_B.index_select(1, index), (0, 0, 0, missing)),
            F.pad(self.owners.index_select(0, index), (0, missing)),
            F.pad(self.places.index_select(0, index), (0, missing)),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What was cut out is on the old device until then.
        self._cuts.clear()
        if self.shelf is not None:
            self.shelf.stock.clear()
        return super()._apply(fn, recurse)

    def update(
        self,
        routed: Routed,
        x: Float[Tensor, "rows in_features"],
        weights: Float[Tensor, "*rows adapters"],
        mixes: bool | Tensor,
        active: Active | None,
    ) -> Float[Tensor, "rows out_features"] | None:
        """What the active adapters add to the product with the experts' own matrices; None where none has a part."""
        part = self.part(active)
        if not len(part.owners):
            return None
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        slots = weights[..., part.owners].to(part.lora_A.dtype)
        weighted = routed.multiply(x, part.lora_A, small=True) * slots
        if mixes is not False:
            mixed = mix_slots(weighted, slots, part.places, self.place_count)
            weighted = mixed if mixes is True else torch.where(mixes[routed.tokens], mixed, weighted)
        return routed.multiply(weighted, part.lora_B, small=True)


def expert_part(name: str, update: LoraModule, position: int, dtype: torch.dtype, device: torch.device) -> ExpertPart:
    """The update of one adapter, at this position among all."""
    stack = ExpertStack(name, "tokens", [update], dtype, device)
    return ExpertPart(stack.lora_A, stack.lora_B, stack.owners + position, stack.places)


def join_experts(parts: Sequence[ExpertPart]) -> ExpertPart:
    """The updates of several adapters, given those of each."""
    return ExpertPart(
        torch.cat([part.lora_A for part in parts], dim=2),
        torch.cat([part.lora_B for part in parts], dim=1),
        torch.cat([part.owners for part in parts]),
        torch.cat([part.places for part in parts]),
    )


def _emptied(update: LoraModule) -> LoraModule:
    """An update without slots, of the same experts and widths."""
    (_, features), (width, _) = update.lora_A.shape, update.lora_B.shape
    return LoraModule(torch.empty(0, features), torch.empty(width, 0), update.scaling, experts=update.experts)


class ExpertMember(NamedTuple):
    """Where fused experts stand in their layer.

    Attributes:
        name: of the module, within its layer.
        stacks: the adapters' updates, by parameter.
        context: what the layer's gates and linears share.
    """

    name: str
    stacks: Mapping[str, ExpertStack]
    context: LayerContext


class FusedExperts(nn.Module):
    """Mixed into the class of a mixture's experts: adds the updates of a token's adapters at the token's experts.

    Attributes:
        fused: where they stand in their layer.
    """

    fused: ExpertMember

    def forward(self, hidden_states: Float[Tensor, "tokens hidden"], *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The experts' output with the adapters' updates; `args` are each token's experts and their weights."""
        if not self.fused.context.weighs or not len(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return self.routed_forward(hidden_states, *args, *kwargs.values())

    def routed_forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        chosen: Int[Tensor, "tokens choices"],
        importance: Float[Tensor, "tokens choices"],
    ) -> Float[Tensor, "tokens hidden"]:
        """The experts' own forward, with what the adapters add to each of its products."""
        own: Any = self
        routed = Routed.sort(chosen, own.num_experts, own.config._experts_implementation)
        count = len(hidden_states)
        inner = self._multiply(
            "gate_up_proj" if own.has_gate else "up_proj", routed, hidden_states[routed.tokens], count
        )
        inner = own._apply_gate(inner) if own.has_gate else own.act_fn(inner)
        outputs = self._multiply("down_proj", routed, inner, count)
        # A choice that is no expert adds nothing.
        importance = importance.masked_fill(chosen >= own.num_experts, 0)
        outputs = outputs * importance.reshape(-1)[routed.order][:, None]
        unsorted = torch.empty_like(outputs).index_copy(0, routed.order, outputs)
        return unsorted.view(*chosen.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def _multiply(self, name: str, routed: Routed, x: Float[Tensor, "rows in_features"], count: int) -> Tensor:
        own: Any = self
        matrices = getattr(own, name)
        result = routed.multiply(x, matrices if own.is_transposed else matrices.mT)
        if own.has_bias:
            result = result + getattr(own, f"{name}_bias")[routed.experts]
        _, stacks, context = self.fused
        stack = stacks.get(name)
        if stack is None:
            return result
        weights = context.weights_for_routed(stack.names[0], stack.rows, routed.tokens, count, x)
        if weights is None:
            return result
        update = stack.update(routed, x, weights, context.mixes_for(count), context.active)
        return result if update is None else result + update.to(result.dtype)


def fuse_experts(experts: nn.Module, fused: ExpertMember) -> None:
    """Make a mixture's experts `FusedExperts`, in their place.

    Raises:
        ArchitectureError: if they are not of the form that is computed here.
    """
    needed = ("num_experts", "has_gate", "has_bias", "is_transposed", "down_proj", "config")
    name = f"The experts '{fused.name}' of decoder layer {fused.context.index}, {type(experts).__name__},"
    if not all(hasattr(experts, attribute) for attribute in needed) or getattr(experts, "_is_expert_parallel", False):
        raise ArchitectureError(
            f"{name} are not of transformers' common form on one device, which is the one that can be fused. Load the "
            "base as it is, neither quantised nor split by experts, or leave them out of the adapters' targets."
        )
    unknown = [parameter for parameter in fused.stacks if parameter not in ("gate_up_proj", "up_proj", "down_proj")]
    if unknown:
        raise ArchitectureError(f"{name} have adapters of {unknown}, which are no matrices of theirs. Leave those out.")
    before = _answer(experts)
    swap_class(experts, FusedExperts)
    assert isinstance(experts, FusedExperts)
    experts.fused = fused
    if before is None:
        return
    after = experts.routed_forward(*_question(experts))
    if (after - before).abs().max() > _tolerance(before.dtype) * before.abs().max():
        raise ArchitectureError(
            f"{name} compute something else than transformers' common form. Leave them out of the adapters' targets."
        )


def _question(experts: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Two tokens, each at two experts, one after the other."""
    matrix = experts.down_proj
    hidden = matrix.shape[2 if experts.is_transposed else 1]
    states = torch.linspace(-1, 1, 2 * hidden, device=matrix.device, dtype=matrix.dtype).view(2, hidden)
    choices = min(2, experts.num_experts)
    chosen = torch.arange(2 * choices, device=matrix.device).view(2, choices) % experts.num_experts
    importance = torch.linspace(0.3, 0.7, 2 * choices, device=matrix.device, dtype=matrix.dtype).view(2, choices)
    return states, chosen, importance


@torch.no_grad()
def _answer(experts: nn.Module) -> Tensor | None:
    """What experts give for the question; None where they have no values to compute with."""
    return None if experts.down_proj.is_meta else experts(*_question(experts))


def _tolerance(dtype: torch.dtype) -> float:
    return 5e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4


class FusedWeight(FusedLinear):
    """Mixed into the class of a module that multiplies a weight of its own with its input, as routers do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with the adapters' updates added to that product.

        Raises:
            ArchitectureError: if there is no such product.
        """
        with _Product(self) as product:
            result = super(FusedLinear, self).forward(*args, **kwargs)
        if product.count != 1:
            raise ArchitectureError(
                f"'{self.fused.name}' of decoder layer {self.fused.context.index} is used {product.count} times where "
                "one product with an input was expected, so its adapters cannot be fused. Leave it out of "
                "`target_parameters`."
            )
        return result


class _Product(TorchFunctionMode):
    """Adds the updates to a module's product with its own weight, wherever in its forward that is."""

    def __init__(self, module: FusedWeight) -> None:
        super().__init__()
        self.module = module
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch's, and add to what it gives if it is the product."""
        result = func(*args, **(kwargs or {}))
        # Some cast the weight first, so that it is another tensor.
        if func is F.linear:
            x, weight = (*args, *(kwargs or {}).values())[:2]
            if weight.shape == cast(Tensor, self.module.weight).shape:
                self.count += 1
                result = self.module.add_updates(x, result)
        return result

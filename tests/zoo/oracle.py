"""What a fusion must give, computed on the base alone: by merged weights, or by hooks that add updates token by token.

The updates are PEFT's own (`get_delta_weight`), dense, and the gates' formula is that of `loraflow.core.reference`:
nothing here shares code with the fused pass.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Gate = Callable[[Tensor], Tensor]


class NoOracle(Exception):  # noqa: N818 (an outcome, not an error)
    """The oracle does not know which token a row belongs to."""


def updates_of(peft_model: PeftModel) -> dict[str, Tensor]:
    """The dense update of every parameter that an adapter changes, by the parameter's name in the base."""
    found = {}
    for name, module in peft_model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", "weight")
            found[f"{name.replace('.base_layer', '')}.{parameter}"] = module.get_delta_weight("default").detach()
    return found


def merged(
    base: PreTrainedModel,
    updates: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | Tensor,
    layer_of: Callable[[str], int] = lambda _: 0,
) -> PreTrainedModel:
    """A copy of the base with W + sum_i w_i Delta_i in place of W; weights `[adapters]` or `[layers, adapters]`."""
    result = copy.deepcopy(base)
    table = torch.as_tensor(weights, dtype=torch.float64)
    with torch.no_grad():
        for name in dict.fromkeys(name for found in updates for name in found):
            row = table if table.dim() == 1 else table[layer_of(name)]
            owner, _, leaf = name.rpartition(".")
            weight = result.get_parameter(name).detach()
            changes = [w.to(weight.dtype) * u[name] for w, u in zip(row, updates, strict=True) if name in u]
            # Its own from now on, for it may be tied to another's, which has updates of its own.
            setattr(result.get_submodule(owner), leaf, nn.Parameter(weight + sum(changes)))
    return result


@dataclass
class TokenByToken:
    """A base whose linears add each token's own weighted updates; experts follow the one token that runs.

    Attributes:
        base: a copy of its own; parameters of experts are changed in it while it runs.
        updates: each adapter's, as `updates_of` gives them.
        prefix: name of the list of decoder layers.
        layer_gates: gates that read their layer's input, by layer.
        module_gates: gates that read their linear's input, by the full name of the linear or parameter.
        stepwise: whether calls are one token each, after one another, with the cache.
    """

    base: PreTrainedModel
    updates: Sequence[Mapping[str, Tensor]]
    prefix: str
    layer_gates: Mapping[int, Gate] = field(default_factory=dict)
    module_gates: Mapping[str, Gate] = field(default_factory=dict)
    stepwise: bool = False

    def __post_init__(self) -> None:
        self._weights: dict[int, Tensor] = {}
        self._past: dict[int, list[Tensor]] = {}
        self._running: list[int] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[PreTrainedModel]:
        """The base with its hooks."""
        handles, products = [], _Products()
        for index, layer in enumerate(self.base.get_submodule(self.prefix)):
            handles.append(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._leave))
        for name in dict.fromkeys(name for found in self.updates for name in found):
            owner, _, parameter = name.rpartition(".")
            module = self.base.get_submodule(owner)
            if isinstance(module, nn.Linear | Conv1D):
                handles.append(module.register_forward_hook(self._add_updates(name)))
            elif name in self.module_gates:
                products.watch(getattr(module, parameter), self.module_gates[name], [u.get(name) for u in self.updates])
            else:
                handles.append(module.register_forward_pre_hook(self._mix_parameter(module, name, parameter)))
        try:
            with products:
                yield self.base
            products.check()
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self._running.append(index)
            states = args[0] if args else kwargs["hidden_states"]
            if index not in self.layer_gates:
                return
            if states.dim() != 3:
                raise NoOracle(f"a decoder layer reads {states.dim()} dimensions")
            self._weights[index] = self.layer_gates[index](states).flatten(0, 1)
            self._past.setdefault(index, []).append(self._weights[index])

        return hook

    def _leave(self, *_: object) -> None:
        self._running.pop()

    def _add_updates(self, name: str) -> Callable[..., Tensor]:
        linear = name.removesuffix(".weight")

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            gate = self.module_gates.get(linear)
            weights = gate(x) if gate is not None else self._rows(linear, x)
            for adapter, found in enumerate(self.updates):
                if name in found:
                    matrix = found[name].T if isinstance(module, Conv1D) else found[name]
                    output = output + weights[..., adapter : adapter + 1].to(x.dtype) * F.linear(x, matrix)
            return output

        return hook

    def _rows(self, linear: str, x: Tensor) -> Tensor:
        """The weights of a linear's rows: those of the layer's tokens, or of all tokens since the first."""
        count, here = x.shape[:-1].numel(), self._running[-1] if self._running else -1
        if here not in self._weights:
            raise NoOracle(f"'{linear}' runs outside the decoder layers")
        now = self._weights[here]
        if count == len(now):
            return now.view(*x.shape[:-1], -1)
        past = self._past[here]
        if self.stepwise and count == len(past):
            return torch.cat(past).view(*x.shape[:-1], -1)
        raise NoOracle(f"'{linear}' reads {count} rows of {len(now)} tokens")

    def _mix_parameter(self, module: nn.Module, name: str, parameter: str) -> Callable[..., None]:
        tensor = getattr(module, parameter)
        original = tensor.detach().clone()

        def hook(*_: object) -> None:
            weights = self._weights.get(self._running[-1])
            if weights is None or len(weights) != 1:
                raise NoOracle(f"'{name}' can follow one token with weights of its layer only")
            changes = [w * u[name] for w, u in zip(weights[0], self.updates, strict=True) if name in u]
            with torch.no_grad():
                tensor.copy_(original + sum(changes))

        return hook


class _Products(TorchFunctionMode):
    """Adds updates to every product with a watched parameter, or with one expert's part of it."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[int, tuple[Tensor, Gate, Sequence[Tensor | None]]] = {}
        self._seen: set[int] = set()

    def watch(self, parameter: Tensor, gate: Gate, updates: Sequence[Tensor | None]) -> None:
        """Weigh these updates of a parameter by what a gate says of each product's input."""
        self._watched[parameter.untyped_storage().data_ptr()] = parameter, gate, updates

    def check(self) -> None:
        """That no parameter was used in a way that is not seen here.

        Raises:
            NoOracle: if one was.
        """
        if self._watched.keys() - self._seen:
            raise NoOracle("a parameter with a gate of its own is copied before it is used")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """The product, and what is added to it."""
        output = func(*args, **(kwargs or {}))
        if func not in _PRODUCTS or len(args) < 2 or args[1].untyped_storage().data_ptr() not in self._watched:
            return output
        x, weight = args[:2]
        key = weight.untyped_storage().data_ptr()
        self._seen.add(key)
        parameter, gate, updates = self._watched[key]
        expert = weight.storage_offset() // parameter[0].numel() if parameter.dim() == 3 else ...
        turned = weight.stride() != parameter[expert].stride()
        weights = gate(x)
        for adapter, update in enumerate(updates):
            if update is not None:
                part = update[expert].T if turned else update[expert]
                output = output + weights[..., adapter : adapter + 1].to(x.dtype) * func(x, part)
        return output


_PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)

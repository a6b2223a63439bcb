"""Tensors that are computed when something is done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor


class LazyTensor(Tensor):
    """Stands for a tensor that few who are handed it look at.

    Whatever is done with it is done with the tensor itself, which is computed then, once. Its shape, type and device
    are known before; that it needs a gradient shows on what comes of it only. So wrappers that walk through a model's
    output (accelerate's, DDP's, FSDP's) compute nothing.
    """

    compute: Callable[[], Tensor]
    at: torch.device
    computed: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what torch is asked for."""
        kwargs = kwargs or {}
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs)
        if func == _DEVICE:
            return args[0].at
        if func == Tensor.float:
            # accelerate's mixed precision widens all outputs.
            (lazy,) = args
            return lazy_tensor(lazy.shape, lazy.at, torch.float32, lambda: _value_of(lazy).float())
        args, kwargs = recursively_apply(_value_of, (args, kwargs), test_type=lambda item: isinstance(item, cls))
        return func(*args, **kwargs)


_KNOWN = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "requires_grad", "grad_fn", "is_leaf")}
_DEVICE = Tensor.device.__get__


def lazy_tensor(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype, compute: Callable[[], Tensor]
) -> LazyTensor:
    """A tensor of this shape, which `compute` gives."""
    lazy = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(LazyTensor)
    lazy.compute, lazy.at, lazy.computed = compute, device, None
    return lazy


def _value_of(lazy: LazyTensor) -> Tensor:
    if lazy.computed is None:
        lazy.computed = lazy.compute()
    return lazy.computed

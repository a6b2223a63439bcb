"""Copies of the base's own parameters that PEFT saves with an adapter: harmless where they equal the base's.

PEFT writes whole embeddings and output heads beside an adapter that has them in `target_modules` or was saved with
`save_embedding_layers`, and whatever `modules_to_save` and `bias` name. Loaded, they replace the base's, for all rows
and adapters; a fusion has one base for all of its adapters, so there they must be what the base has.
"""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from loraflow.adapters.base import Adapter
from loraflow.errors import AdapterError

_PIECE = 8192


def check_copies(adapter: Adapter, base: nn.Module) -> None:
    """Check that a base has the parameters that were saved with an adapter, in the precision of the coarser of them.

    Of a base on the meta device only the shapes are compared; `uncompared_copies` names them.

    Raises:
        AdapterError: if one differs, or cannot be compared.
    """
    for name, copy in adapter.copies.items():
        module = _owner(base, name)
        if module is None:
            raise AdapterError(
                f"Adapter {adapter.name!r} ({adapter.source.path}) holds '{name}', which is neither a LoRA weight nor "
                f"a parameter of {type(base).__name__}. Is it an adapter of another base model?"
            )
        with align_module_device(module):
            own = getattr(module, name.rpartition(".")[2]).detach()
            if not own.is_floating_point():
                raise AdapterError(
                    f"Adapter {adapter.name!r} ({adapter.source.path}) holds a copy of '{name}', which cannot be "
                    f"compared with the base's, quantised as {own.dtype}. Load the base without quantization, or "
                    f"remove '{name}' from the file if it was not trained."
                )
            difference = _difference(own, copy)
        if difference is not None:
            raise AdapterError(
                f"Adapter {adapter.name!r} ({adapter.source.path}) replaces '{name}' of the base: {difference}. "
                f"{_remedy(module, name, own, copy)}"
            )


def uncompared_copies(adapter: Adapter, base: nn.Module) -> list[str]:
    """The parameters saved with an adapter of which only the shapes were compared: the base is on the meta device."""
    return [name for name in adapter.copies if _is_meta(base, name)]


def _owner(base: nn.Module, name: str) -> nn.Module | None:
    """The module that has a parameter."""
    path, _, leaf = name.rpartition(".")
    try:
        module = base.get_submodule(path)
    except AttributeError:
        return None
    return module if isinstance(getattr(module, leaf, None), Tensor) else None


def _is_meta(base: nn.Module, name: str) -> bool:
    module = _owner(base, name)
    if module is None:
        return False
    with align_module_device(module):
        return bool(getattr(module, name.rpartition(".")[2]).is_meta)


def _difference(own: Tensor, copy: Tensor) -> str | None:
    """How a copy differs from the base's own, in words."""
    if own.shape != copy.shape:
        more = len(copy) - len(own) if _of_one_width(own, copy) else 0
        added = f" (tokens added: {more})" if more > 0 else ""
        return f"it has the shape {tuple(copy.shape)}, and the base's has {tuple(own.shape)}{added}"
    if own.is_meta:
        return None
    own, copy = (tensor.reshape(len(tensor) if tensor.dim() else 1, -1) for tensor in (own, copy))
    # In pieces: of whole embeddings, casts would need several times their size.
    rows = torch.cat([_unequal_rows(*pieces) for pieces in zip(own.split(_PIECE), copy.split(_PIECE), strict=True)])
    differing = int(rows.sum())
    return f"{differing} of {len(rows)} {'rows' if own.shape[1] > 1 else 'values'} differ" if differing else None


def _of_one_width(own: Tensor, copy: Tensor) -> bool:
    return own.dim() == copy.dim() == 2 and own.shape[1] == copy.shape[1]


def _unequal_rows(own: Tensor, copy: Tensor) -> Tensor:
    def unequal(a: Tensor, b: Tensor) -> Tensor:
        # torch compares no 8-bit floats.
        return a.float() != b.float() if a.element_size() == 1 else a != b

    copy = copy.to(own.device)
    # Either may be the other, rounded.
    return (unequal(copy.to(own.dtype), own) & unequal(own.to(copy.dtype), copy)).any(dim=1)


def _remedy(module: nn.Module, name: str, own: Tensor, copy: Tensor) -> str:
    if name.endswith(".bias"):
        return "Retrain it with `bias='none'`."
    of_tokens = isinstance(module, nn.Embedding) or name.endswith("lm_head.weight")
    if of_tokens and _of_one_width(own, copy):
        resize = f"`base.resize_token_embeddings({len(copy)})`, then " if len(copy) != len(own) else ""
        return (
            f"Make it the base's own, for all adapters: {resize}`base.get_parameter({name!r}).data.copy_(...)` from "
            "the file, and save the base; or retrain the adapter without it."
        )
    if own.shape != copy.shape:
        return "It was trained on another base: give that base, or another adapter."
    return "Retrain it without `modules_to_save`."

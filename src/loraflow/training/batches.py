"""Which examples share a forward, and how they lie in it: by length, or packed into one row without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening
from transformers.trainer_pt_utils import LengthGroupedSampler

from loraflow.errors import ArchitectureError
from loraflow.training.data import TokenExample, TokenExamples

_WITHOUT = "Leave packing out."
# Tokens of the two rows that are tried; real models make something large of a first token, whatever it is.
_TRIED = (7, 5)


class ByLength(LengthGroupedSampler):
    """transformers' order of examples of similar length, drawn anew in each epoch from the seed.

    Its own generator would go on from epoch to epoch, which a resumed run could not know.
    """

    def __init__(self, data: TokenExamples, batch_size: int, seed: int) -> None:
        lengths = [len(row.input_ids) for row in data.rows]
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Positions of the examples."""
        self.generator.manual_seed(self._seed + self._epoch)
        return super().__iter__()


class Packed:
    """Lays the rows of a forward one behind the other in one, with no padding between them.

    Positions start again at each row, which is what tells transformers' masks, and the kernels of Flash Attention, that
    none may look into another; a mask or a cache would speak against it. What the loss is averaged over stays the same:
    all answers' tokens of a step, whichever rows they are in.
    """

    def __call__(self, rows: Sequence[TokenExample]) -> dict[str, Any]:
        """A batch of `input_ids`, `position_ids` and `labels`, each `[1, tokens]`."""
        flat = DataCollatorWithFlattening()([dataclasses.asdict(row) for row in rows])
        return {**flat, "use_cache": False}


def check_packing(model: nn.Module) -> None:
    """Check on a model itself that rows that are packed are read as if each were alone.

    Args:
        model: with the forward that is trained, and transformers' `config` and `get_input_embeddings`.

    Raises:
        ArchitectureError: if they are not; the message has the reason.
    """
    config: Any = model.config
    name = f"{config.architectures[0] if config.architectures else config.model_type}"
    attention = config.get_text_config()._attn_implementation
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise ArchitectureError(
            f"`packing` is not for {name}: its chunks of attention are counted from the start of a packed row, not of "
            f"each example. {_WITHOUT}"
        )
    training = model.training
    model.eval()
    try:
        leaks, difference, tolerance = _try_packing(model)
    except TypeError as error:
        raise ArchitectureError(
            f"`packing` is not for {name}: its forward does not take positions ({error}). {_WITHOUT}"
        ) from error
    finally:
        model.train(training)
    if leaks:
        raise ArchitectureError(
            f"`packing` is not for {name} with the attention {attention!r}: what it makes of an example depends on the "
            "one packed before it, as where a layer has a state that goes on from token to token, or the mask is made "
            f"without positions. {_WITHOUT}"
        )
    if not difference <= tolerance:
        raise ArchitectureError(
            f"`packing` is not for {name} with the attention {attention!r}: packed examples give other logits than the "
            f"same ones alone (relative difference {difference:.2g}, at most {tolerance:g}). {_WITHOUT}"
        )


def _try_packing(model: Any) -> tuple[bool, float, float]:
    """Whether the second of two packed rows sees the first, and how far both are from what they are alone."""
    words = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(words, (count,), generator=generator).tolist() for count in _TRIED]
    batch = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in Packed()([TokenExample(row, row) for row in rows]).items()
        if name != "labels"
    }
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            packed = model(**batch).logits
            # A gradient of exactly zero shows in any precision that nothing was seen; equal logits do not.
            (seen,) = torch.autograd.grad(packed[:, _TRIED[0] :].float().square().sum(), embedded[0])
    finally:
        handle.remove()
    with torch.no_grad():
        each = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits for row in rows]
    alone = torch.cat(each, dim=1).float()
    difference = (packed.detach().float() - alone).norm() / alone.norm()
    tolerance = 1e-3 if packed.dtype in (torch.float32, torch.float64) else 0.1
    return bool(seen[:, : _TRIED[0]].any()), float(difference), tolerance


def in_forwards(data: TokenExamples, size: int, *, by_length: bool) -> list[list[int]]:
    """The examples' lengths as forwards of this size have them, in an order like that of an epoch."""
    lengths = [len(row.input_ids) for row in data.rows]
    order: list[int] = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    if by_length:
        order.sort(key=lengths.__getitem__)
    return [[lengths[index] for index in order[start : start + size]] for start in range(0, len(order), size)]

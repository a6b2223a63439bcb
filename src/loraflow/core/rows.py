"""Which positions the rows of a linear's input are: found by a probe of the base, never taken from a shape.

Fusion weights belong to positions: the gate of a layer reads its tokens. Most linears of a layer read those tokens too,
one row each. Some do not: the up projection of a latent attention (DeepSeek's `kv_b_proj`) reads every cached position
at each step, and others read what is no longer one row for each position.

The probe runs the base on a few short prompts that differ from the first in one position each. What a row belongs to is
the first position that changes it. It stops behind the last layer that is unlike those before it, so that a model of
equal layers is read for one of them, and its second forward continues the first, as generation does.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from loraflow.core.architecture import DecoderLayers
from loraflow.errors import ArchitectureError

Rows = Literal["tokens", "cached", "prompts", "unknown"]
"""What a linear's rows are, from the most to the least that is known of them.

The layer's tokens, in order; all cached positions and then those tokens; something of each prompt of the batch, in
order; nothing of the kind.
"""
_BY_STRENGTH: tuple[Rows, ...] = ("tokens", "cached", "prompts", "unknown")

# Positions read at first, and then with the cache. All prompts have the same token first: real models make of that one
# something large which no other token would change. Two prompts at the end are equal to the first.
_FIRST, _NEXT = 6, 1
_PROMPTS = _FIRST + _NEXT + 2


@dataclass(frozen=True)
class LayerRows:
    """What the rows of a decoder layer are.

    Attributes:
        axes: where batch and positions are in the layer's input; None where they are nowhere.
        streams: whether that input is not one state of each token, as wide as the model's.
        linears: what each linear reads, by name within the layer; those that the probe never called are missing.
    """

    axes: tuple[int, int] | None = (0, 1)
    streams: bool = False
    linears: dict[str, Rows] | None = None

    def of(self, name: str) -> Rows:
        """What a linear reads; one that the probe did not call reads what those in its place elsewhere read.

        One that only images reach is taken to read tokens, until it is called with another number of rows.
        """
        if self.linears is None or name in self.linears:
            return "tokens" if self.linears is None else self.linears[name]
        place = _without_numbers(name)
        alike = [rows for other, rows in self.linears.items() if _without_numbers(other) == place]
        return max(alike, key=_BY_STRENGTH.index, default="tokens")


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


_probed: weakref.WeakKeyDictionary[nn.Module, list[LayerRows]] = weakref.WeakKeyDictionary()


def probe_rows(model: PreTrainedModel, layers: DecoderLayers) -> list[LayerRows]:
    """What the rows of each decoder layer and of all its linears are; a base is probed once.

    A base on the meta device has no values to tell positions by; its rows are taken to be the layer's tokens.

    Raises:
        ArchitectureError: if the base cannot be run on a few tokens.
    """
    if any(parameter.is_meta for parameter in model.parameters()) and not _is_offloaded(model):
        return [LayerRows() for _ in layers.layers]
    if model not in _probed:
        _probed[model] = _probe(model, layers)
    return _probed[model]


def _is_offloaded(model: nn.Module) -> bool:
    # accelerate keeps weights on the meta device that it brings in for each forward.
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _probe(model: PreTrainedModel, layers: DecoderLayers) -> list[LayerRows]:
    kinds = [_kind(layer) for layer in layers.layers]
    first_of = {kind: kinds.index(kind) for kind in reversed(kinds)}
    seen = {index: _Seen(layers.layers[index]) for index in sorted(first_of.values())}
    ids = _prompts(model)
    training = [module for module in model.modules() if module.training]
    # Qwen's vision models keep there how far the last prompt's images have moved its positions.
    moved: dict[Any, Any] = {module: module.rope_deltas for module in model.modules() if hasattr(module, "rope_deltas")}
    model.eval()
    try:
        for module in moved:
            module.rope_deltas = None
        with torch.no_grad(), contextlib.ExitStack() as hooks:
            for each in seen.values():
                hooks.enter_context(each.watching(stop=each is seen[max(seen)]))
            if _run(model, ids[:, :_FIRST], seen[min(seen)]) is not None:
                for each in seen.values():
                    each.calls.append({})
                _run(model, ids[:, _FIRST:], seen[min(seen)])
    except Exception as error:
        raise ArchitectureError(
            f"{type(model).__name__} could not be run on {_PROMPTS} prompts of {_FIRST} tokens, with which it is found "
            f"out what its linears read: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True
        for module, positions in moved.items():
            module.rope_deltas = positions
    found = {index: each.result(layers.hidden_size, _tolerance(model)) for index, each in seen.items()}
    lost = [index for index, rows in found.items() if rows.axes is None]
    if lost:
        raise ArchitectureError(
            f"{type(model).__name__} is not supported: what decoder layer {lost[0]} takes first holds no state of each "
            "token of each prompt."
        )
    return [found[first_of[kind]] for kind in kinds]


def _kind(layer: nn.Module) -> object:
    return type(layer), tuple((name, type(module)) for name, module in layer.named_modules())


def _prompts(model: PreTrainedModel) -> Tensor:
    """The first prompt, then one for each later position that differs from it there, then the first twice again."""
    config = model.config.get_text_config(decoder=True)
    special: set[int] = set()
    for source in (model.config, config):
        for name, value in source.to_dict().items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])
    plain = [token for token in range(min(config.vocab_size, 1024)) if token not in special]
    count = len(plain)
    ids = torch.tensor([[plain[i % count] for i in range(_FIRST + _NEXT)]] * _PROMPTS, device=model.device)
    for position in range(1, _FIRST + _NEXT):
        ids[position, position] = plain[(position + count // 2) % count]
    return ids


class _Stop(Exception):  # noqa: N818 (not an error: what was to be read has been read)
    pass


@dataclass
class _Seen:
    """What one layer and its linears were called with, in each forward of the probe."""

    layer: nn.Module
    calls: list[dict[str, list[Tensor]]] = field(default_factory=lambda: [{}])
    cache: Cache | None = None
    output: Tensor | None = None

    @contextlib.contextmanager
    def watching(self, stop: bool) -> Iterator[None]:
        """Note what is read inside the block; the forward ends behind this layer if it is the last."""

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if not name:
                    self.cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
                x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
                if x is not None:
                    # A copy: some layers change their input in place.
                    self.calls[-1].setdefault(name, []).append(x.detach().clone())

            return hook

        def end(*_: object) -> None:
            raise _Stop

        def note_output(_: nn.Module, __: object, output: Any) -> None:
            if len(self.calls) == 1:
                self.output = (output if isinstance(output, Tensor) else output[0]).detach().clone()

        handles = [
            module.register_forward_pre_hook(note(name), with_kwargs=True)
            for name, module in self.layer.named_modules()
        ]
        handles.append(self.layer.register_forward_hook(note_output))
        if stop:
            handles.append(self.layer.register_forward_hook(end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self, hidden_size: int, tolerance: float) -> LayerRows:
        """What the layer's rows, and those of each of its linears, are."""
        prefill = self.calls[0]
        if "" not in prefill:
            # A layer that only images reach.
            return LayerRows(linears={})
        axes = _axes(prefill[""][0], tolerance)
        streams = axes != (0, 1) or prefill[""][0].shape[2:] != (hidden_size,)
        # Where positions look ahead, a later one changes those before it, and only the shape is left to go by.
        output = None if self.output is None or axes is None else self.output.movedim(axes, (0, 1)).flatten(2)
        ahead = output is not None and not _are_positions(output, 0, _FIRST, tolerance)
        linears = {}
        for name in prefill:
            if name:
                found = [_rows(x, 0, _FIRST, 0, tolerance, ahead) for x in prefill[name]]
                for later in self.calls[1:]:
                    found += [_rows(x, _FIRST, _NEXT, _FIRST, tolerance, ahead) for x in later.get(name, [])]
                linears[name] = max(found, key=_BY_STRENGTH.index)
        return LayerRows(axes, streams, linears)


def _run(model: PreTrainedModel, ids: Tensor, first: _Seen) -> Cache | None:
    """A forward up to the last watched layer, with the cache of the one before; gives what the layers were handed."""
    cache = {} if first.cache is None else {_cache_name(model): first.cache}
    with contextlib.suppress(_Stop):
        model(input_ids=ids, use_cache=True, **cache)
    return first.cache


def _cache_name(model: PreTrainedModel) -> str:
    """What the base's forward calls its cache: `cache` since transformers 5.24, one of two names before."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "cache_params") if name in names), "past_key_values")


def _tolerance(model: PreTrainedModel) -> float:
    # Equal rows come out slightly unequal where a batch is computed in parts.
    return 2e-2 if model.dtype in (torch.float16, torch.bfloat16) else 1e-3


def _rows(x: Tensor, first: int, count: int, cached: int, tolerance: float, ahead: bool) -> Rows:
    """What the rows of an input are, where the prompts' positions from `first` on were read."""
    if _are_positions(x, first, count, tolerance, ahead):
        return "tokens"
    if cached and _are_positions(x, 0, cached + count, tolerance, ahead):
        return "cached"
    if len(x) == _PROMPTS and x.dim() > 1:
        changed = _changes(x.reshape(_PROMPTS, 1, -1), tolerance)[:, 0].tolist()
        equal, to_come = (changed[0], *changed[-2:]), changed[first + count : -2]
        if any(changed) and not any((*equal, *to_come)):
            return "prompts"
    return "unknown"


def _are_positions(x: Tensor, first: int, count: int, tolerance: float, ahead: bool = False) -> bool:
    """Whether the rows are `count` positions of each prompt from `first` on, prompt after prompt."""
    if x.dim() < 2 or x.shape[:-1].numel() != _PROMPTS * count or (ahead and x.shape[:2] != (_PROMPTS, count)):
        return False
    changed = _changes(x.reshape(_PROMPTS, count, -1), tolerance)
    if changed[0].any() or changed[-2:].any():
        return False
    # A prompt that differs in what is cached may differ in every row after it.
    for prompt in range(max(first, 1), _FIRST + _NEXT):
        here, position = changed[prompt], prompt - first
        if not here[position : position + 1].all() or (here[:position].any() and not ahead):
            return False
    return True


def _changes(states: Tensor, tolerance: float) -> Tensor:
    """Where the prompts' states differ from those of the first, `[prompts, positions]`.

    By their length as a whole: single features of real models are larger than all others by far, for every token.
    """
    states = states.float()
    lengths = states.norm(dim=-1)
    return (states - states[:1]).norm(dim=-1) > tolerance * torch.maximum(lengths, lengths[:1])


def _axes(x: Tensor, tolerance: float) -> tuple[int, int] | None:
    """Where batch and positions are in a layer's input of the first forward."""
    for batch, seq in itertools.permutations(range(x.dim()), 2):
        if (x.shape[batch], x.shape[seq]) != (_PROMPTS, _FIRST) or x.dim() < 3:
            continue
        # That of a layer behind the first may have looked ahead.
        if _are_positions(x.movedim((batch, seq), (0, 1)).flatten(2), 0, _FIRST, tolerance, ahead=True):
            return batch, seq
    return None

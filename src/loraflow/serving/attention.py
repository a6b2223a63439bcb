"""SDPA on a paged cache, in which each request reads its own keys and values only.

transformers lays the keys of all requests of a step one behind the other and masks those of others, so that each of n
requests reads n times what it needs, and absurd numbers of one reach the others (0 * NaN is NaN). Here requests of one
new token, which are nearly all, attend as a batch whose keys are padded to the longest, and others one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "loraflow_paged_sdpa"

# Requests attend together while at most half of the keys that they read are padding.
_PADDED = 2


@dataclass(frozen=True)
class _Group:
    """Neighbours in a step that attend together: one request, or several with one new token each.

    Attributes:
        requests: how many.
        queries: their tokens in the step.
        keys: what they read, each as much as the longest of them.
        mask: which keys each query sees; None where it is all, or all before it.
    """

    requests: int
    queries: slice
    keys: slice
    mask: Bool[Tensor, "requests 1 queries keys"] | None

    def attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "1 heads tokens dim"],
        key: Float[Tensor, "keys kv_heads dim"],
        value: Float[Tensor, "keys kv_heads dim"],
        **options: Any,
    ) -> Float[Tensor, "1 own heads dim"]:
        """What the group's queries read."""
        query, key, value = query[:, :, self.queries], key[self.keys], value[self.keys]
        if self.requests == 1:
            # A view more costs as much as a small product, in every layer at every token.
            key, value = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
        else:
            query = query.transpose(0, 2)
            key, value = (x.view(self.requests, -1, *x.shape[1:]).transpose(1, 2) for x in (key, value))
        read, _ = sdpa_attention_forward(module, query, key, value, self.mask, is_causal=True, **options)
        return read if self.requests == 1 else read.transpose(0, 1)


@dataclass(frozen=True)
class _Layout:
    """How the requests of a step attend in all layers of one kind.

    Attributes:
        places: what is read, as places among the step's own reads; those before the first are padding. None where it is
            these as they are.
    """

    groups: tuple[_Group, ...]
    places: Int[Tensor, " reads"] | None

    @classmethod
    def of(cls, allocator: CacheAllocator, batch: Sequence[FutureRequestState], device: torch.device) -> _Layout:
        """The layout of a step."""
        spans: list[tuple[int, int]] = []
        for future in batch:
            new = future.query_length
            spans.append((new, allocator.get_seqlen_k(future.state.position_offset - new, new)))
        window = getattr(allocator, "sliding_window", None)
        groups: list[_Group] = []
        places: list[Tensor] = []
        query = key = first = 0
        for run in _runs(spans):
            tokens, lengths = sum(new for new, _ in run), [length for _, length in run]
            longest, total = max(lengths), sum(lengths)
            reads = longest * len(run)
            starts = [*accumulate(lengths[:-1], initial=first)]
            mask: Tensor | None
            if reads > total:
                steps = torch.arange(longest, device=device)
                real = steps < torch.tensor(lengths, device=device)[:, None]
                mask = real[:, None, None]
                places.append((torch.tensor(starts, device=device)[:, None] + steps).masked_fill(~real, -1).flatten())
            else:
                mask = _mask_of_one(tokens, longest, window, device) if len(run) == 1 else None
                places.append(torch.arange(first, first + total, device=device))
            groups.append(_Group(len(run), slice(query, query + tokens), slice(key, key + reads), mask))
            query, key, first = query + tokens, key + reads, first + total
        return cls(tuple(groups), torch.cat(places) if key > first else None)

    def reads(self, index: Int[Tensor, " own"], padding: int) -> Int[Tensor, " reads"]:
        """The rows of the cache that are read; padding reads one that is never written."""
        if self.places is None:
            return index
        return index[self.places.clamp(min=0)].masked_fill(self.places < 0, padding)


def _runs(spans: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Requests, each with its new tokens and the keys it sees, in runs that attend together."""
    run: list[tuple[int, int]] = []
    longest = total = 0
    for new, length in spans:
        fits = new == 1 and run and run[0][0] == 1
        if not fits or max(longest, length) * (len(run) + 1) > _PADDED * (total + length):
            if run:
                yield run
            run, longest, total = [], 0, 0
        run.append((new, length))
        longest, total = max(longest, length), total + length
    if run:
        yield run


def _mask_of_one(new: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys the last tokens of a text see, `[1, 1, new, keys]`; None where that is all, or all before them."""
    if new == 1 or (new == keys and (window is None or new <= window)):
        return None
    behind = torch.arange(keys - new, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return seen[None, None]


def _attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cache: PagedAttentionCache,
    read_index: Sequence[Tensor],
    write_index: Sequence[Tensor],
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; a step has no mask for all of its requests."""
    layer = cast(int, module.layer_idx)
    allocator = cache.layer_to_allocator[layer]
    layout = cast(Any, cache).layouts[allocator.index]
    rows, written = read_index[allocator.index], write_index[allocator.index]
    new = (key[0].transpose(0, 1), value[0].transpose(0, 1))
    keys, values = allocator.update(*new, layer, layout.reads(rows, allocator.read_trash_index), written)
    read = [group.attend(module, query, keys, values, dropout=dropout, scaling=scaling) for group in layout.groups]
    return read[0] if len(read) == 1 else torch.cat(read, dim=1), None


AttentionInterface.register(_NAME, _attend)


@contextlib.contextmanager
def attending_apart(
    config: PretrainedConfig, cache: PagedAttentionCache, batch: Sequence[FutureRequestState]
) -> Iterator[None]:
    """Let the requests of a step each read its own; nobody else may call the model meanwhile."""
    device = torch.device(cache.device)
    layouts = [_Layout.of(allocator, batch, device) for allocator in cache.cache_allocators.values()]
    cast(Any, cache).layouts = layouts
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before

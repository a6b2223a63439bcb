"""Pages of the cache that requests share, where they begin alike and are weighed alike.

transformers finds a page again by its tokens and those before it. The same tokens under other weights have other keys
and values, so that here what a request's weights depend on (`Job.prefix`) stands before its first page.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from loraflow.serving.jobs import Job


class Prefixes:
    """Takes the place of what a cache of one allocator does to share its pages; nothing is kept beside the cache.

    A page that no request uses stays until its place is wanted, and those that were used last stay the longest.

    Args:
        cache: the cache, which allows pages to be shared.
        margin: the part of it that the scheduler wants free before it takes a further request in.
        jobs: the requests by id.
    """

    def __init__(self, cache: PagedAttentionCache, margin: float, jobs: Mapping[str, Job]) -> None:
        (self._pages,) = cache.cache_allocators.values()
        self._cache = cache
        self._margin = margin
        self._jobs = jobs
        # A page is found by a digest of all that decides what is in it; transformers' own is one of tokens, of 64 bits.
        self._page_of = cast(dict[bytes, int], self._pages.ledger.hash_to_block)
        hooked = cast(Any, cache)
        hooked.search_prefix_match = self._match
        hooked.mark_complete_blocks = self._keep
        hooked.evict_cached_blocks = self._make_room
        hooked.can_store_request_tokens = self._evicting(cache.can_store_request_tokens)
        hooked.free_blocks = self._freeing(cache.free_blocks)

    def _match(self, request_id: str, tokens: Sequence[int]) -> int:
        """Give a request the pages that hold the beginning of its tokens; how many tokens those are."""
        job = self._jobs.get(request_id)
        # What is found is not computed, and says nothing of how likely the prompt's tokens are.
        if job is None or job.prefix is None or job.tells_prompt:
            return 0
        found = []
        # The last token is always computed: the next one comes from it.
        for key in self._keys(job.prefix, tokens[:-1]):
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        length = len(found) * self._pages.tokens_per_page
        if found:
            self._pages.acquire_prefix_blocks(request_id, length, found)
        if not job.told:
            job.cached = length
        return length

    def _keep(self, state: RequestState, complete: Mapping[str, int]) -> None:
        """Let others find the pages that a request has filled; where there is an equal one, it uses that one."""
        job = self._jobs.get(state.request_id)
        if not complete or state.status == RequestStatus.FINISHED or job is None or job.prefix is None:
            return
        ledger, table = self._pages.ledger, self._pages.block_table[state.request_id]
        # The newest token is not in the cache yet.
        tokens = (state.initial_tokens + state.generated_tokens)[: state.current_len()]
        for place, key in enumerate(self._keys(job.prefix, tokens)):
            page = table[place]
            if page in ledger.block_to_hash:
                continue
            equal = ledger.register_new_hash(page, cast(Any, key))
            if equal is not None:
                ledger.acquire(equal)
                table[place] = equal
                if ledger.release(page):
                    self._cache.pool.free_blocks(self._pages.index, [page])

    def _keys(self, prefix: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
        """What each full page of these tokens is found by."""
        size = self._pages.tokens_per_page
        for start in range(0, len(tokens) - size + 1, size):
            prefix = hashlib.sha256(prefix + array("q", tokens[start : start + size]).tobytes()).digest()
            yield prefix

    def _make_room(self) -> bool:
        """Forget pages until the margin is free, and at least one; whether there was one."""
        evicted = self._evict_oldest()
        while evicted and self._cache.compute_free_capacity() < self._margin and self._evict_oldest():
            pass
        return evicted

    def _evict_oldest(self) -> bool:
        ledger = self._pages.ledger
        if not ledger.cached_blocks:
            return False
        page = next(iter(ledger.cached_blocks))
        del ledger.cached_blocks[page], ledger.hash_to_block[ledger.block_to_hash.pop(page)]
        self._cache.pool.free_blocks(self._pages.index, [page])
        return True

    def _evicting(self, can_store: Callable[..., bool]) -> Callable[..., bool]:
        """A cache's `can_store_request_tokens` that forgets pages nobody uses before it says no."""

        def store(state: RequestState, length: int, dry_run: bool = False) -> bool:
            while not can_store(state, length, dry_run):
                if not self._evict_oldest():
                    return False
            return True

        return store

    def _freeing(self, free: Callable[..., None]) -> Callable[..., None]:
        """A cache's `free_blocks` that frees a request's last page first: it is of no use without those before it."""

        def free_backwards(request_id: str, no_cache: bool = False) -> None:
            self._pages.block_table.get(request_id, []).reverse()
            free(request_id, no_cache)

        return free_backwards

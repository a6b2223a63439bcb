"""Prefixes in the cache, kept apart by the weights that requests bring."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from loraflow.serving.vllm.request_weights import KEY
from loraflow.serving.vllm.seam import AsyncScheduler, Request, Scheduler


def salt(request: Request) -> None:
    """Let a request read and leave prefixes only for others of the same weights and salt."""
    params = request.sampling_params
    weights = None if params is None else (params.extra_args or {}).get(KEY)
    if weights is None and request.cache_salt is None:
        return
    # A client's own salt is hashed too: taken as it is, it could be that of somebody's weights. Equal weights that are
    # written otherwise only share nothing.
    text = json.dumps([request.cache_salt, weights], sort_keys=True)
    request.cache_salt = f"{KEY}:{hashlib.sha256(text.encode()).hexdigest()}"
    # vLLM has hashed the prompt already, when it made the request.
    request.block_hashes.clear()
    request.update_block_hashes()


class _Salting:
    """Mixed into a scheduler of vLLM."""

    def add_request(self, request: Request) -> None:
        salt(request)
        super().add_request(request)  # type: ignore[misc]


class _Synchronous(_Salting, Scheduler):
    pass


class _Asynchronous(_Salting, AsyncScheduler):
    pass


class SaltedScheduler:
    """vLLM's own scheduler, for which the same text under other weights is another prefix."""

    def __new__(cls, vllm_config: Any, **rest: Any) -> Any:
        """The scheduler that vLLM would have taken: whether steps overlap is known only now."""
        kind = _Asynchronous if vllm_config.scheduler_config.async_scheduling else _Synchronous
        return kind(vllm_config=vllm_config, **rest)

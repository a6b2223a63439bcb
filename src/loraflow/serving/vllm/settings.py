"""How an engine is set up, as its checks read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """How an engine of vLLM is set up, of what matters to a fusion.

    Attributes:
        architecture: the class of the model.
        runner: what the model is run for.
        latent_attention: whether the model has multi-head latent attention.
        sleep_mode: whether the engine can be put to sleep.
        pipeline_parallel: over how many stages the layers are.
        data_parallel: how many engines compute in step with each other.
        context_parallel: over how many ranks a sequence is.
        expert_parallel: whether each rank has experts of its own.
        micro_batches: whether a batch is computed in halves.
        speculative: whether tokens are guessed ahead.
        kv_transfer: whether caches go to other engines.
        cache_dir: whether what is compiled is kept in a place of the caller's.
        prefix_caching: whether requests read what others left in the cache.
        salted: whether that is kept apart by the weights of requests.
        v2_runner: whether the V2 model runner is in use.
    """

    architecture: str
    runner: str = "generate"
    latent_attention: bool = False
    sleep_mode: bool = False
    pipeline_parallel: int = 1
    data_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: bool = False
    micro_batches: bool = False
    speculative: bool = False
    kv_transfer: bool = False
    cache_dir: bool = False
    prefix_caching: bool = True
    salted: bool = False
    v2_runner: bool = False

"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from torch import Tensor

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server; requests by model and how they ended (`service.Outcome`)."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("loraflow_requests", "Requests", ["model", "outcome"], registry=registry)
        self.refused = Counter("loraflow_refused_requests", "Requests refused with 429", registry=registry)
        self.prompt_tokens = Counter("loraflow_prompt_tokens", "Tokens read", registry=registry)
        self.prefix_queries = Counter(
            "vllm:prefix_cache_queries", "Tokens of prompts looked for in the cache", registry=registry
        )
        self.prefix_hits = Counter("vllm:prefix_cache_hits", "Tokens of prompts found there", registry=registry)
        self.generated = Counter("loraflow_generated_tokens", "Tokens generated", registry=registry)
        self.seconds = Histogram("loraflow_request_seconds", "Whole requests", buckets=_SECONDS, registry=registry)
        self.first_token = Histogram(
            "loraflow_first_token_seconds", "Till the first token", buckets=_SECONDS, registry=registry
        )
        self._weights = Counter(
            "loraflow_fusion_weight",
            "Sum of the mean weights of tokens that were sent with theirs",
            ["adapter"],
            registry=registry,
        )
        self._weighed = Counter("loraflow_weighed_tokens", "Tokens that were sent with weights", registry=registry)
        self._gauges = {
            name: Gauge(f"loraflow_{name}_answers", text, registry=registry)
            for name, text in (
                ("running", "Answers in the engine"),
                ("batched", "Answers in its last step"),
                ("waiting", "Answers that are in the engine and were not in its last step"),
            )
        }

    def watch(self, running: Callable[[], int], batched: Callable[[], int]) -> None:
        """Read how many answers are in the engine, and in its last step, whenever the metrics are read."""
        self._gauges["running"].set_function(running)
        self._gauges["batched"].set_function(batched)
        self._gauges["waiting"].set_function(lambda: max(0, running() - batched()))

    def add_weights(self, adapters: Sequence[str], weights: Float[Tensor, "layers adapters"]) -> None:
        """Count a token's weights; negative ones take nothing away."""
        self._weighed.inc()
        for name, weight in zip(adapters, weights.mean(dim=0).tolist(), strict=True):
            self._weights.labels(name).inc(max(0.0, weight))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

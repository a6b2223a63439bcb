"""What a server counts, for Prometheus: by the names, labels and buckets of vLLM, whose dashboards and rules fit so.

No label has a value that clients choose: how many series there are depends on what the server offers alone.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence

from jaxtyping import Float
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from torch import Tensor

from loraflow.serving.engine import Engine

# vLLM's, of its `v1/metrics/buckets.py`.
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_ANSWERS = (1, 2, 5, 10, 20)

_SECONDS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Seconds till the first token", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Seconds between two tokens", _BETWEEN_TOKENS),
    "request_time_per_output_token_seconds": ("Mean seconds between a request's tokens", _BETWEEN_TOKENS),
    "e2e_request_latency_seconds": ("Seconds of whole requests", _LATENCY),
    "request_queue_time_seconds": ("Seconds of waiting for a place in the batch", _LATENCY),
    "request_inference_time_seconds": ("Seconds in the batch", _LATENCY),
    "request_prefill_time_seconds": ("Seconds in the batch till the first token", _LATENCY),
    "request_decode_time_seconds": ("Seconds from the first token to the last", _LATENCY),
}
_TOKENS = {
    "request_prompt_tokens": "Tokens of prompts",
    "request_generation_tokens": "Tokens of answers",
    "request_params_max_tokens": "Tokens that answers may have",
}
REASONS = ("stop", "length", "abort", "error")
"""How an answer ends: by itself, by its length, given up with its request, or failed."""
_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")


class Metrics:
    """Counters of one server.

    Args:
        model_name: what the base is called; vLLM's label for all that an engine does.
        longest: tokens of the longest prompt and answer together.
    """

    def __init__(self, model_name: str, longest: int) -> None:
        registry = self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        names = list(self._labels)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens read")
        self.generated = self._counter("generation_tokens", "Tokens generated")
        self.prefix_queries = self._counter("prefix_cache_queries", "Tokens of prompts looked for in the cache")
        self.prefix_hits = self._counter("prefix_cache_hits", "Tokens of prompts found there")
        rejections = Counter(
            "vllm:admission_rejections", "Requests refused with 429", ["model_name", "reason"], registry=registry
        )
        self.refused = rejections.labels(model_name, "max_num_queued_reqs")
        # A reason that vLLM does not have.
        self.refused_at_rest = rejections.labels(model_name, "too_many_refused")
        success = Counter("vllm:request_success", "Answers", [*names, "finished_reason"], registry=registry)
        self.answers = {reason: success.labels(**self._labels, finished_reason=reason) for reason in REASONS}
        tables = _SECONDS | {name: (text, _one_two_five(longest)) for name, text in _TOKENS.items()}
        tables["request_params_n"] = ("Answers that requests ask for", _ANSWERS)
        self._histograms = {
            name: Histogram(f"vllm:{name}", text, names, buckets=buckets, registry=registry).labels(**self._labels)
            for name, (text, buckets) in tables.items()
        }
        self._http = Counter("http_requests", "Requests", ["handler", "method", "status"], registry=registry)
        self.requests = Counter("loraflow:requests", "Prompts", ["model", "outcome"], registry=registry)
        self._weights = Counter(
            "loraflow:fusion_weight",
            "Sum of the mean weights of tokens that were sent with theirs",
            ["adapter"],
            registry=registry,
        )
        self._picked = {
            name: Counter(f"loraflow:auto_{name}", text, ["adapter"], registry=registry)
            for name, text in (
                ("requests", "Prompts that an adapter was picked for"),
                ("generation_tokens", "Tokens generated for these"),
                ("weight", "Sum of its mean weights in these"),
            )
        }
        self.base_alone = Counter("loraflow:auto_base_alone", "Prompts that none was picked for", registry=registry)
        self._weighed = Counter("loraflow:weighed_tokens", "Tokens that were sent with weights", registry=registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, list(self._labels), registry=self._registry).labels(**self._labels)

    def watch(self, engine: Engine) -> None:
        """Read what an engine does whenever the metrics are read."""
        self._registry.register(_EngineState(engine, self._labels))

    def observe(self, name: str, value: float) -> None:
        """Count a value of one of the histograms, which have vLLM's names."""
        self._histograms[name].observe(value)

    def add_http(self, handler: str, method: str, status: int) -> None:
        """Count a request over HTTP, by what answers its path, method and kind of status, as vLLM's server does."""
        self._http.labels(handler, method if method in _METHODS else "other", f"{status // 100}xx").inc()

    def add_weights(self, adapters: Sequence[str], weights: Float[Tensor, "layers adapters"]) -> None:
        """Count a token's weights; negative ones take nothing away."""
        self._weighed.inc()
        for name, weight in zip(adapters, weights.mean(dim=0).tolist(), strict=True):
            self._weights.labels(name).inc(max(0.0, weight))

    def add_picks(self, weights: Mapping[str, float], tokens: int) -> None:
        """Count what `auto` picked for a prompt; negative weights take nothing away."""
        for name, weight in weights.items():
            self._picked["requests"].labels(name).inc()
            self._picked["generation_tokens"].labels(name).inc(tokens)
            self._picked["weight"].labels(name).inc(max(0.0, weight))

    def keep(self, models: Collection[str], adapters: Collection[str]) -> None:
        """Forget what is offered no longer, so that series do not grow as models come and go."""
        of_adapters = [(counter, adapters) for counter in (self._weights, *self._picked.values())]
        for counter, known in ((self.requests, models), *of_adapters):
            for values in {tuple(sample.labels.values()) for metric in counter.collect() for sample in metric.samples}:
                if values[0] not in known:
                    counter.remove(*values)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineState(Collector):
    """What an engine does now.

    vLLM keeps a series for every set of adapters that it has seen; here there is one, for the set of now.
    """

    def __init__(self, engine: Engine, labels: dict[str, str]) -> None:
        self._engine = engine
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        running = engine.batched
        yield self._gauge("num_requests_running", "Answers in the last step", self._labels, running)
        waiting = max(0, engine.running - running)
        yield self._gauge("num_requests_waiting", "Answers that were not in the last step", self._labels, waiting)
        usage = engine.cache_usage
        yield self._gauge("kv_cache_usage_perc", "Used part of the cache; 1 is all", self._labels, usage)
        adapters_running, adapters_waiting = engine.adapters_in_use()
        labels = {
            "max_lora": str(len(engine.model.adapter_names)),
            "waiting_lora_adapters": ",".join(adapters_waiting),
            "running_lora_adapters": ",".join(adapters_running),
        }
        yield self._gauge("lora_requests_info", "Adapters of answers; its value is the time", labels, time.time())

    @staticmethod
    def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family


def _one_two_five(longest: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, and so on, up to a number."""
    found = [float(digit * 10**zeros) for zeros in range(len(str(longest))) for digit in (1, 2, 5)]
    return [number for number in found if number <= longest]

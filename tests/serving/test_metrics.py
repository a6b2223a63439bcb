"""What is counted: vLLM's names, labels and buckets, and no more series than there are models."""

from __future__ import annotations

import re

import pytest
import torch

from loraflow.serving.jobs import Weigher
from loraflow.serving.metrics import Metrics
from tests.serving.worlds import job, running, send, tiny_fusion, wait_for

# Those of vLLM 0.32 (`v1/metrics/loggers.py`) that are counted here, with their labels.
ENGINE = ("engine", "model_name")
VLLM = {
    "num_requests_running": ENGINE,
    "num_requests_waiting": ENGINE,
    "kv_cache_usage_perc": ENGINE,
    "lora_requests_info": ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    "prompt_tokens_total": ENGINE,
    "generation_tokens_total": ENGINE,
    "prefix_cache_queries_total": ENGINE,
    "prefix_cache_hits_total": ENGINE,
    "request_success_total": ("engine", "finished_reason", "model_name"),
    "admission_rejections_total": ("model_name", "reason"),
    **{
        f"{name}_bucket": ("engine", "le", "model_name")
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "request_time_per_output_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_inference_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_params_n",
            "request_params_max_tokens",
        )
    },
}


def series(metrics):
    """Names, with the labels of each series."""
    found = {}
    for name, labels in re.findall(r"^([a-z0-9_:]+)(?:\{(.*)\})? \S+$", metrics.text().decode(), re.MULTILINE):
        found.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    return found


@pytest.fixture(scope="module")
def watched():
    """An engine in use, and its metrics."""
    metrics = Metrics("tiny", 512)
    with running(tiny_fusion()) as engine:
        metrics.watch(engine)
        yield engine, metrics


def test_names_and_labels_are_vllms(watched):
    found = series(watched[1])
    for name, labels in VLLM.items():
        assert {tuple(sorted(one)) for one in found[f"vllm:{name}"]} == {labels}, name
    counted = {name for name in found if name.startswith("vllm:") and not name.endswith(("_created", "_sum", "_count"))}
    assert counted == {f"vllm:{name}" for name in VLLM}


def test_buckets_are_vllms():
    found = series(Metrics("tiny", 512))

    def buckets(name):
        return [float(one["le"]) for one in found[f"vllm:{name}_bucket"]]

    assert buckets("request_prompt_tokens") == [1, 2, 5, 10, 20, 50, 100, 200, 500, float("inf")]
    for name, first, last, count in (
        ("time_to_first_token_seconds", 0.001, 2560, 22),
        ("inter_token_latency_seconds", 0.01, 80, 19),
        ("e2e_request_latency_seconds", 0.3, 7680, 21),
    ):
        bounds = buckets(name)
        assert (bounds[0], bounds[-2], len(bounds) - 1) == (first, last, count)
        assert bounds == sorted(bounds)


def test_an_engine_is_read_as_it_runs(watched):
    engine, metrics = watched
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")

    def value(name):
        return float(re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", metrics.text().decode(), re.MULTILINE)[1])

    assert [value(name) for name in gauges] == [0, 0, 0]
    weigher = Weigher(weights=torch.full((3, 1), 0.5), adapters=("b",))
    request = job([5, 6, 7], weigher, new=400)
    request.ends = ()
    send(engine, request)
    wait_for(lambda: value("num_requests_running") == 1)
    assert 0 < value("kv_cache_usage_perc") < 1
    (info,) = series(metrics)["vllm:lora_requests_info"]
    assert info == {"max_lora": "3", "running_lora_adapters": "b", "waiting_lora_adapters": ""}
    engine.cancel(request.id)
    wait_for(lambda: value("kv_cache_usage_perc") == 0)
    # One series, whatever sets of adapters there were.
    (info,) = series(metrics)["vllm:lora_requests_info"]
    assert info["running_lora_adapters"] == ""


def test_series_are_bounded_whatever_clients_send_and_admins_load():
    metrics = Metrics("tiny", 512)
    for number in range(100):
        metrics.requests.labels(f"model {number}", "finished").inc()
        metrics.add_weights([f"adapter {number}", "kept"], torch.ones(2, 2))
        metrics.add_picks({f"adapter {number}": 0.5, "kept": -0.5}, 3)
        metrics.keep(["base"], ["kept"])
        metrics.add_http("none", f"METHOD{number}", 404)
    found = series(metrics)
    assert "loraflow:requests_total" not in found
    assert found["loraflow:fusion_weight_total"] == [{"adapter": "kept"}]
    for name in ("requests", "generation_tokens", "weight"):
        assert found[f"loraflow:auto_{name}_total"] == [{"adapter": "kept"}]
    assert found["http_requests_total"] == [{"handler": "none", "method": "other", "status": "4xx"}]

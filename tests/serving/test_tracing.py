"""Traces: the spans of requests, by OpenTelemetry's own exporter in memory."""

from __future__ import annotations

import builtins
import itertools
import subprocess
import sys

import pytest

from loraflow.errors import LoraflowError
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import ServerConfig
from loraflow.serving.service import Service
from loraflow.serving.tracing import Tracing
from tests.serving.worlds import call, serving_app, tiny_fusion, wait_for

export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="needs OpenTelemetry's SDK (loraflow[otel])")
STAGES = ["read", "weigh", "wait", "first_token", "decode"]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ASKED = {"model": "tiny", "prompt": [5, 6], "max_tokens": 3, "temperature": 0.5}


@pytest.fixture(scope="module")
def traced():
    """A server, and what it has exported."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracing = Tracing(export.SimpleSpanProcessor(exporter))
    service = Service(Catalog(tiny_fusion(), "tiny", "tiny"), ServerConfig(), tracing)
    with serving_app(service) as address:
        yield service, address, exporter


def spans(exporter, count):
    """The spans of one request, by the order of their begins; a parent before its children."""
    wait_for(lambda: len(exporter.get_finished_spans()) >= count)
    found = list(exporter.get_finished_spans())
    assert len(found) == count
    exporter.clear()
    return found


def test_a_request_has_a_span_and_its_stages_too(traced):
    service, address, exporter = traced
    headers = {"X-Request-Id": "mine", "traceparent": PARENT}
    answer = call("POST", f"{address}/v1/completions", ASKED, **headers).json()
    found = {span.name: span for span in spans(exporter, 7)}
    assert list(found) == ["llm_request", *STAGES, "POST /v1/completions"]
    outer, inner = found["POST /v1/completions"], found["llm_request"]
    assert outer.kind.name == "SERVER"
    assert outer.parent.span_id == int(PARENT.split("-")[2], 16)
    assert {span.context.trace_id for span in found.values()} == {int(PARENT.split("-")[1], 16)}
    assert inner.parent.span_id == outer.context.span_id
    assert outer.attributes["http.response.status_code"] == 200
    usage = answer["usage"]
    known = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": "mine",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.n": 1,
        "gen_ai.response.finish_reasons": (answer["choices"][0]["finish_reason"],),
        "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": usage["completion_tokens"],
        "loraflow.outcome": "finished",
    }
    assert {name: inner.attributes[name] for name in known} == known
    latencies = ("time_in_queue", "time_to_first_token", "e2e", "time_in_model_prefill", "time_in_model_decode")
    assert all(inner.attributes[f"gen_ai.latency.{name}"] >= 0 for name in latencies)
    stages = [found[name] for name in STAGES]
    assert all(stage.parent.span_id == inner.context.span_id for stage in stages)
    # One begins where the one before it ends, and none is outside of the request.
    edges = [inner.start_time, *(stage.end_time for stage in stages)]
    assert edges == sorted(edges)
    for before, after in itertools.pairwise(stages):
        assert abs(before.end_time - after.start_time) < 1_000_000
    assert service.metrics.text()


def test_prompts_of_one_request_are_in_one_trace(traced):
    _, address, exporter = traced
    assert call("POST", f"{address}/v1/completions", ASKED | {"prompt": [[5], [6]]}).status == 200
    found = spans(exporter, 13)
    assert len({span.context.trace_id for span in found}) == 1
    assert [span.name for span in found].count("llm_request") == 2


def test_requests_that_are_refused_and_that_fail_have_spans_too(traced, monkeypatch):
    service, address, exporter = traced
    assert call("POST", f"{address}/v1/completions", ASKED | {"model": "other"}).status == 404
    (refused,) = spans(exporter, 1)
    assert refused.attributes["http.response.status_code"] == 404
    assert refused.status.is_unset
    with monkeypatch.context() as patch:
        patch.setattr(service, "find", None)
        assert call("POST", f"{address}/v1/completions", ASKED).status == 500
    (failed,) = spans(exporter, 1)
    assert failed.status.status_code.name == "ERROR"
    for path in ("/health", "/metrics", "/v1/models"):
        call("GET", address + path)
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("given", ["", "localhost:4317", "ftp://x", "http://"])
def test_an_endpoint_must_be_an_address(given):
    with pytest.raises(LoraflowError, match=r"`otlp_traces_endpoint` \(=.*\) is no address\. Give it with its scheme"):
        ServerConfig(otlp_traces_endpoint=given)


def test_an_unknown_protocol_is_refused(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "smoke")
    with pytest.raises(LoraflowError, match=r"TRACES_PROTOCOL` \(='smoke'\) must be one of grpc, http/protobuf\."):
        ServerConfig(otlp_traces_endpoint="http://localhost:1")


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_is_not_there_changes_no_answer(protocol, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    config = ServerConfig(otlp_traces_endpoint="http://127.0.0.1:1/v1/traces", drain_s=0)
    with serving_app(Service(Catalog(tiny_fusion(), "tiny", "tiny"), config)) as address:
        assert call("POST", f"{address}/v1/completions", ASKED).status == 200


def test_a_missing_package_is_told(monkeypatch):
    load = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(LoraflowError, match=r"Traces need OpenTelemetry \(.*\): pip install 'loraflow\[otel\]'"):
        ServerConfig(otlp_traces_endpoint="http://localhost:4317")


def test_nothing_of_it_is_imported_where_nothing_is_traced():
    code = "import sys, loraflow.serving.server; print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

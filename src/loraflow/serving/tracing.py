"""Traces of requests by OpenTelemetry, which is imported only where they are sent somewhere.

A request over HTTP is a span of the server, child of the client's `traceparent` where it has one. Each of its prompts
is a span `llm_request` with the name and the attributes that vLLM gives it, and with one child for each stage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loraflow import __version__
from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_PROTOCOLS = ("grpc", "http/protobuf")


def check_endpoint(endpoint: str) -> None:
    """Check that traces can be sent somewhere.

    Raises:
        LoraflowError: if it is no address, or OpenTelemetry is not installed, or the variable that names the protocol
            names none of OTLP's.
    """
    scheme, separator, host = endpoint.partition("://")
    if not separator or scheme not in ("http", "https") or not host.strip("/"):
        raise LoraflowError(
            f"`otlp_traces_endpoint` (={endpoint!r}) is no address. Give it with its scheme, such as "
            "http://localhost:4317."
        )
    protocol = os.environ.get(_PROTOCOL, _PROTOCOLS[0])
    if protocol not in _PROTOCOLS:
        raise LoraflowError(f"`{_PROTOCOL}` (={protocol!r}) must be one of {', '.join(_PROTOCOLS)}.")
    try:
        _exporter()
    except ImportError as error:
        raise LoraflowError(f"Traces need OpenTelemetry ({error}): pip install 'loraflow[otel]'") from error


def _exporter() -> Callable[..., SpanExporter]:
    """What sends spans by the protocol that the environment names, gRPC where it names none, as vLLM has it."""
    if os.environ.get(_PROTOCOL, _PROTOCOLS[0]) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter


class Tracing:
    """Makes spans of requests.

    Args:
        processor: what takes the spans that have ended.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Not the process's own provider: what other libraries trace is not the server's to turn on.
        named = OTELResourceDetector().detect().attributes
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "loraflow", "service.version": __version__, **named}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("loraflow.serving", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Send spans to a collector, in batches, from a thread of its own."""
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        return cls(BatchSpanProcessor(_exporter()(endpoint=endpoint)))

    def begin(self, headers: Mapping[str, str], name: str, attributes: Mapping[str, Any]) -> Any:
        """The span of a request over HTTP, which `end` ends."""
        from opentelemetry.trace import SpanKind

        # A header of another request's trace is no part of this one.
        carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
        context = self._propagator.extract(carrier)
        return self._tracer.start_span(name, context, SpanKind.SERVER, attributes)

    def end(self, span: Any, attributes: Mapping[str, Any], *, failed: bool) -> None:
        """End the span of a request over HTTP."""
        span.set_attributes(attributes)
        self._end(span, failed=failed)

    def add(
        self,
        parent: Any,
        name: str,
        between: tuple[float, float],
        attributes: Mapping[str, Any],
        *,
        failed: bool = False,
    ) -> Any:
        """A span of something that has been, under another.

        Args:
            parent: the other span.
            name: what it is called.
            between: its begin and its end, in seconds of the monotonic clock.
            attributes: what is known of it.
            failed: whether it is an error.

        Returns:
            The span, which has ended and may be a parent too.
        """
        from opentelemetry.trace import set_span_in_context

        now = time.time_ns() - time.monotonic_ns()
        start, end = (now + int(moment * 1e9) for moment in between)
        context = set_span_in_context(parent)
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=start)
        self._end(span, end, failed=failed)
        return span

    @staticmethod
    def _end(span: Any, end: int | None = None, *, failed: bool) -> None:
        from opentelemetry.trace import StatusCode

        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

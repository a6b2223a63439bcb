"""The outside of a server: ids of requests, their lines in the log, and what is counted and traced of them there."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraflow.serving.metrics import Metrics
from loraflow.serving.record import CURRENT, REQUEST_ID, Record, request_id
from loraflow.serving.tracing import Tracing

log = logging.getLogger("loraflow.serving.requests")

# Asked every few seconds by machines. vLLM does not count them either.
_QUIET = ("/health", "/ready", "/metrics")


class Observed:
    """An app whose requests have ids, and are counted, logged and traced, whatever becomes of them.

    Args:
        app: the app.
        metrics: where they are counted.
        tracing: where their spans go; None for nowhere.
        handlers: the paths by which they are counted; others are one.
        traced: the paths that have spans, with OpenTelemetry's name of what is asked there.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        tracing: Tracing | None,
        handlers: Collection[str],
        traced: Mapping[str, str],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._handlers = handlers
        self._traced = traced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.monotonic()
        record = Record(request_id(headers.get(REQUEST_ID)), str((scope.get("client") or ("",))[0]))
        if self._tracing is not None and scope["path"] in self._traced:
            record.operation = self._traced[scope["path"]]
            asked = {"http.request.method": scope["method"], "url.path": scope["path"], "gen_ai.request.id": record.id}
            record.span = self._tracing.begin(headers, f"{scope['method']} {scope['path']}", asked)
        # What a client sees that hangs up before there is an answer, as nginx says it.
        status = 499

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = record.id
            await send(message)

        before = CURRENT.set(record)
        try:
            await self._app(scope, receive, stamped)
        finally:
            self._tell(scope, record, status, time.monotonic() - started)
            CURRENT.reset(before)

    def _tell(self, scope: Scope, record: Record, status: int, seconds: float) -> None:
        path, method = scope["path"], scope["method"]
        if self._tracing is not None and record.span is not None:
            self._tracing.end(record.span, {"http.response.status_code": status}, failed=status >= 500)
        if path in _QUIET:
            return
        self._metrics.add_http(path if path in self._handlers else "none", method, status)
        facts = {
            "request_id": record.id,
            "client": record.client,
            "method": method,
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
            "model": record.model,
            "prompt_tokens": record.prompt_tokens,
            "generated_tokens": record.generated_tokens,
        }
        # Quoted: a path may have anything in it, line ends too.
        line = f"{record.client} {method} {json.dumps(path)} {status} {seconds:.3f} s, request {record.id}"
        log.info("%s", line, extra={"facts": facts})

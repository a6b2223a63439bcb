"""uvicorn's HTTP, which waits for no client for ever, and takes from none more than it can stand."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from loraflow.serving.config import ServerConfig
from loraflow.serving.inflow import Inflow, RestingFlow
from loraflow.serving.intake import client_of
from loraflow.serving.protocol import ApiError

# Of a request's first line and headers, and of what is sent before the answer to what was sent earlier.
_MOST_HEADER_BYTES, _MOST_HEADER_LINES = 2**14, 256

# So much of a header is read before it is looked at again.
_PART = 2**12


def http_config(app: FastAPI, config: ServerConfig, **options: Any) -> uvicorn.Config:
    """How uvicorn serves an app; `options` are further ones of `uvicorn.Config`."""

    class Protocol(PatientProtocol):
        patience_s = config.receive_timeout_s
        inflow = Inflow()

    # Nothing here speaks WebSocket, for which uvicorn would put another protocol, without bounds, in this one's place.
    return uvicorn.Config(app, http=Protocol, ws="none", h11_max_incomplete_event_size=_MOST_HEADER_BYTES, **options)


class PatientProtocol(H11Protocol):
    """Breaks a connection off whose client sends no whole request in time, or does not take its answer.

    uvicorn's own timeout is for connections between two requests. Nor may an address send without end, in one
    connection or in many, be it after its answer.

    Attributes:
        patience_s: how long a request may take to come in, and how long an answer may lie that nobody takes.
        inflow: what comes from each address; one for a server.
    """

    patience_s: float
    inflow: Inflow
    _coming: asyncio.TimerHandle | None = None
    _going: asyncio.TimerHandle | None = None
    _resting: asyncio.TimerHandle | None = None
    _lines = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, if there is room for one."""
        super().connection_made(transport)
        self.flow: RestingFlow = RestingFlow(transport)
        self._address = client_of({"client": self.client}, keyed=False)
        self._coming = self._later()
        if not self.inflow.opened(self._address):
            message = "This address has as many connections as the server has room for. Close some, or try again later."
            self._refuse(ApiError(503, message, kind="server_error", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self.inflow.closed(self._address)
        for timer in (self._coming, self._going, self._resting):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a request, from its first byte on and not from its last."""
        rest_s = self.inflow.wait_s(self._address, len(data))
        if rest_s and self._resting is None:
            self.flow.rest()
            self._resting = self.loop.call_later(rest_s, self._go_on)
        while data and not self.transport.is_closing():
            in_header = self.conn.their_state is h11.IDLE
            part = data[:_PART] if in_header else data
            data = data[len(part) :]
            super().data_received(part)
            self._check_header(part)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_coming()
        elif self._coming is None:
            self._coming = self._later()

    def pause_writing(self) -> None:
        """Wait for a client that does not take what was sent."""
        super().pause_writing()
        if self._going is None:
            self._going = self._later()

    def resume_writing(self) -> None:
        """It has taken it."""
        if self._going is not None:
            self._going.cancel()
            self._going = None
        super().resume_writing()

    def _unsupported_upgrade_warning(self) -> None:
        # It is no fault of the server, which would have to install something, and anybody could fill the log with it.
        pass

    def _check_header(self, part: bytes) -> None:
        """Refuse what has too many lines before its body, and break off who asks on and on without waiting."""
        if self.conn.their_state is h11.IDLE:
            self._lines += part.count(b"\n")
            if self._lines > _MOST_HEADER_LINES:
                message = f"The request has more than {_MOST_HEADER_LINES} headers. Send fewer."
                self._refuse(ApiError(431, message))
            return
        self._lines = 0
        waits = self.flow.read_paused and self.conn.their_state is h11.DONE
        if waits and len(self.conn.trailing_data[0]) > _MOST_HEADER_BYTES:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        content = json.dumps(error.body()).encode()
        head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nConnection: close\r\n"
        self.transport.write(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
        )
        self.transport.close()

    def _go_on(self) -> None:
        self._resting = None
        if not self.transport.is_closing():
            self.flow.rested()

    def _later(self) -> asyncio.TimerHandle:
        # What has been sent for a client that takes nothing would hold a connection that is only closed.
        return self.loop.call_later(self.patience_s, self.transport.abort)

    def _stop_coming(self) -> None:
        if self._coming is not None:
            self._coming.cancel()
            self._coming = None

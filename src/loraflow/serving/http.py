"""uvicorn's HTTP, which waits for no client for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from loraflow.serving.config import ServerConfig


def http_config(app: FastAPI, config: ServerConfig, **options: Any) -> uvicorn.Config:
    """How uvicorn serves an app; `options` are further ones of `uvicorn.Config`."""

    class Protocol(PatientProtocol):
        patience_s = config.receive_timeout_s

    return uvicorn.Config(app, http=Protocol, **options)


class PatientProtocol(H11Protocol):
    """Breaks a connection off whose client sends no whole request in time, or does not take its answer.

    uvicorn's own timeout is for connections between two requests.

    Attributes:
        patience_s: how long a request may take to come in, and how long an answer may lie that nobody takes.
    """

    patience_s: float
    _coming: asyncio.TimerHandle | None = None
    _going: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._coming = self._later()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_coming()
        self._stop_going()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a request, from its first byte on and not from its last."""
        super().data_received(data)
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
        self._stop_going()
        super().resume_writing()

    def _later(self) -> asyncio.TimerHandle:
        # What has been sent for a client that takes nothing would hold a connection that is only closed.
        return self.loop.call_later(self.patience_s, self.transport.abort)

    def _stop_coming(self) -> None:
        if self._coming is not None:
            self._coming.cancel()
            self._coming = None

    def _stop_going(self) -> None:
        if self._going is not None:
            self._going.cancel()
            self._going = None

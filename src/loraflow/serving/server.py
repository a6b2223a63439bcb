"""The process that serves: uvicorn, ended so that nobody's answer is cut without a word."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from loraflow.errors import LoraflowError
from loraflow.serving.app import make_app
from loraflow.serving.http import http_config
from loraflow.serving.service import Service

# For the last words of answers that are given up, and clients that read slowly.
FLUSH_S = 5

# Connections that may wait to be accepted, and how many of them are at once: all others wait for that.
_BACKLOG, _AT_ONCE = 2048, 16

# How long one thread may keep the others from running Python.
_SWITCH_S = 0.0005


class Server(uvicorn.Server):
    """Answers requests until a signal ends it.

    At the first, nothing new is taken, and what runs has `drain_s` to finish; what has not then ends with an error that
    says so. At the second, the process ends at once.
    """

    def __init__(self, service: Service, ready: Callable[[], None] = lambda: None) -> None:
        self._service = service
        self._ready = ready
        self._stopping: asyncio.Task[None] | None = None
        super().__init__(
            http_config(
                make_app(service),
                service.config,
                access_log=False,
                log_level="warning",
                backlog=_AT_ONCE,
                # uvicorn's lines go through its own handlers otherwise.
                log_config=None if service.config.log_format == "json" else uvicorn.config.LOGGING_CONFIG,
                timeout_graceful_shutdown=int(service.config.drain_s) + FLUSH_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests.

        Raises:
            LoraflowError: if another server has begun to listen on the address meanwhile.
        """
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            raise LoraflowError(
                f"The address cannot be listened on ({error.strerror or error}). Give another address."
            ) from error
        for listener in sockets or []:
            listener.listen(_BACKLOG)
        # Reading must not stop the engine for long: neither for a thread's turn of 5 ms at Python, the default, nor for
        # a search for garbage among all that belongs to the model.
        sys.setswitchinterval(_SWITCH_S)
        gc.collect()
        gc.freeze()
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: the service first, whose answers are what connections wait for."""
        self._stopping = asyncio.create_task(self._service.stop())
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; where that has begun, end."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit = True

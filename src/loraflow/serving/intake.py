"""How requests come in: whole and counted before they are read, each client in its turn, and only while it is there."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraflow.serving.keys import given_key
from loraflow.serving.protocol import ApiError
from loraflow.serving.service import Service
from loraflow.serving.turns import READING, Reading

# What one body may hold. No request that could be answered has so many texts, and a prompt is of fewer tokens.
MOST_TEXTS, MOST_VALUES = 2**14, 2**17

_SEPARATORS = (b",", b"[", b"{")

# Bytes that are counted sooner than another thread is asked to.
_SMALL = 2**16


class Intake:
    """Reads bodies, counts what is in them, and lets their requests be read and answered.

    Whoever sends much waits behind whoever sends little, and work for clients that have gone is dropped, whether it
    waits or runs.
    """

    def __init__(
        self, app: ASGIApp, service: Service, refuse: Callable[[ApiError], ASGIApp], paths: Collection[str]
    ) -> None:
        self._app = app
        self._service = service
        # Elsewhere what has begun is finished: adapters that come in half, say, would be in nobody's hands.
        self._paths = paths
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one request in, and have it answered."""
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:
            return
        gone = asyncio.ensure_future(receive())
        sent = False

        async def told(message: Message) -> None:
            nonlocal sent
            sent = sent or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        work = asyncio.ensure_future(self._answer(scope, body, gone, told))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            # All that is left once an answer is sent is to count it.
            if not work.done() and not sent:
                work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        finally:
            work.cancel()
            gone.cancel()

    async def _answer(self, scope: Scope, body: bytes, gone: asyncio.Future[Message], send: Send) -> None:
        reading = Reading(self._service.reader.turns, client_of(scope, keyed=bool(self._service.config.api_keys)))
        READING.set(reading)
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return gone.result() if gone.done() else await asyncio.shield(gone)

        await reading.begin()
        try:
            try:
                if len(body) < _SMALL:
                    check_body(body)
                else:
                    await asyncio.to_thread(check_body, body)
            except ApiError as error:
                await self._refuse(error)(scope, receive, send)
                return
            await self._app(scope, receive, send)
        finally:
            await reading.end()


async def _body(receive: Receive) -> bytes | None:
    """A request's whole body; None where its client has gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def client_of(scope: Scope, *, keyed: bool) -> str:
    """Who a request counts for: its key where keys are asked for, or else its address, of IPv6 the network's."""
    if keyed:
        return given_key(Headers(scope=scope)).decode("latin-1")
    address = (scope.get("client") or ("",))[0]
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address).version == 6:
            return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def check_body(body: bytes) -> None:
    """Check how many texts and values a body of JSON has, before any object is made of them.

    Raises:
        ApiError: if there are too many.
    """
    quotes = separators = start = 0
    while start < len(body):
        # A part at a time, each as long as all before: too many are too many soon.
        end = min(len(body), max(2 * start, _SMALL))
        # Each text has two quotes that are its own, at least one of them with no backslash before it.
        quotes += body.count(b'"', start, end) - body.count(b'\\"', start, end + 1)
        separators += sum(body.count(mark, start, end) for mark in _SEPARATORS)
        if quotes > 2 * MOST_TEXTS:
            raise ApiError(413, f"The request has more than {MOST_TEXTS} texts in it. Send less in one request.")
        if separators > MOST_VALUES and _outside_texts(body[:end]) > MOST_VALUES:
            raise ApiError(413, f"The request has more than {MOST_VALUES} values in it. Send less in one request.")
        start = end


def _outside_texts(body: bytes) -> int:
    """How many separators are in no text."""
    outside = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    return sum(outside.count(mark) for mark in _SEPARATORS)

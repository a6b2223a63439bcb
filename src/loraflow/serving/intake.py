"""How requests come in: whole and counted before they are read, each client in its turn, and only while it is there."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraflow.serving.keys import ADMIN_PATHS, given_key
from loraflow.serving.metrics import Metrics
from loraflow.serving.protocol import ApiError
from loraflow.serving.reading import Reader
from loraflow.serving.service import Service
from loraflow.serving.turns import READING, Reading

# What one body may hold. No request that could be answered has so many texts, and a prompt is of fewer tokens.
MOST_TEXTS, MOST_VALUES = 2**14, 2**17

_SEPARATORS = (b",", b"[", b"{")

_PROBES = ("/health", "/ready")

# Bytes that are counted sooner than another thread is asked to.
_SMALL = 2**16


Take = Callable[[Reading, Scope, Receive, Send], Awaitable[None]]


class Entrance:
    """Takes requests in one by one: when their client has rested, and in its turn."""

    def __init__(self, reader: Reader, metrics: Metrics, refuse: Callable[[ApiError], ASGIApp]) -> None:
        self._reader = reader
        self._metrics = metrics
        self._refuse = refuse

    async def answer_shortly(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered that asks the engine for nothing, in the turn of its address."""

        async def take(reading: Reading, scope: Scope, receive: Receive, send: Send) -> None:
            await reading.begin()
            await app(scope, receive, send)

        client = client_of(scope, keyed=False)
        # Nobody's other requests may make a server look dead.
        client += scope["path"] if scope["path"] in _PROBES else ""
        await self.take_in(take, client, scope, receive, send, asks=False)

    async def take_in(
        self, take: Take, client: str, scope: Scope, receive: Receive, send: Send, *, asks: bool = True
    ) -> None:
        """Take a request in when its client has rested, and let it rest again if the engine has no answer for it."""
        pace, reading = self._reader.pace, Reading(self._reader.turns, client)
        answered = False

        async def told(message: Message) -> None:
            nonlocal answered
            answered = answered or (asks and not 400 <= message.get("status", 400) < 500)
            # Nobody waits for a client that does not take its answer.
            await reading.end()
            await send(message)

        with pace.there(client):
            try:
                await pace.rested(client)
            except ApiError as error:
                self._metrics.refused_at_rest.inc()
                await self._refuse(error)(scope, receive, send)
                return
            try:
                await take(reading, scope, receive, told)
            finally:
                await reading.end()
                if not answered:
                    pace.rest(client, reading.seconds)


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
        self._entrance = Entrance(service.reader, service.metrics, refuse)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one request in, and have it answered."""
        # What an admin loads takes its time, in nobody's turn.
        if scope["type"] != "http" or scope["path"] in ADMIN_PATHS:
            await self._app(scope, receive, send)
        elif scope["path"] in self._paths:
            client = client_of(scope, keyed=bool(self._service.config.api_keys))
            await self._entrance.take_in(self._take, client, scope, receive, send)
        else:
            await self._entrance.answer_shortly(self._app, scope, receive, send)

    async def _take(self, reading: Reading, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        if body is None:
            return
        gone = asyncio.ensure_future(receive())
        sent = False

        async def told(message: Message) -> None:
            nonlocal sent
            sent = sent or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        work = asyncio.ensure_future(self._answer(reading, scope, body, gone, told))
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

    async def _answer(
        self, reading: Reading, scope: Scope, body: bytes, gone: asyncio.Future[Message], send: Send
    ) -> None:
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
                    await self._service.reader.do_apart(check_body, body)
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


def client_of(scope: Mapping[str, Any], *, keyed: bool) -> str:
    """Who a request counts for: its key where keys are asked for, or else its address, of IPv6 the network's."""
    if keyed:
        return given_key(Headers(scope=dict(scope))).decode("latin-1")
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
    quotes = start = 0
    while start < len(body):
        # A part at a time, each as long as all before: too many are too many soon.
        end = min(len(body), max(2 * start, _SMALL))
        # Each text has two quotes that are its own, at least one of them with no backslash before it.
        quotes += body.count(b'"', start, end)
        if b"\\" in body:
            quotes -= body.count(b'\\"', start, end + 1)
        if quotes > 2 * MOST_TEXTS:
            raise ApiError(413, f"The request has more than {MOST_TEXTS} texts in it. Send less in one request.")
        if end > MOST_VALUES and _outside_texts(body[:end]) > MOST_VALUES:
            raise ApiError(413, f"The request has more than {MOST_VALUES} values in it. Send less in one request.")
        start = end


def _outside_texts(body: bytes) -> int:
    """How many separators are in no text."""
    # Most texts have none, and looking for one byte is a hundred times as fast.
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(body.split(b'"')[::2])
    return sum(outside.count(mark) for mark in _SEPARATORS)

"""Turns at what can be done for one request at a time, shared fairly among clients."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

Done = TypeVar("Done")


class Turns:
    """Lets one request at a time through, and first that of the client who has had the least time.

    Start-time fair queueing ([Goyal et al. 1996](https://doi.org/10.1145/248156.248171)): a client's next turn may
    start when its last one ended, on a clock that goes only as fast as the one whose turn it is. Who comes seldom waits
    for the turn that runs, whoever else queues; who sends much waits for itself. For one event loop.
    """

    def __init__(self, seconds: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = 0.0
        self._next_start: dict[str, float] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._busy = False

    @contextlib.asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """The client's turn, inside the block; one that is cancelled while it waits has left the queue."""
        await self._enter(client)
        started = self._seconds()
        try:
            yield
        finally:
            self._leave(client, self._seconds() - started)

    async def _enter(self, client: str) -> None:
        start = self._next_start[client] = max(self._clock, self._next_start.get(client, 0.0))
        if not self._busy:
            self._busy, self._clock = True, start
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._leave(client, 0.0)
            raise

    def _leave(self, client: str, seconds: float) -> None:
        self._next_start[client] = self._next_start.get(client, self._clock) + seconds
        while self._waiting:
            following = min(self._waiting, key=lambda one: self._next_start.get(one, 0.0))
            queue = self._waiting[following]
            waiter = queue.popleft()
            if not queue:
                del self._waiting[following]
            if not waiter.done():
                self._clock = max(self._clock, self._next_start.get(following, 0.0))
                waiter.set_result(None)
                return
        # Nobody waits: what was had before is forgotten.
        self._busy, self._clock = False, 0.0
        self._next_start.clear()


class Reading:
    """A request's turn at being read, which others may have between two pieces of it, and which ends once.

    Attributes:
        client: who sent it.
        seconds: how long it was read.
    """

    client: str
    seconds: float

    def __init__(self, turns: Turns, client: str) -> None:
        self.client = client
        self.seconds = 0.0
        self._turns = turns
        self._held = contextlib.AsyncExitStack()

    async def begin(self) -> None:
        """Wait for the turn."""
        await self._held.enter_async_context(self._turns.turn(self.client))
        started = time.monotonic()
        self._held.callback(lambda: setattr(self, "seconds", self.seconds + time.monotonic() - started))

    async def end(self) -> None:
        """Let others go on, where it is not ended yet."""
        await self._held.aclose()

    async def pause(self) -> None:
        """Let others who have had less go first."""
        await self.end()
        await self.begin()


READING: ContextVar[Reading | None] = ContextVar("loraflow_reading", default=None)
"""The turn of the request that is read in this context; None outside a server."""


def current_client() -> str:
    """Who sent the request that is read in this context; nobody outside a server."""
    reading = READING.get()
    return "" if reading is None else reading.client


async def let_others_go_first() -> None:
    """Give the turn of the request that is read in this context to others who have had less."""
    reading = READING.get()
    if reading is not None:
        await reading.pause()


async def end_reading() -> None:
    """End the turn of the request that is read in this context."""
    reading = READING.get()
    if reading is not None:
        await reading.end()


@contextlib.contextmanager
def counted_as_reading() -> Iterator[None]:
    """Count the seconds of the block as reading of the request in this context, though its turn at that has ended."""
    reading, started = READING.get(), time.monotonic()
    try:
        yield
    finally:
        if reading is not None:
            reading.seconds += time.monotonic() - started


async def work_in(threads: concurrent.futures.Executor | None, work: Callable[..., Done], *args: object) -> Done:
    """Do some work in a thread; who is cancelled goes when it is done, and keeps its turn as long as that.

    Args:
        threads: where; None for asyncio's own.
        work: what to do.
        args: its arguments.

    Raises:
        CancelledError: if it was cancelled.
    """
    doing = asyncio.get_running_loop().run_in_executor(threads, work, *args)
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait({doing})
        # Nobody asks any more what was wrong.
        _ = doing.cancelled() or doing.exception()
        raise

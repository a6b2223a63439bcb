"""How soon a client is read again, so that answers go on whatever comes in."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

from loraflow.serving.protocol import ApiError

# What is read for nothing may take a hundredth of the time for each client; nobody rests longer than that.
_RESTS, _LONGEST_S = 100, 10.0

# So many requests of one client may wait for the end of its rest.
_MOST_WAITING = 16


class Pace:
    """Lets a client rest whose request was read for nothing, as long as others are there.

    Python runs one thread at a time: while a request is read, the engine stands still. Who is answered pays for that
    with the engine's time; who is refused, goes, or asks for no answer does not, and could ask on and on.
    """

    def __init__(self, seconds: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._there: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        # Until when each rests, and how long it rested last.
        self._rests: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def there(self, client: str) -> Iterator[None]:
        """The client has a request here, inside the block."""
        self._there[client] += 1
        try:
            yield
        finally:
            self._there[client] -= 1
            self._there += Counter()

    async def rested(self, client: str) -> None:
        """Wait for the end of a client's rest; of several requests one goes on, and the others wait as long again.

        Raises:
            ApiError: if too many of its requests wait for that.
        """
        if self._waiting[client] >= _MOST_WAITING:
            raise ApiError(
                429,
                f"{_MOST_WAITING} requests of this client wait, for others of its were refused or given up. Ask for "
                "what can be answered, and try again later.",
                kind="rate_limit_error",
                code="too_many_refused",
                headers={"Retry-After": f"{_LONGEST_S:.0f}"},
            )
        self._waiting[client] += 1
        try:
            while (rest_s := self.rest_s(client)) > 0:
                await asyncio.sleep(rest_s)
                until, last_s = self._rests.get(client, (0.0, 0.0))
                if until <= self._seconds():
                    self._rests[client] = self._seconds() + last_s, last_s
                    return
        finally:
            self._waiting[client] -= 1
            self._waiting += Counter()

    def rest(self, client: str, seconds: float) -> None:
        """Let a client rest, of which so many seconds were read for nothing."""
        now, rest_s = self._seconds(), min(seconds * _RESTS, _LONGEST_S)
        self._rests = {one: found for one, found in self._rests.items() if found[0] > now}
        until, _ = self._rests.get(client, (now, 0.0))
        self._rests[client] = max(until, now + rest_s), rest_s

    def rest_s(self, client: str) -> float:
        """How long a client rests from now on; not at all where it is alone."""
        alone = len(self._there) == (client in self._there)
        return 0.0 if alone else max(self._rests.get(client, (0.0, 0.0))[0] - self._seconds(), 0.0)

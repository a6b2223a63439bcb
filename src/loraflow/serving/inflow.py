"""What comes in by the network, bounded for each address before anything is made of it."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Hashable

from uvicorn.protocols.http.flow_control import FlowControl

# Of one address, on all of its connections: text of millions of tokens a second, and two of the largest bodies at once.
_BYTES_PER_S, _AT_ONCE = 8 * 2**20, 4 * 2**20

# Whatever comes costs as much as that many bytes, be it one letter of a header.
_LEAST = 2**13

# Files that are no connections: those of the model, the log, the event loop.
_OTHER_FILES = 128


class Inflow:
    """Bytes and connections of each address.

    Attributes:
        most_connections: of all addresses together.
    """

    most_connections: int

    def __init__(self, most_connections: int | None = None, seconds: Callable[[], float] = time.monotonic) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most_connections = most_connections or max(files - _OTHER_FILES, _OTHER_FILES)
        self._seconds = seconds
        self._connections: Counter[Hashable] = Counter()
        self._came: dict[Hashable, tuple[float, float]] = {}

    def opened(self, address: Hashable) -> bool:
        """Whether there is room for another connection of an address, which is counted until it is `closed`.

        There is while no address has more than are still free for all others ([Choudhury and Hahne
        1998](https://doi.org/10.1109/90.664262)): one alone may have half of all, and any number of them leaves some.
        """
        self._connections[address] += 1
        return self._connections[address] <= self.most_connections - self._connections.total()

    def closed(self, address: Hashable) -> None:
        """A connection of an address is no more; what came on it counts as long as it would have."""
        self._connections[address] -= 1
        if not self._connections[address]:
            del self._connections[address]
            now = self._seconds()
            self._came = {one: found for one, found in self._came.items() if _left(*found, now) > 0}

    def wait_s(self, address: Hashable, size: int) -> float:
        """How long to take nothing more from an address that has sent so many bytes."""
        now = self._seconds()
        came = _left(*self._came.get(address, (0.0, now)), now) + max(size, _LEAST)
        self._came[address] = came, now
        return max(came - _AT_ONCE, 0.0) / _BYTES_PER_S


def _left(came: float, at: float, now: float) -> float:
    """How many of the bytes that had come at a time still count."""
    return max(came - (now - at) * _BYTES_PER_S, 0.0)


class RestingFlow(FlowControl):
    """uvicorn's flow control, which may also rest: nothing is read until both want it."""

    resting = False

    def resume_reading(self) -> None:
        """Read again, if it does not rest."""
        if self.resting:
            self.read_paused = False
        else:
            super().resume_reading()

    def rest(self) -> None:
        """Read nothing."""
        self.resting = True
        self._transport.pause_reading()

    def rested(self) -> None:
        """Read again, if nothing else is against it."""
        self.resting = False
        if not self.read_paused:
            self._transport.resume_reading()

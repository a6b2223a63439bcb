"""Calls of several threads take turns."""

from __future__ import annotations

import threading


class Turn:
    """Lets one thread at a time through: what a call keeps on its way, it keeps on the model.

    Like a lock, which could be neither copied nor pickled with the model.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()

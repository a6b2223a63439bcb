"""Requests that wait for a place in the engine: the next is that of the client who has the fewest there."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Collection

from loraflow.serving.jobs import Job


class Waiting:
    """Jobs by client; within a client's, and among clients who have as many in the engine, first come, first served.

    Clients put jobs in from any thread, and the engine's takes them out. So whoever asks for much waits for itself:
    somebody else's job is next when a place becomes free.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: OrderedDict[str, deque[Job]] = OrderedDict()

    def put(self, job: Job) -> None:
        """Let a job wait."""
        with self._lock:
            self._of.setdefault(job.client, deque()).append(job)

    def take(self, inside: Collection[Job]) -> Job | None:
        """The next job, given those that are in the engine; None where none waits."""
        counts = Counter(job.client for job in inside)
        with self._lock:
            if not self._of:
                return None
            client = min(self._of, key=counts.__getitem__)
            jobs = self._of.pop(client)
            job = jobs.popleft()
            if jobs:
                # Behind the others.
                self._of[client] = jobs
            return job

    def remove(self, job: Job) -> None:
        """Forget a job, if it waits."""
        with self._lock:
            jobs = self._of.get(job.client, deque())
            if job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self._of[job.client]

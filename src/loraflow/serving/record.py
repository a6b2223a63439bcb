"""One request over HTTP as it is told of outside: in its answer's header, in the log, in spans."""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

REQUEST_ID = "X-Request-Id"
_LONGEST_ID = 128


@dataclass
class Record:
    """What is known of a request.

    Attributes:
        id: its own, or one that was made for it.
        client: the address that it came from.
        model: which one it asked, once there is such a one.
        prompt_tokens: tokens that the engine took.
        generated_tokens: tokens that it answered.
        operation: OpenTelemetry's name of what it asks for; None where it is not traced.
        span: under which its stages are traced; None where nothing is.
    """

    id: str
    client: str
    model: str | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    operation: str | None = None
    span: Any = None


CURRENT: ContextVar[Record | None] = ContextVar("loraflow_request", default=None)
"""The request that is answered in this context; None outside a server."""


def request_id(given: str | None) -> str:
    """The id that a client gave its request, if it can stand in any log and header; else a new one."""
    if given and len(given) <= _LONGEST_ID and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex

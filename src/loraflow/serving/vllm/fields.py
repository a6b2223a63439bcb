"""The fields of loraflow's own server in requests to vLLM's, which would drop them without a word.

vLLM's server takes classes like these by `--middleware`. What it hands on of a request are its `vllm_xargs`.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, ClassVar

from loraflow.errors import LoraflowError, MethodError, did_you_mean
from loraflow.serving.vllm.request_weights import AVERAGE, KEY

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_FIELDS = (KEY, "fusion", "return_fusion_weights")
_XARGS = "vllm_xargs"
# A body is read here before the server sees it; pictures are larger than texts.
_MOST_BYTES = 32 * 2**20


class RequestFields:
    """ASGI middleware: `adapter_weights` and `fusion` become the weights that a request brings.

    Attributes:
        allowed: whether requests may bring weights.
    """

    allowed: ClassVar[bool] = True

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with status 400, or 413 where it is too large to be looked at."""
        if not _is_read(scope):
            await self.app(scope, receive, send)
            return
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > _MOST_BYTES:
                await _refuse(send, f"The request has more than {_MOST_BYTES} bytes. Send less in one request.", 413)
                return
            more = message.get("more_body", False)
        try:
            body = translate(b"".join(chunks), allowed=self.allowed)
        except LoraflowError as error:
            await _refuse(send, str(error))
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app({**scope, "headers": headers}, replay, send)


def _is_read(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request may have the fields: JSON, on any path, of somebody whom the server will answer."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    headers = {name.lower(): value for name, value in scope["headers"]}
    if not headers.get(b"content-type", b"application/json").lower().startswith(b"application/json"):
        return False
    # vLLM checks keys behind this: who has none is refused there, unread.
    key = os.environ.get("VLLM_API_KEY")
    given = headers.get(b"authorization", b"")
    return not key or hmac.compare_digest(given, b"Bearer " + key.encode())


class RefusedFields(RequestFields):
    """The same where requests bring no weights: they are told so."""

    allowed = False


def translate(body: bytes, *, allowed: bool) -> bytes:
    """A request's body as vLLM reads it; what is no object of JSON is left for vLLM to refuse.

    Args:
        body: as it came.
        allowed: whether requests may bring weights.

    Raises:
        MethodError: if it asks for what this server does not do.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(request, dict):
        return body
    asked = {name: request.pop(name) for name in _FIELDS if name in request}
    extra = request.get(_XARGS)
    extra = dict(extra) if isinstance(extra, dict) else {}
    if not asked and KEY not in extra:
        return body
    if asked.get("return_fusion_weights"):
        raise MethodError(
            f"`return_fusion_weights` (={asked['return_fusion_weights']!r}): vLLM's answers have no place for the "
            "weights of tokens. Leave it out, or ask `loraflow serve` with its own engine."
        )
    given = {name: value for name, value in asked.items() if value is not None and name != "return_fusion_weights"}
    named = [*given, *([f"{_XARGS}.{KEY}"] if KEY in extra else [])]
    if len(named) > 1:
        raise MethodError(f"The request weighs the adapters twice, by `{named[0]}` and `{named[1]}`. Give one of them.")
    if named and not allowed:
        raise MethodError(
            f"The request has `{named[0]}`, and this server takes no weights of requests. Start it with "
            "--request-weights, or leave the field out."
        )
    if given:
        weights = given[KEY] if KEY in given else _weights_of(given["fusion"])
        extra[KEY] = weights if isinstance(weights, str) else json.dumps(weights)
        request[_XARGS] = extra
    return json.dumps(request).encode()


def _weights_of(fusion: Any) -> Any:
    """The weights that a method which looks at nothing gives.

    Raises:
        MethodError: if the method looks at something, or is not named as it should be.
    """
    if not isinstance(fusion, dict) or not isinstance(fusion.get("method"), str):
        raise MethodError(f'`fusion` (={fusion!r}) must name a method, as in {{"method": "average"}}.')
    others = sorted(fusion.keys() - {"method", "options"})
    if others:
        raise MethodError(f"`fusion` has no field {others[0]!r}. Give what the method is to have in its `options`.")
    name, options = fusion["method"], fusion.get("options") or {}
    if not isinstance(options, dict):
        raise MethodError(f"`options` (={options!r}) of `fusion` must be an object. Give them by name.")
    known: dict[str, Any] = {"average": AVERAGE, "base": {}, "static": options.get("weights", {})}
    if name not in known:
        raise MethodError(
            f"vLLM does not compute the method {name!r} for single requests: it looks at the prompt, or has gates. "
            f"{did_you_mean(name, known)} Give `{KEY}`, which `FusedModel.weigh` computes, or ask `loraflow serve`."
        )
    unused = sorted(set(options) - ({"weights"} if name == "static" else set()))
    if unused:
        raise MethodError(f"The method {name!r} has no option {unused[0]!r}. Leave it out.")
    if name == "static" and "weights" not in options:
        raise MethodError("The method 'static' needs `weights` in its `options`. Give them by adapter name.")
    return known[name]


async def _refuse(send: Send, message: str, status: int = 400) -> None:
    """Answer as vLLM does where a request is wrong."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""Who may ask: the keys of requests, and the names under which they reach a server without keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request

from loraflow.serving.config import ServerConfig
from loraflow.serving.hosts import is_own_host, is_own_origin
from loraflow.serving.protocol import ApiError

ADMIN_PATHS = LOAD, UNLOAD = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

# The page has no secrets, and asks for the key that its requests need; load balancers have none.
_OPEN_PATHS = ("/", "/health", "/ready")


def check_caller(request: Request, config: ServerConfig) -> None:
    """Check that a request may be answered, by its headers alone.

    Raises:
        ApiError: if its key is missing or wrong, or a web page of somebody else has sent it.
    """
    # Not `request.url`, which older versions of Starlette build from the client's Host.
    path = request.scope["path"]
    if not config.api_keys or config.allowed_hosts:
        _check_host(request, config.allowed_hosts)
    if path in ADMIN_PATHS:
        _check_admin_key(given_key(request.headers), config.admin_keys)
    elif path not in _OPEN_PATHS and not (path == "/metrics" and config.public_metrics):
        _check_api_key(given_key(request.headers), config.api_keys)


def _check_host(request: Request, allowed: Sequence[str]) -> None:
    if "*" in allowed:
        return
    own = (request.scope.get("server") or (None, None))[0]
    hosts = request.headers.getlist("host")
    if not hosts or not all(is_own_host(host, own, allowed) for host in hosts):
        raise ApiError(
            403,
            f"The request is for the host {', '.join(hosts)!r}, which is not known to be this server. Start it with "
            "that name among its `allowed_hosts`, or with `api_keys`.",
            kind="permission_error",
        )
    for origin in request.headers.getlist("origin"):
        if not is_own_origin(origin, own, allowed):
            raise ApiError(
                403,
                f"The request comes from a page of {origin!r}, which is not this server's. Start it with that page's "
                "host among its `allowed_hosts`, or with `api_keys`.",
                kind="permission_error",
            )


def given_key(headers: Headers) -> bytes:
    """The key of `Authorization: Bearer KEY`; where there is no such header, an empty one, which no key is."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _check_api_key(given: bytes, keys: Sequence[str]) -> None:
    if keys and not _is_key(given, keys):
        message = "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`."
        raise ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=_CHALLENGE)


def _check_admin_key(given: bytes, keys: Sequence[str]) -> None:
    if not keys:
        message = "Nothing can be loaded or unloaded: the server was started without an admin key."
        raise ApiError(403, message, kind="permission_error")
    if not _is_key(given, keys):
        message = "Loading and unloading need the admin key. Send it as `Authorization: Bearer KEY`."
        raise ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=_CHALLENGE)


# What HTTP asks of a 401 (RFC 9110, 15.5.2).
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def _is_key(given: bytes, keys: Sequence[str]) -> bool:
    """Whether a key is one of those; how long it takes tells nothing of them, their lengths included."""
    digest = hashlib.sha256(given).digest()
    return sum(hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys) > 0

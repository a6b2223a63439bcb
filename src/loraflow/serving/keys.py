"""Who may ask: the keys of requests."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from loraflow.serving.protocol import ApiError
from loraflow.serving.service import Service


def check_api_key(given: bytes, service: Service) -> None:
    """Check the key of an ordinary request.

    Raises:
        ApiError: if the server asks for one, and it is another.
    """
    keys = service.config.api_keys
    if keys and not _is_key(given, keys):
        message = "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`."
        raise ApiError(401, message, kind="authentication_error", code="invalid_api_key")


def check_admin_key(given: bytes, service: Service) -> None:
    """Check the key of a request that changes what is offered.

    Raises:
        ApiError: if there is no such key, or it is another.
    """
    keys = service.config.admin_keys
    if not keys:
        message = "Nothing can be loaded or unloaded: the server was started without an admin key."
        raise ApiError(403, message, kind="permission_error")
    if not _is_key(given, keys):
        message = "Loading and unloading need the admin key. Send it as `Authorization: Bearer KEY`."
        raise ApiError(401, message, kind="authentication_error", code="invalid_api_key")


def _is_key(given: bytes, keys: Sequence[str]) -> bool:
    """Whether a key is one of those; how long it takes tells nothing of them."""
    return sum(hmac.compare_digest(given, key.encode()) for key in keys) > 0

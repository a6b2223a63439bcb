"""Under which names a server may be reached, so that no web page can make a browser ask it.

A page may let its own name resolve to a loopback address (DNS rebinding): the browser then takes the server for the
page's own, but sends the page's name as `Host`. A page may also send a request without asking first, as forms do; the
browser then names the page in `Origin`. Both are checked by the same names. A server that asks for keys needs neither:
no page has the key.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from loraflow.errors import LoraflowError

_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def check_hosts(names: Sequence[str]) -> None:
    """Check names of hosts: a name, an address, `*.example.com` for all below it, or `*` for any.

    Raises:
        LoraflowError: if one is none of these.
    """
    if isinstance(names, str):
        raise LoraflowError(f"`allowed_hosts` (={names!r}) is one text. Give a list of names, even of one.")
    for name in names:
        if name != "*" and not _is_address(name) and not _NAME.fullmatch(name.lower()):
            raise LoraflowError(
                f"`{name}` is no host of `allowed_hosts=...`. Give a name or an address without scheme and port, "
                "`*.example.com` for all names below one, or `*` for any."
            )


def is_own_host(given: str, own: str | None, allowed: Sequence[str]) -> bool:
    """Whether a `Host` is this server's: loopback, the address where the request arrived, or an allowed name.

    Args:
        given: host and perhaps port, as a request gives them.
        own: the address where it arrived.
        allowed: further names.
    """
    try:
        parts = urlsplit(f"//{given}")
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return False
    # A part of the URL that is no host would hide what follows.
    if not host or parts.netloc != given or "@" in given:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    if _is_address(host) and (_plain(host).is_loopback or _same(host, own)):
        return True
    return host == (own or "").lower() or any(_matches(host, pattern.lower()) for pattern in allowed)


def is_own_origin(given: str, own: str | None, allowed: Sequence[str]) -> bool:
    """Whether an `Origin` is a page of such a host, on any port."""
    scheme, separator, host = given.partition("://")
    return bool(separator) and scheme in ("http", "https") and is_own_host(host, own, allowed)


def _matches(host: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return pattern == "*" or host == pattern or (_is_address(pattern) and _same(host, pattern))


def _same(address: str, other: str | None) -> bool:
    return other is not None and _is_address(address) and _is_address(other) and _plain(address) == _plain(other)


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(address.strip("[]"))
    # A socket of both families names IPv4 addresses so.
    return getattr(found, "ipv4_mapped", None) or found


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True

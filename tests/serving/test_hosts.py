"""Which names are a server's own."""

from __future__ import annotations

import pytest

from loraflow.errors import LoraflowError
from loraflow.serving.config import ServerConfig
from loraflow.serving.hosts import is_own_host, is_own_origin

LOOPBACK = ["localhost", "LOCALHOST:8000", "a.localhost", "127.0.0.1", "127.1.2.3:1", "[::1]", "[::1]:8000"]
FOREIGN = [
    "",
    ":8000",
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example/localhost",
    "evil.example@localhost",
    "localhost@evil.example",
    "localhost/x",
    "localhost?x",
    "localhost#x",
    "localhost:x",
    "localhost:99999999",
    "[::1",
    "[evil]",
    "0.0.0.0",
    "10.0.0.8",
    "x",
]


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_always_its_own(host):
    assert is_own_host(host, "10.0.0.7", ())
    assert is_own_origin(f"http://{host}", "10.0.0.7", ())


@pytest.mark.parametrize("host", FOREIGN)
def test_others_are_not(host):
    assert not is_own_host(host, "10.0.0.7", ("good.example", "*.below.example"))
    assert not is_own_origin(f"https://{host}", "10.0.0.7", ("good.example", "*.below.example"))


def test_the_address_where_a_request_arrived_is_its_own():
    assert is_own_host("10.0.0.7:8000", "10.0.0.7", ())
    assert is_own_host("10.0.0.7", "::ffff:10.0.0.7", ())
    assert is_own_host("[fd00::0:1]:80", "fd00::1", ())
    assert not is_own_host("10.0.0.7", None, ())


def test_allowed_names():
    allowed = ("Good.example", "*.below.example", "10.0.0.9", "[fd00::2]")
    for host in ("good.example", "GOOD.example:80", "a.below.example", "a.b.below.example", "10.0.0.9", "[fd00::2]:80"):
        assert is_own_host(host, None, allowed)
    for host in ("a.good.example", "below.example", "xbelow.example", "10.0.0.8"):
        assert not is_own_host(host, None, allowed)
    assert is_own_host("anything.example", None, ("*",))


@pytest.mark.parametrize("origin", ["null", "", "file://", "chrome-extension://localhost", "localhost"])
def test_what_is_no_page_of_a_host(origin):
    assert not is_own_origin(origin, None, ())


@pytest.mark.parametrize("name", ["", "http://good.example", "x.example:80", "a*.example", "*.*.example", "a b"])
def test_hosts_are_checked(name):
    with pytest.raises(LoraflowError, match=r"is no host of `allowed_hosts=\.\.\.`\. Give a name or an address"):
        ServerConfig(allowed_hosts=(name,))


def test_hosts_are_a_list():
    with pytest.raises(LoraflowError, match=r"`allowed_hosts` \(='good\.example'\) is one text\. Give a list of names"):
        ServerConfig(allowed_hosts="good.example")

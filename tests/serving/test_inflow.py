"""What one address may send, and how many connections it may have."""

from __future__ import annotations

import contextlib
import json
import socket
from unittest import mock

import pytest

from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits, ServerConfig
from loraflow.serving.http import PatientProtocol
from loraflow.serving.inflow import Inflow, RestingFlow
from tests.serving.worlds import DEADLINE_S, serving, tiny_fusion, wait_for

LIMITS = EngineLimits(requests=8, batch_tokens=64, cache_tokens=1024, page_tokens=16)
MIB = 2**20


@pytest.fixture(scope="module")
def server():
    """The service, its address, and what is known of what comes in."""
    inflow = Inflow(6)
    with mock.patch("loraflow.serving.http.Inflow", return_value=inflow):
        stack = contextlib.ExitStack()
        service, address = stack.enter_context(
            serving(Catalog(tiny_fusion(), "tiny", "tiny"), ServerConfig(limits=LIMITS))
        )
    with stack:
        yield service, address, inflow


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def everything(connection):
    """What comes until the connection is closed or broken off."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


def refusal(answer):
    """Status and message of an answer of the protocol's own."""
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"Connection: close" in head
    return int(head.split()[1]), json.loads(content)["error"]["message"]


def test_an_address_rests_that_has_sent_much():
    clock = [0.0]
    inflow = Inflow(10, lambda: clock[0])
    assert inflow.wait_s("a", 4 * MIB) == 0
    assert inflow.wait_s("a", 2 * MIB) == pytest.approx(0.25)
    assert inflow.wait_s("b", 1) == 0
    clock[0] = 0.25
    # One letter counts for more than itself.
    assert inflow.wait_s("a", 1) == pytest.approx(1 / 1024)
    clock[0] = 60
    assert inflow.wait_s("a", 4 * MIB) == 0


def test_who_comes_again_has_sent_what_it_had():
    clock = [0.0]
    inflow = Inflow(10, lambda: clock[0])
    for address in ("a", "b"):
        assert inflow.opened(address)
    assert inflow.wait_s("a", 12 * MIB) == 1
    assert inflow.wait_s("b", 4 * MIB) == 0
    inflow.closed("a")
    assert inflow.opened("a")
    clock[0] = 0.5
    assert inflow.wait_s("a", 4 * MIB) == 1
    # What nobody has to wait for is forgotten.
    inflow.closed("b")
    assert list(inflow._came) == ["a"]
    clock[0] = 2.0
    inflow.closed("a")
    assert not inflow._came


def test_who_asks_for_a_websocket_is_counted_until_it_has_gone(server):
    _, address, inflow = server
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += b"Sec-WebSocket-Key: " + b"A" * 22 + b"==\r\n"
    for _ in range(8):
        with connect(address) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
        wait_for(lambda: not inflow._connections)


def test_no_address_has_more_connections_than_are_free():
    inflow = Inflow(12)
    assert [inflow.opened("a") for _ in range(7)] == [True] * 6 + [False]
    inflow.closed("a")
    assert [inflow.opened("b") for _ in range(4)] == [True] * 3 + [False]
    inflow.closed("b")
    assert inflow.opened("c")
    for client, count in (("a", 6), ("b", 3), ("c", 1)):
        for _ in range(count):
            inflow.closed(client)
    assert not inflow._connections
    assert Inflow().most_connections >= 128


def test_reading_goes_on_when_nothing_is_against_it():
    transport = mock.Mock()
    flow = RestingFlow(transport)
    flow.rest()
    flow.pause_reading()
    flow.resume_reading()
    assert not transport.resume_reading.called
    flow.rested()
    assert transport.resume_reading.call_count == 1
    flow.pause_reading()
    flow.rest()
    flow.rested()
    assert transport.resume_reading.call_count == 1
    flow.resume_reading()
    assert transport.resume_reading.call_count == 2


def test_too_many_connections_of_one_address_are_refused(server):
    _, address, inflow = server
    with contextlib.ExitStack() as stack:
        for count in range(1, 4):
            stack.enter_context(connect(address))
            wait_for(lambda count=count: inflow._connections.total() == count)
        with connect(address) as connection:
            status, message = refusal(everything(connection))
    assert status == 503
    assert message.startswith("This address has as many connections as the server has room for. Close some")
    wait_for(lambda: not inflow._connections)


def test_headers_are_bounded(server):
    _, address, _ = server
    start = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with connect(address) as connection:
        connection.sendall(start + b"a:\r\n" * 15_000 + b"\r\n")
        assert refusal(everything(connection)) == (431, "The request has more than 256 headers. Send fewer.")
    with connect(address) as connection:
        connection.sendall(start + b"a: " + b"x" * 60_000 + b"\r\n\r\n")
        assert b" 400 " in everything(connection)
    with connect(address) as connection:
        connection.sendall(start + b"a: " + b"x" * 9_000 + b"\r\nConnection: close\r\n\r\n")
        assert b" 200 OK" in everything(connection)


def test_who_asks_on_and_on_without_waiting_is_broken_off(server):
    service, address, _ = server
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(address) as connection:
        connection.sendall(request * 2 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert everything(connection).count(b" 200 OK") == 3
    with connect(address) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(request * 5_000)
        assert everything(connection).count(b" 200 OK") < 500
    assert not service.reader.turns._busy


def test_a_connection_rests_and_goes_on(server, monkeypatch):
    _, address, inflow = server
    rested, go_on = [], PatientProtocol._go_on
    monkeypatch.setattr(PatientProtocol, "_go_on", lambda self: (rested.append(1), go_on(self)))
    monkeypatch.setattr(inflow, "wait_s", lambda client, size: 0.05)
    body = json.dumps({"model": "tiny", "prompt": " " * MIB + "5", "max_tokens": 1}).encode()
    with connect(address) as connection:
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + b"\r\n\r\n" + body)
        assert b" 200 OK" in everything(connection)
    assert rested

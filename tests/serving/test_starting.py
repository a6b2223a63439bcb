"""What answers while a model loads, and how its socket is taken over."""

from __future__ import annotations

import contextlib
import socket

import pytest

from loraflow.serving.starting import not_ready

ASKED = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(listener):
    return socket.create_connection(listener.getsockname(), timeout=60)


@pytest.fixture
def listener():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def test_who_sends_half_or_nothing_holds_up_nobody(listener):
    with not_ready(listener), connect(listener) as silent, connect(listener) as half, connect(listener) as wordless:
        half.sendall(ASKED[:9])
        wordless.sendall(b"\r\n\r\n")
        assert b" 503 " in wordless.recv(1000)
        for _ in range(3):
            with connect(listener) as client:
                client.sendall(ASKED)
                assert client.recv(1000).startswith(b"HTTP/1.1 503 ")
        with connect(listener) as client:
            client.sendall(b"x" * 2**17)
            # Closed, with what it sent unread.
            with contextlib.suppress(ConnectionError):
                assert client.recv(1000) == b""
        open_still = (silent, half)
        for one in open_still:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(1)


@pytest.mark.parametrize("fails", [False, True])
def test_the_socket_is_left_to_who_comes_next(listener, fails):
    error = RuntimeError("no such model")
    ends = pytest.raises(RuntimeError) if fails else contextlib.nullcontext()
    with ends, not_ready(listener):
        if fails:
            raise error
    with connect(listener) as client:
        taken, _ = listener.accept()
        with taken:
            client.sendall(b"later")
            assert taken.recv(100) == b"later"

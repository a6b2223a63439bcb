"""What comes in is bounded before it is read, and nobody who comes slowly, much or not at all holds the others up."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import threading
from unittest import mock

import pytest
from uvicorn.server import ServerState

from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits, ServerConfig
from loraflow.serving.http import http_config
from loraflow.serving.intake import MOST_TEXTS, MOST_VALUES, Entrance, check_body, client_of
from loraflow.serving.protocol import ApiError
from loraflow.serving.reading import Reader
from tests.serving.worlds import DEADLINE_S, call, serving, tiny_fusion, wait_for
from tests.tiny import number_tokenizer

LIMITS = EngineLimits(requests=8, batch_tokens=64, cache_tokens=1024, page_tokens=16)
ASKED = {"model": "tiny", "prompt": [5, 6], "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def tiny():
    return Catalog(tiny_fusion(), "tiny", "tiny")


def post(address, body, **headers):
    return call("POST", f"{address}/v1/completions", body, **headers)


# ---- Counting ------------------------------------------------------------------------------------------------------

FULL = {
    "empty texts": '[{}""]'.format('"",' * 690_000),
    "texts that end in a backslash": '[{}""]'.format('"\\\\",' * 380_000),
    "numbers": "[{}1]".format("1," * 900_000),
    "lists": "[{}[]]".format("[]," * 690_000),
    "objects": "[{}{{}}]".format("{}," * 690_000),
}


@pytest.mark.parametrize("prompt", FULL.values(), ids=FULL)
def test_bodies_of_too_many_parts_are_refused_before_they_are_read(prompt):
    with pytest.raises(ApiError, match=rf"more than ({MOST_TEXTS} texts|{MOST_VALUES} values) in it\. Send less"):
        check_body(b'{"model": "tiny", "prompt": ' + prompt.encode() + b"}")


@pytest.mark.parametrize(
    "value",
    [
        "a, b, [c], {d}" * 100_000,
        '"' * 900_000,
        'say "a, b" \\ ' * 50_000,
        "\\" * 900_000,
        [["5"] * 100] * 100,
        list(range(MOST_VALUES - 10)),
    ],
    ids=["text", "quotes", "text with quotes", "backslashes", "texts", "numbers"],
)
def test_what_is_in_a_text_is_not_counted(value):
    check_body(json.dumps({"prompt": value}).encode())
    check_body(json.dumps({"prompt": value}, separators=(",", ":")).encode())


def test_a_client_is_its_key_or_else_its_address():
    def scope(address, key=b"Bearer x"):
        return {"type": "http", "client": (address, 5), "headers": [(b"authorization", key)]}

    assert client_of(scope("192.0.2.1"), keyed=True) == "x"
    # However the header is written, one key is one client.
    assert client_of(scope("192.0.2.1", b"bearer   x"), keyed=True) == "x"
    # Where no key is asked for, another one makes nobody another client.
    assert client_of(scope("192.0.2.1"), keyed=False) == client_of(scope("192.0.2.1", b"y"), keyed=False) == "192.0.2.1"
    assert client_of(scope("2001:db8::1"), keyed=False) == client_of(scope("2001:db8::2"), keyed=False)
    assert client_of(scope("2001:db8::1"), keyed=False) != client_of(scope("2001:db8:0:1::1"), keyed=False)
    assert client_of({"type": "http", "client": None, "headers": []}, keyed=False) == ""


def test_much_is_refused_before_anything_is_tokenised(tiny, monkeypatch):
    with serving(tiny, ServerConfig(limits=LIMITS)) as (service, address):
        read = []
        monkeypatch.setattr(service.reader, "do", lambda work, *args: read.append(work))
        body = b'{"model": "tiny", "prompt": ' + FULL["empty texts"].encode() + b"}"
        answer = post(address, body)
        assert answer.status == 413
        assert "texts in it. Send less" in answer.json()["error"]["message"]
        monkeypatch.undo()
        monkeypatch.setattr(service.reader, "ids", lambda text: read.append(text))
        for prompt, n in (["5"] * 257, 1), (["5"] * 129, 2):
            answer = post(address, {**ASKED, "prompt": prompt, "n": n})
            assert answer.status == 400
            assert f"{len(prompt)} prompts times n={n} are more than the server takes" in answer.text
        assert not read
        for change in ({"stop": "x" * 1001}, {"model": "x" * 1001}):
            assert "at most 1000 characters" in post(address, {**ASKED, **change}).json()["error"]["message"]
        assert post(address, {**ASKED, "stop": ["x" * 1001]}).status == 400


def test_a_text_that_is_far_too_long_is_refused_by_its_beginning(tiny, monkeypatch):
    with serving(tiny, ServerConfig(limits=LIMITS)) as (service, address):
        tokenizer, lengths = service.reader._tokenizer, []
        monkeypatch.setattr(service.reader, "_tokenizer", lambda text: (lengths.append(len(text)), tokenizer(text))[1])
        answer = post(address, {**ASKED, "prompt": "5 " * 500_000})
        assert answer.status == 400
        message = answer.json()["error"]["message"]
        assert message.startswith("The prompt has 1000000 characters, of which the first ")
        assert message.endswith(f"than prompt and answer together may have ({service.longest}). Shorten it.")
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert lengths == [16 * service.longest]
        # One that is long in characters alone is read whole.
        assert post(address, {**ASKED, "prompt": " " * 200_000 + "5"}).status == 200
        assert lengths[-1] == 200_001


# ---- Slow ones, and those that go ----------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(address, *parts):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        for part in parts:
            connection.sendall(part)
        yield connection


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
STARTS = {
    "nothing": [],
    "half a header": [HEAD],
    "half a body": [HEAD + b'Content-Length: 100\r\n\r\n{"model": '],
    "half a second request": [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", HEAD],
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_who_sends_no_whole_request_is_cut_off(tiny, start):
    config = ServerConfig(limits=LIMITS, receive_timeout_s=0.5)
    with serving(tiny, config) as (_, address), connected(address, *start) as connection:
        with contextlib.suppress(ConnectionError):
            while connection.recv(1000):
                pass
        assert post(address, ASKED).status == 200


@pytest.mark.parametrize("taken", [False, True])
def test_who_takes_no_answer_is_cut_off(taken):
    async def answers_later(scope, receive, send):
        await asyncio.Event().wait()

    async def run():
        config = http_config(answers_later, ServerConfig(receive_timeout_s=0.2), log_level="critical")
        config.load()
        protocol = config.http_protocol_class(config, ServerState(), {})
        transport = mock.Mock(**{"get_extra_info.return_value": None, "is_closing.return_value": False})
        protocol.connection_made(transport)
        protocol.data_received(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        protocol.pause_writing()
        if taken:
            protocol.resume_writing()
        await asyncio.sleep(0.5)
        assert transport.abort.called is not taken
        for task in protocol.tasks:
            task.cancel()

    asyncio.run(run())


def test_work_for_a_client_that_has_gone_is_dropped(tiny, monkeypatch):
    with serving(tiny, ServerConfig(limits=LIMITS)) as (service, address):
        reading, go_on, asked = threading.Event(), threading.Event(), []
        ids = service.reader._ids

        def slow(text):
            asked.append(text)
            reading.set()
            go_on.wait(DEADLINE_S)
            return ids(text)

        monkeypatch.setattr(service.reader, "_ids", slow)
        bodies = [json.dumps({**ASKED, "prompt": text}).encode() for text in ("5", "6", "7")]
        with contextlib.ExitStack() as clients:
            for body in bodies:
                head = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode()
                clients.enter_context(connected(address, head + body))
                assert reading.wait(DEADLINE_S)
            wait_for(lambda: sum(map(len, service.reader.turns._waiting.values())) == 2)
        wait_for(
            lambda: (
                not any(service.reader.turns._waiting.values())
                or all(waiter.cancelled() for queue in service.reader.turns._waiting.values() for waiter in queue)
            )
        )
        go_on.set()
        assert post(address, ASKED).status == 200
        assert asked == ["5"]
        assert service.engine.running == 0


# ---- What is read for nothing --------------------------------------------------------------------------------------


def test_only_what_gets_no_answer_of_the_engine_is_followed_by_a_rest(tiny, monkeypatch):
    with serving(tiny, ServerConfig(limits=LIMITS)) as (service, address):
        rests = []
        monkeypatch.setattr(service.reader.pace, "rest", lambda client, seconds: rests.append((client, seconds)))
        assert post(address, ASKED).status == 200
        assert post(address, {**ASKED, "stream": True}).status == 200
        assert not rests
        statuses = [
            post(address, {**ASKED, "model": "none"}).status,
            post(address, b"{").status,
            call("GET", f"{address}/v1/models").status,
            call("GET", f"{address}/none").status,
            call("GET", f"{address}/health", Host="elsewhere").status,
        ]
        assert statuses == [404, 400, 200, 404, 403]
        wait_for(lambda: len(rests) == 5)
        assert [client for client, _ in rests] == ["127.0.0.1"] * 4 + ["127.0.0.1/health"]
        assert all(seconds > 0 for _, seconds in rests)


def test_a_client_that_rests_is_not_even_received(tiny):
    with serving(tiny, ServerConfig(limits=LIMITS)) as (service, address):
        pace = service.reader.pace
        with pace.there("another"):
            pace.rest("127.0.0.1", 0.01)
            until = pace._rests["127.0.0.1"][0]
            assert post(address, {**ASKED, "prompt": [5] * 20_000}).status == 400
            assert pace._seconds() >= until
            pace._waiting["127.0.0.1"] = 16
            answer = post(address, ASKED)
            assert (answer.status, answer.json()["error"]["code"]) == (429, "too_many_refused")
        counted = 'vllm:admission_rejections_total{model_name="tiny",reason="too_many_refused"} 1.0'
        assert counted in service.metrics.text().decode()


SCOPE = {"type": "http", "path": "/none", "client": ("192.0.2.1", 1), "headers": []}


def test_nobody_waits_for_a_client_that_does_not_take_its_answer():
    async def run():
        reader, taken = Reader(number_tokenizer(), 64), asyncio.Event()

        async def send(message):
            await taken.wait()

        async def refusal(scope, receive, send):
            await send({"type": "http.response.start", "status": 404})

        entrance = Entrance(reader, mock.Mock(), lambda error: refusal)
        slow = asyncio.ensure_future(entrance.answer_shortly(refusal, SCOPE, None, send))
        await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S), reader.turns.turn("other"):
            assert not slow.done()
        taken.set()
        await slow
        reader.close()

    asyncio.run(run())


def test_work_that_was_given_up_ends_before_its_turn_and_says_nothing():
    async def run():
        reader, go_on, complaints = Reader(number_tokenizer(), 64), threading.Event(), []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))

        def fails():
            go_on.wait(DEADLINE_S)
            raise ApiError(413, "It is too much.")

        for do in (reader.do, reader.do_apart, reader.weigh):
            go_on.clear()
            work = asyncio.ensure_future(do(fails))
            await asyncio.sleep(0.01)
            work.cancel()
            await asyncio.sleep(0.01)
            assert not work.done()
            go_on.set()
            await asyncio.wait({work})
            assert work.cancelled()
        gc.collect()
        assert not complaints
        reader.close()

    asyncio.run(run())

"""The fields of loraflow's own server in requests to vLLM's: translated or refused; needs no vLLM."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from loraflow.errors import MethodError
from loraflow.serving.vllm import fields
from loraflow.serving.vllm.fields import RefusedFields, RequestFields, translate
from loraflow.serving.vllm.request_weights import KEY

MIX = {"zh": 0.5, "math": -1.0}


def translated(request: Any, allowed: bool = True) -> Any:
    return json.loads(translate(json.dumps(request).encode(), allowed=allowed))


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({KEY: MIX}, json.dumps(MIX)),
        ({KEY: [MIX, {}]}, json.dumps([MIX, {}])),
        ({"fusion": {"method": "average"}}, "average"),
        ({"fusion": {"method": "base"}}, "{}"),
        ({"fusion": {"method": "static", "options": {"weights": MIX}}}, json.dumps(MIX)),
        ({KEY: MIX, "fusion": None, "return_fusion_weights": False}, json.dumps(MIX)),
        ({"vllm_xargs": {KEY: "{}", "other": 1}}, "{}"),
    ],
)
def test_weights_are_handed_on(given, weights):
    found = translated({"prompt": "x", "model": "m", **given})
    assert found.pop("vllm_xargs") == {**given.get("vllm_xargs", {}), KEY: weights}
    assert found == {"prompt": "x", "model": "m"}


def test_other_arguments_stay():
    assert translated({KEY: MIX, "vllm_xargs": {"other": 1}})["vllm_xargs"] == {"other": 1, KEY: json.dumps(MIX)}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"prompt": 1}', b'{"vllm_xargs": [1]}', b"[" * 100_000])
def test_what_has_no_such_fields_is_left_as_it_is(body):
    assert translate(body, allowed=False) == body


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"return_fusion_weights": "all"}, r"`return_fusion_weights` \(='all'\): vLLM's answers have no place"),
        ({KEY: MIX, "fusion": {"method": "base"}}, r"twice, by `adapter_weights` and `fusion`. Give one of them"),
        ({KEY: MIX, "vllm_xargs": {KEY: "{}"}}, r"twice, by `adapter_weights` and `vllm_xargs.adapter_weights`"),
        (
            {"fusion": {"method": "qa-flora"}},
            r"does not compute the method 'qa-flora'.*Known: 'average', 'base', 'stat",
        ),
        ({"fusion": {"method": "averag"}}, r"Did you mean 'average'\?"),
        ({"fusion": "average"}, r"`fusion` \(='average'\) must name a method"),
        ({"fusion": {"method": "static", "options": [1]}}, r"`options` \(=\[1\]\) of `fusion` must be an object"),
        ({"fusion": {"method": "static", "weights": MIX}}, r"`fusion` has no field 'weights'. Give what the method"),
        ({"fusion": {"method": "static"}}, r"'static' needs `weights` in its `options`. Give them by adapter name"),
        ({"fusion": {"method": "average", "options": {"top_k": 1}}}, r"'average' has no option 'top_k'. Leave it out"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(MethodError, match=message):
        translated(given)


@pytest.mark.parametrize("given", [{KEY: MIX}, {"fusion": {"method": "base"}}, {"vllm_xargs": {KEY: "{}"}}])
def test_a_server_without_weights_of_requests_says_so(given):
    with pytest.raises(MethodError, match=r"takes no weights of requests. Start it with --request-weights"):
        translated(given, allowed=False)
    assert translated({name: None for name in given if name != "vllm_xargs"}, allowed=False) == {}


def asked(kind: type[RequestFields], body: bytes, **scope: Any) -> tuple[list[dict], list[bytes]]:
    """What a client is sent, and what bodies the server behind read; the body comes in two pieces."""
    sent: list[dict] = []
    read: list[bytes] = []
    pieces = [{"type": "http.request", "body": body[:3], "more_body": True}, {"type": "http.request", "body": body[3:]}]

    async def receive() -> dict[str, Any]:
        return pieces.pop(0) if pieces else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message, whole = await receive(), b""
        while message["type"] == "http.request":
            whole += message["body"]
            message = await receive()
        read.append(whole)
        await send({"length": dict(scope["headers"]).get(b"content-length")})

    full = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"Content-Length", b"1")],
        **scope,
    }
    asyncio.run(kind(app)(full, receive, send))
    return sent, read


@pytest.mark.parametrize("scope", [{}, {"path": "/under/v1/chat/completions", "root_path": "/under"}])
def test_the_server_reads_the_translated_body(scope):
    sent, (read,) = asked(RequestFields, json.dumps({KEY: MIX}).encode(), **scope)
    assert json.loads(read) == {"vllm_xargs": {KEY: json.dumps(MIX)}}
    assert sent == [{"length": str(len(read)).encode()}]


@pytest.mark.parametrize("path", ["/invocations", "/v1/chat/completions/batch", "/tokenize"])
def test_no_path_drops_the_fields(path):
    sent, read = asked(RefusedFields, json.dumps({KEY: MIX}).encode(), path=path)
    assert (sent[0]["status"], read) == (400, [])


def test_who_has_no_key_is_left_to_the_server_unread(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    body = json.dumps({"fusion": {"method": "qa-flora"}}).encode()
    for key in (b"Bearer other", b"secret", b""):
        assert asked(RequestFields, body, headers=[(b"authorization", key)])[1] == [body]
    sent, read = asked(RequestFields, body, headers=[(b"Authorization", b"Bearer secret")])
    assert (sent[0]["status"], read) == (400, [])


def test_what_is_too_large_to_be_looked_at_is_refused(monkeypatch):
    monkeypatch.setattr(fields, "_MOST_BYTES", 10)
    sent, read = asked(RequestFields, b'{"prompt": "x"}')
    assert (sent[0]["status"], read) == (413, [])
    assert "more than 10 bytes. Send less" in json.loads(sent[1]["body"])["error"]["message"]
    assert asked(RequestFields, b'{"a": 12}')[1] == [b'{"a": 12}']


@pytest.mark.parametrize(
    "scope", [{"method": "GET"}, {"headers": [(b"content-type", b"multipart/form-data; boundary=x")]}]
)
def test_other_requests_go_through(scope):
    body = json.dumps({KEY: MIX}).encode()
    assert asked(RefusedFields, body, **scope)[1] == [body]


def test_a_refusal_has_the_form_of_vllms():
    (start, answer), read = asked(RefusedFields, json.dumps({KEY: MIX}).encode())
    assert read == []
    assert start["status"] == 400
    error = json.loads(answer["body"])["error"]
    assert error["code"] == 400
    assert "Start it with --request-weights" in error["message"]

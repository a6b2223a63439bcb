"""Who gets in: keys, and the names under which a server without keys is reached."""

from __future__ import annotations

import contextlib
import http.client

import openai
import pytest

from loraflow.serving.catalog import Catalog
from loraflow.serving.config import ServerConfig
from tests.serving.worlds import DEADLINE_S, call, serving, tiny_fusion

PLAIN = {"model": "tiny", "prompt": [5, 6], "temperature": 0, "max_tokens": 2}


@pytest.fixture(scope="module")
def tiny():
    return Catalog(tiny_fusion(), "tiny", "tiny")


@pytest.fixture(scope="module")
def keyed(tiny, tmp_path_factory):
    config = ServerConfig(
        api_keys=("one", "two words"), admin_keys=("boss",), load_from=(tmp_path_factory.mktemp("allowed"),)
    )
    with serving(tiny, config) as (_, address):
        yield address


@pytest.fixture(scope="module")
def keyless(tiny):
    with serving(tiny) as (_, address):
        yield address


@pytest.mark.parametrize("value", ["Bearer one", "bearer one", "BEARER  one", "Bearer two words"])
def test_keys_let_in(keyed, value):
    assert call("GET", f"{keyed}/v1/models", Authorization=value).status == 200


@pytest.mark.parametrize(
    "value",
    [
        "",
        "one",
        "Bearer",
        "Bearer ",
        "Bearer two",
        "Bearer words",
        "Bearer boss",
        "Basic one",
        "Bearerone",
        "Bearer On\xe9",
    ],
)
def test_anything_else_does_not(keyed, value):
    answer = call("GET", f"{keyed}/v1/models", Authorization=value)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["message"].startswith("The API key is missing or wrong. Send it as `Authorization:")
    assert call("POST", f"{keyed}/v1/load_lora_adapter", {}, Authorization=value).status == (
        400 if value == "Bearer boss" else 401
    )


def test_only_the_page_and_the_health_need_no_key(keyed):
    for path in ("/", "/health", "/ready"):
        assert call("GET", keyed + path).status == 200
    for path in ("/metrics", "/openapi.json", "/v1/models", "/nothing", "//metrics", "/metrics/"):
        assert call("GET", keyed + path).status == 401, path
    for path in ("/metrics", "/openapi.json"):
        assert call("GET", keyed + path, Authorization="Bearer one").status == 200


def test_metrics_may_be_for_everybody(tiny):
    with serving(tiny, ServerConfig(api_keys=("one",), public_metrics=True)) as (_, address):
        assert call("GET", f"{address}/metrics").status == 200
        for path in ("openapi.json", "v1/models"):
            assert call("GET", f"{address}/{path}").status == 401


def test_openais_client_brings_a_key(keyed):
    for key, right in (("one", True), ("two", False)):
        with openai.OpenAI(base_url=f"{keyed}/v1", api_key=key, max_retries=0, timeout=DEADLINE_S) as client:
            expected = contextlib.nullcontext() if right else pytest.raises(openai.AuthenticationError)
            with expected:
                client.completions.create(**PLAIN)


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/completions"])
def test_a_page_of_another_name_does_not_reach_a_server_without_keys(keyless, path):
    method, body = ("POST", PLAIN) if path == "/v1/completions" else ("GET", None)
    for host in ("evil.example", "evil.example:8000", "x/health?", "localhost@evil.example"):
        answer = call(method, keyless + path, body, Host=host)
        assert answer.status == 403
        message = f"The request is for the host {host!r}, which is not known to be this server. Start it with that"
        assert answer.json()["error"]["message"].startswith(message)
    for host in ("localhost", "127.0.0.1:1", "[::1]"):
        assert call(method, keyless + path, body, Host=host).status == 200


def test_a_page_elsewhere_cannot_make_a_browser_ask(keyless):
    for origin in ("https://evil.example", "null", "http://localhost.evil.example:80"):
        answer = call("POST", f"{keyless}/v1/completions", PLAIN, Origin=origin)
        assert answer.status == 403
        message = f"The request comes from a page of {origin!r}, which is not this server's. Start it with"
        assert answer.json()["error"]["message"].startswith(message)
    for origin in (keyless, "http://localhost:3000"):
        assert call("POST", f"{keyless}/v1/completions", PLAIN, Origin=origin).status == 200


def test_every_host_of_a_request_is_looked_at(keyless):
    for hosts, status in (([], (400, 403)), (["localhost", "evil.example"], (400, 403)), (["localhost"], (200,))):
        connection = http.client.HTTPConnection(keyless.removeprefix("http://"), timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.putrequest("GET", "/v1/models", skip_host=True)
            for host in hosts:
                connection.putheader("Host", host)
            connection.endheaders()
            assert connection.getresponse().status in status


def test_names_are_allowed_by_who_starts_the_server(tiny):
    with serving(tiny, ServerConfig(allowed_hosts=("good.example",))) as (_, address):
        assert call("GET", f"{address}/v1/models", Host="good.example:80").status == 200
        assert call("GET", f"{address}/v1/models", Host="evil.example").status == 403
    with serving(tiny, ServerConfig(allowed_hosts=("*",))) as (_, address):
        assert call("POST", f"{address}/v1/completions", PLAIN, Host="any.example", Origin="null").status == 200


def test_with_keys_names_are_checked_where_some_are_given(tiny):
    key = {"Authorization": "Bearer one"}
    with serving(tiny, ServerConfig(api_keys=("one",))) as (_, address):
        assert call("GET", f"{address}/v1/models", Host="behind.a.proxy", **key).status == 200
    with serving(tiny, ServerConfig(api_keys=("one",), allowed_hosts=("good.example",))) as (_, address):
        assert call("GET", f"{address}/v1/models", Host="behind.a.proxy", **key).status == 403
        assert call("GET", f"{address}/v1/models", Host="good.example", **key).status == 200

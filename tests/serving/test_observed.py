"""Requests from outside: ids, what is counted of them over HTTP, and the log of a server that writes JSON."""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
from urllib.parse import urlsplit

import pytest

from loraflow.errors import LoraflowError
from loraflow.serving.app import make_app
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import ServerConfig
from loraflow.serving.logs import JsonFormatter
from loraflow.serving.record import CURRENT, Record, request_id
from loraflow.serving.service import Service
from tests.serving.test_server import server as process
from tests.serving.worlds import call, serving, tiny_fusion, wait_for

ASKED = {"model": "tiny", "prompt": [5, 6], "max_tokens": 3}


@pytest.fixture(scope="module")
def served():
    """A server, with a key."""
    with serving(Catalog(tiny_fusion(), "tiny", "tiny"), ServerConfig(api_keys=("one",))) as running:
        yield running


def ask(address, body=ASKED, **headers):
    return call("POST", f"{address}/v1/completions", body, **{"Authorization": "Bearer one"} | headers)


def lines(caplog, count):
    """The lines of that many requests; each is written when its answer has been sent."""

    def found():
        return [record.facts for record in caplog.records if record.name == "loraflow.serving.requests"]

    wait_for(lambda: len(found()) >= count)
    return found()


@pytest.mark.parametrize("given", [None, "", "x" * 129, "é", "a\tb"])
def test_ids_that_cannot_stand_anywhere_are_made_anew(given):
    made = request_id(given)
    assert made != given
    assert made != request_id(given)
    assert made.isalnum()


def test_an_id_is_in_every_answer(served, caplog, monkeypatch):
    caplog.set_level("INFO", logger="loraflow.serving")
    service, address = served
    mine = {"X-Request-Id": "req 7/ab"}
    answers = {
        200: ask(address, **mine),
        400: ask(address, ASKED | {"top_p": 7}, **mine),
        401: ask(address, Authorization="Bearer two", **mine),
        404: call("GET", f"{address}/v1/nothing", Authorization="Bearer one", **mine),
        413: ask(address, b"{" + b" " * 3 * 2**20 + b"}", **mine),
    }
    with monkeypatch.context() as patch:
        patch.setattr(service, "find", None)
        answers[500] = ask(address, **mine)
    for status, answer in answers.items():
        assert (answer.status, answer.headers.get_all("X-Request-Id")) == (status, ["req 7/ab"])
    told = lines(caplog, len(answers))
    assert sorted(line["status"] for line in told) == list(answers)
    assert {line["request_id"] for line in told} == {"req 7/ab"}
    stream = ask(address, ASKED | {"stream": True})
    assert lines(caplog, len(answers) + 1)[-1]["request_id"] == stream.headers["X-Request-Id"]


def test_a_line_tells_of_a_request(served, caplog):
    caplog.set_level("INFO", logger="loraflow.serving")
    _, address = served
    ask(address, ASKED | {"prompt": [[5, 6], [7]], "ignore_eos": False}, **{"X-Request-Id": "a"})
    (line,) = lines(caplog, 1)
    assert line["seconds"] > 0
    assert 2 <= line["generated_tokens"] <= 6
    del line["seconds"], line["generated_tokens"]
    known = {"request_id": "a", "client": "127.0.0.1", "method": "POST", "path": "/v1/completions", "status": 200}
    assert line == known | {"model": "tiny", "prompt_tokens": 3}
    of_prompts = [json.loads(record.message) for record in caplog.records if record.name == "loraflow.serving"]
    assert [one["request_id"] for one in of_prompts] == ["a", "a"]


def test_requests_are_counted_by_what_the_server_offers(served):
    service, address = served

    def counted():
        text = service.metrics.text().decode()
        return {line for line in text.splitlines() if line.startswith("http_requests_total")}

    call("GET", f"{address}/v1/models", Authorization="Bearer one")
    before = len(counted())
    for number in range(20):
        assert call("GET", f"{address}/v1/models/none-{number}", Authorization="Bearer one").status == 404
        assert call(f"METHOD{number}", f"{address}/nothing-{number}?key={number}").status == 401
        assert call("GET", f"{address}/health").status == 200
    wait_for(lambda: any('method="other",status="4xx"} 20.0' in line for line in counted()))
    after = counted()
    assert len(after) <= before + 2
    assert 'http_requests_total{handler="/v1/models",method="GET",status="2xx"} 1.0' in after
    assert 'http_requests_total{handler="none",method="other",status="4xx"} 20.0' in after
    assert not any("health" in line for line in after)


def test_an_app_that_has_not_begun_is_not_ready():
    service = Service(Catalog(tiny_fusion(), "tiny", "tiny"))
    assert service.unready == "loading"
    assert {"/health", "/ready"} <= make_app(service).openapi()["paths"].keys()
    service.start()
    assert service.unready is None
    service.engine.close()


# ---- JSON ----------------------------------------------------------------------------------------------------------


def written(record):
    """What a line says; it is one."""
    text = JsonFormatter().format(record)
    assert len(text.splitlines()) == 1
    assert text.isascii()
    return json.loads(text)


def test_a_line_of_json_has_all_that_is_known():
    before = CURRENT.set(Record("seven", "nobody"))
    try:
        try:
            raise ValueError("out of\nink")
        except ValueError:
            found = written(
                logging.LogRecord("a.b", logging.ERROR, "", 0, "one \u2028 %s\n\udc80", ("two",), sys.exc_info())
            )
    finally:
        CURRENT.reset(before)
    assert (found["level"], found["logger"], found["request_id"]) == ("error", "a.b", "seven")
    assert found["message"] == "one \u2028 two\n\udc80"
    assert found["exception"].endswith("ValueError: out of\nink")
    assert found["time"].endswith("+00:00")
    facts = logging.makeLogRecord({"name": "c", "msg": "text", "levelname": "INFO", "facts": {"model": "数学"}})
    assert written(facts) | {"time": ""} == {"time": "", "level": "info", "logger": "c", "model": "数学"}


def test_an_unknown_format_is_refused():
    with pytest.raises(LoraflowError, match=r"`log_format` \(='xml'\) must be one of 'text', 'json'\."):
        ServerConfig(log_format="xml")


def test_a_server_may_write_nothing_but_json():
    with process(0, "--log-format", "json", "--api-key", "secret key", "--log-prompts") as running:
        address = running.ready()
        body = {"model": "math", "prompt": "2 + 3", "max_tokens": 2}
        key = {"Authorization": "Bearer secret key", "X-Request-Id": "mine"}
        assert call("POST", f"{address}/v1/completions", body, **key).status == 200
        assert call("GET", f"{address}/v1/%0A%7B", Authorization="Bearer other secret").status == 401
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), timeout=60) as client:
            client.sendall(b"no HTTP\r\n\r\n")
            assert b"400" in client.recv(1000)
        assert running.end(signal.SIGTERM) == 0
    found = [json.loads(line) for line in running.lines]
    assert all(one.keys() >= {"time", "level", "logger"} for one in found)
    requests = [one for one in found if one["logger"] == "loraflow.serving.requests"]
    assert [(one["request_id"] == "mine", one["status"]) for one in requests] == [(True, 200), (False, 401)]
    assert (requests[0]["model"], requests[0]["generated_tokens"]) == ("math", 2)
    assert requests[1]["path"] == "/v1/\n{"
    (answered,) = [one for one in found if "outcome" in one]
    assert (answered["prompt"].endswith("2 + 3"), answered["request_id"]) == (True, "mine")
    assert [one["message"] for one in found if one["logger"] == "uvicorn.error"] == ["Invalid HTTP request received."]
    assert any(one.get("message", "").startswith("ready at http://") for one in found)
    assert "secret" not in running.output

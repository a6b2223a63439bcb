"""Whatever a client sends, the answer is an error that says why, and the next request is answered."""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from loraflow.serving.app import make_app
from loraflow.serving.config import EngineLimits
from loraflow.serving.service import ServerConfig, Service
from tests.serving.worlds import DEADLINE_S, call, serving, wait_for

# Short answers: most of what is generated is refused, and the rest should be quick.
CONFIG = ServerConfig(
    limits=EngineLimits(requests=16, batch_tokens=64, cache_tokens=2048, page_tokens=16),
    max_new_tokens=4,
    max_waiting=64,
)
GOOD = {"model": "layers", "prompt": "1 + 1 =", "temperature": 0, "max_tokens": 2}
CHAT = {"model": "layers", "messages": [{"role": "user", "content": "a"}], "temperature": 0, "max_tokens": 2}


@pytest.fixture(scope="module")
def server(catalog):
    with serving(catalog, CONFIG) as running:
        yield running


@pytest.fixture(scope="module")
def api(server):
    document = make_app(server[0]).openapi()
    # What is valid only by luck would hardly ever reach the engine.
    names = list(server[0].catalog.served)
    for request in ("ChatRequest", "CompletionRequest"):
        properties = document["components"]["schemas"][request]["properties"]
        properties["model"]["enum"] = names
        properties["adapter_weights"] = {"type": "object", "additionalProperties": {"type": "number"}}
        properties["adapter_weights"]["propertyNames"] = {"enum": ["zh-chat", "math"]}
    return schemathesis.openapi.from_dict(document)


def test_no_operation_fails(api, server):
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) >= 6
    for operation in operations:
        assert statuses_of(operation, server[1])


def statuses_of(operation, address):
    """The statuses of generated requests, none of them the server's fault."""
    statuses = []

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def send(case):
        answer = case.call(base_url=address, timeout=DEADLINE_S)
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]
        statuses.append(answer.status_code)

    send()
    return statuses


# Each as it lies on the wire: most of it is no valid JSON.
RAW = {
    "nothing": b"",
    "no JSON": b'{"model": "layers", "prompt": ',
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e400",
    "NaN": b"NaN",
    "a long number": b"9" * 5000,
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 50_000,
    "a deep prompt": b'{"model": "layers", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
}
FIELDS = {
    "model": [None, 1, [], {}, "", "x" * 10_000, "\ud800", "\x00", "../base"],
    "prompt": [
        None,
        1,
        True,
        {},
        [None],
        [""],
        [[]],
        ["a", 1],
        [1, "a"],
        [1.5],
        [2**70],
        [-(2**70)],
        "\ud800",
        "x" * 9000,
    ],
    "temperature": ["hot", -1, 3, float("nan"), float("inf"), 10**400, []],
    "top_p": [0, -1, 1.1, float("nan"), "all"],
    "max_tokens": [0, -1, 5, 2**70, 1.5, "many", [], float("inf")],
    "n": [0, -1, 17, 10**30, 1.5],
    "seed": [2**63, -(2**63) - 1, 1.5, "x", [], 10**4000],
    "stop": ["", ["a"] * 17, [""], 1, {}, [None], "\ud800"],
    "logprobs": [-1, 6, "yes", [], 1.5],
    "stream": ["maybe", 3, []],
    "stream_options": [1, {"include_usage": "x y"}, {"other": 1}],
    "adapter_weights": [
        1,
        [],
        "math",
        {"math": "much"},
        {"math": None},
        {"math": float("nan")},
        {"math": float("-inf")},
        {"math": 10**400},
        {"math": [1]},
        {"no such": 1},
        {"\ud800": 1},
        {"code": 1},
        {"math": 1e300},
    ],
    "fusion": [
        1,
        "arrow",
        {},
        {"method": None},
        {"method": ""},
        {"method": "no such"},
        {"method": "\ud800"},
        {"method": "lora-flow"},
        {"method": "base", "options": {"a": 1}},
        {"method": "arrow", "options": []},
        {"method": "arrow", "options": {"top_k": "two"}},
        {"method": "arrow", "options": {"top_k": 2**70}},
        {"method": "arrow", "options": {"top_k": 1.5}},
        {"method": "arrow", "options": {"top_k": True}},
        {"method": "arrow", "options": {"top_k": None, "temperature": None}},
        {"method": "arrow", "options": {"temperature": float("nan")}},
        {"method": "arrow", "options": {"temperature": "warm"}},
        {"method": "arrow", "options": {"temperature": [1]}},
        {"method": "arrow", "options": {"temperature": 10**400}},
        {"method": "arrow", "options": {"\ud800": 1}},
        {"method": "static", "options": {}},
        {"method": "static", "options": {"weights": 5}},
        {"method": "static", "options": {"weights": None}},
        {"method": "static", "options": {"weights": "math"}},
        {"method": "static", "options": {"weights": [1, 2]}},
        {"method": "static", "options": {"weights": [{"math": 1}]}},
        {"method": "static", "options": {"weights": {"math": "much"}}},
        {"method": "static", "options": {"weights": {"math": [1]}}},
        {"method": "static", "options": {"weights": {"math": 1e300}}},
        {"method": "static", "options": {"weights": {"math": 10**400}}},
        {"method": "qa-flora", "options": {"measure": 1}},
        {"method": "qa-flora", "options": {"tokens": []}},
        {"method": "logo", "options": {"metric": {}}},
        {"method": "centroid"},
        {"method": "arrow", "options": {"a": {"b": {"c": [[[[[{}]]]]]}}}},
    ],
    "return_fusion_weights": ["some", 2, [], {}],
    "presence_penalty": [0.5, "x"],
    "\ud800": [1],
    "__proto__": [{}],
}


@pytest.fixture
def unharmed(server):
    """Whatever was sent: the next request is answered as before, and nothing is left behind."""
    service, address = server
    before = call("POST", f"{address}/v1/completions", GOOD).json()["choices"]
    yield address
    assert call("POST", f"{address}/v1/completions", GOOD).json()["choices"] == before
    assert service.engine.failure is None
    wait_for(lambda: service.engine.running == 0)


def refused(answer):
    """An error of OpenAI's form."""
    assert 400 <= answer.status < 500, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_what_is_no_request(unharmed, path, raw):
    refused(call("POST", f"{unharmed}/v1/{path}", raw))


@pytest.mark.parametrize("field", FIELDS, ids=ascii)
def test_wrong_fields(unharmed, field):
    for value in FIELDS[field]:
        if value in (True, [True]) and field == "prompt":
            continue
        answer = call("POST", f"{unharmed}/v1/completions", GOOD | {field: value})
        refused(answer)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        1,
        "hello",
        [],
        [None],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1"}}]}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "a", "extra": 1}],
        [{"role": "tool", "content": "a"}],
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "word " * 600}],
    ],
    ids=lambda messages: ascii(messages)[:40],
)
def test_wrong_messages(unharmed, messages):
    refused(call("POST", f"{unharmed}/v1/chat/completions", CHAT | {"messages": messages}))


def test_empty_content_is_still_a_turn(unharmed):
    for content in ("", []):
        messages = [{"role": "user", "content": content}]
        assert call("POST", f"{unharmed}/v1/chat/completions", CHAT | {"messages": messages}).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_weights_at_the_edge_of_numbers(unharmed, stream):
    body = GOOD | {"stream": stream, "logprobs": 2, "return_fusion_weights": "all"}
    for weight in (1e10, -1e20, 1e38, 3e38, 1e300, 5e-324):
        answer = call(
            "POST", f"{unharmed}/v1/completions", body | {"adapter_weights": {"math": weight, "zh-chat": -weight}}
        )
        assert answer.status in (200, 400), answer.text
        if stream:
            for event in answer.text.strip().split("\n\n")[:-1]:
                json.loads(event.removeprefix("data: "), parse_constant=pytest.fail)
        else:
            answer.json()


def test_an_app_of_its_own_service_has_a_document(catalog):
    paths = make_app(Service(catalog, CONFIG)).openapi()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/ready", "/metrics"} <= paths.keys()

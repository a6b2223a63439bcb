"""The server as its users meet it: OpenAI's own client against a real server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import random
import re
import socket
import threading
import time

import openai
import pytest
import torch

from loraflow import FusedModel
from loraflow.demo.tasks import load_task
from loraflow.demo.world import adapter_paths, base_path
from loraflow.endings import Endings
from loraflow.errors import LoraflowError
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from loraflow.serving.service import ServerConfig, Service
from tests.serving.worlds import DEADLINE_S, alone, call, serving, tiny_fusion, wait_for

CONFIG = ServerConfig(
    limits=EngineLimits(requests=32, batch_tokens=128, cache_tokens=8192, page_tokens=16), max_new_tokens=400
)
GREEDY = {"temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def server(catalog):
    with serving(catalog, CONFIG) as running:
        yield running


@pytest.fixture(scope="module")
def service(server):
    return server[0]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S) as client:
        yield client


@pytest.fixture(scope="module")
def question():
    return load_task("zh-math").test[0].prompt


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def union():
    """All adapters of the small world in one model, which answers as any served one does, given its weights."""
    return FusedModel.from_adapters(base_path(), adapter_paths(), "base")


def text_of(model, ids, method=None, new=16):
    found = alone(model, ids, method, new)
    return model.tokenizer.decode(found, skip_special_tokens=True), found


# ---- Answers -------------------------------------------------------------------------------------------------------


def test_models_are_listed(client, catalog):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == list(catalog.served)
    assert [listed[name].parent for name in ("small", "math", "layers")] == [None, "small", "small"]
    assert listed["math"].root == str(adapter_paths()["math"])
    layers = client.models.retrieve("layers")
    assert layers == listed["layers"]
    assert (layers.adapters, layers.method, layers.kind) == (["zh-chat", "math"], "lora-flow", "fusion")
    assert layers.digest == catalog.find("layers").digest
    assert layers.max_model_len == 512
    with pytest.raises(openai.NotFoundError, match=r"There is no model 'layer'\. Known: 'arrows', 'code', "):
        client.models.retrieve("layer")


def test_a_chat_is_answered_as_the_fusion_answers_alone(client, catalog, small_world, question):
    model = FusedModel.from_pretrained(small_world["layers"])
    prompt = model.encode(question)["input_ids"][0].tolist()
    expected, ids = text_of(model, prompt)
    answer = client.chat.completions.create(model="layers", messages=asked(question), **GREEDY)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == ("stop" if ids[-1] == 2 else "length")
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.total_tokens == len(prompt) + len(ids)
    served = catalog.find("layers")
    assert answer.fusion == {
        "model": "layers",
        "method": "lora-flow",
        "parameters": served.method.parameters(),
        "adapters": ["zh-chat", "math"],
        "digest": served.digest,
    }
    assert answer.system_fingerprint == served.digest.removeprefix("sha256:")[:16]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": question[:5]}, {"type": "text", "text": question[5:]}]}
    ]
    again = client.chat.completions.create(model="layers", messages=parts, temperature=0, max_completion_tokens=16)
    assert again.choices[0].message.content == expected


def test_completions_of_text_ids_and_several_prompts(client, union, question):
    ids = union.tokenizer(question)["input_ids"]
    other = ids[: len(ids) // 2]
    expected = [text_of(union, one, "math")[0] for one in (ids, other)]

    def texts(prompt, **options):
        answer = client.completions.create(model="math", prompt=prompt, **GREEDY | options)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        assert answer.object == "text_completion"
        return [choice.text for choice in answer.choices], answer.usage.prompt_tokens

    assert texts(question) == (expected[:1], len(ids))
    assert texts(ids) == (expected[:1], len(ids))
    assert texts([ids, other]) == (expected, len(ids) + len(other))
    assert texts([question, question], n=2) == (expected[:1] * 4, 2 * len(ids))


@pytest.mark.parametrize("options", [{}, {"stop": ["3", "的"]}, {"n": 3, "temperature": 1.0, "seed": 4}], ids=str)
def test_a_stream_adds_up_to_the_whole(client, question, options):
    settings = {"model": "layers", "messages": asked(question), **GREEDY, **options}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(one.delta.content for one in mine) == choice.message.content
        assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    settings["prompt"] = [question, settings.pop("messages")[0]["content"] + "!"]
    whole = client.completions.create(**settings)
    pieces = list(client.completions.create(**settings, stream=True))
    for choice in whole.choices:
        mine = [piece.choices[0].text for piece in pieces if piece.choices[0].index == choice.index]
        assert "".join(mine) == choice.text
    assert all(piece.usage is None for piece in pieces)


def test_null_is_as_if_left_out(server):
    fields = ["temperature", "top_p", "n", "stream", "stop", "seed", "presence_penalty", "adapter_weights", "fusion"]
    body = {**PLAIN, **dict.fromkeys([*fields, "stream_options", "logprobs", "echo"], None), "seed": 3, "model": "math"}
    first, second = (post(server[1], "completions", one).json() for one in (body, {**body, "temperature": 1, "n": 1}))
    assert first["choices"] == second["choices"]
    assert "model" in post(server[1], "completions", {**PLAIN, "model": None}).json()["error"]["message"]


def test_chunks_put_together_are_the_message(server, client, question):
    # The client takes no answer that was cut.
    body = {"model": "math", "messages": asked(question), "n": 2, **GREEDY, "max_tokens": 120}
    whole = client.chat.completions.create(**body)
    with client.chat.completions.stream(**body) as stream:
        for _ in stream:
            pass
        found = stream.get_final_completion()
    for one, other in zip(found.choices, whole.choices, strict=True):
        assert (one.message.role, one.message.content) == ("assistant", other.message.content)
    refused = post(server[1], "completions", {**PLAIN, "stream_options": {"include_usage": True}})
    assert refused.status == 400
    assert "`stream_options` needs `stream`" in refused.json()["error"]["message"]


def test_offsets_are_those_of_the_tokens(client):
    body = {"model": "math", "prompt": ["1 + 1 =", "Anna has 3"], "logprobs": 0, **GREEDY}
    whole = client.completions.create(**body)
    pieces = [chunk.choices[0] for chunk in client.completions.create(**body, stream=True)]
    for choice in whole.choices:
        starts = itertools.accumulate(map(len, choice.logprobs.tokens[:-1]), initial=0)
        assert choice.logprobs.text_offset == list(starts)
        mine = [offset for piece in pieces if piece.index == choice.index for offset in piece.logprobs.text_offset]
        assert mine == choice.logprobs.text_offset


def test_several_prompts_are_streamed_beside_each_other(client, service):
    prompts = ["Anna has 3 apples", "1 + 1 ="]
    long = {"model": "math", "temperature": 1.9, "seed": 3, "max_tokens": 60}
    free = client.completions.create(prompt=prompts[1:], **long).choices[0].text
    # The second ends at once, though the first goes on.
    stop = free[:1]
    order = [chunk.choices[0] for chunk in client.completions.create(prompt=prompts, stop=stop, stream=True, **long)]
    ended = next(place for place, choice in enumerate(order) if choice.index == 1 and choice.finish_reason)
    assert order[ended].finish_reason == "stop"
    assert sum(choice.index == 1 for choice in order) == 1
    wait_for(lambda: service.engine.running == 0)


def test_the_coldest_temperatures_are_greedy(server):
    greedy = post(server[1], "completions", {**PLAIN, "temperature": 0}).json()["choices"]
    for temperature in (5e-324, 1e-300, 1e-9):
        assert post(server[1], "completions", {**PLAIN, "temperature": temperature}).json()["choices"] == greedy


def test_what_nobody_expected_is_an_error_of_openais_form(server, service, monkeypatch):
    monkeypatch.setattr(service, "served_for", lambda body: 1 / 0)
    answer = post(server[1], "completions", PLAIN)
    assert answer.status == 500
    assert answer.json()["error"]["message"] == "The server failed: ZeroDivisionError."


def test_stop_strings_end_an_answer(client, service, question):
    free = client.chat.completions.create(model="math", messages=asked(question), **GREEDY | {"max_tokens": 40})
    text = free.choices[0].message.content
    stop = text[6:9]
    answer = client.chat.completions.create(
        model="math", messages=asked(question), stop=[stop, "never there"], **GREEDY | {"max_tokens": 40}
    )
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < free.usage.completion_tokens
    wait_for(lambda: service.engine.running == 0)


def test_n_and_seed(client, question):
    def texts(**options):
        settings = {"temperature": 2.0, "max_tokens": 20, **options}
        answer = client.chat.completions.create(model="layers", messages=asked(question), **settings)
        return [choice.message.content for choice in answer.choices]

    first = texts(n=3, seed=7)
    assert len(set(first)) == 3
    assert texts(n=3, seed=7) == first
    assert texts(n=1, seed=8) == first[1:2]
    assert texts(n=2, seed=-3) != first[:2]
    assert len(set(texts(n=3))) == 3


def test_logprobs(client, union, question):
    prompt = union.tokenizer(question)["input_ids"]
    _, ids = text_of(union, prompt, "math", 6)
    logs = union(torch.tensor([prompt + ids]), methods=["math"]).logits[0].log_softmax(-1)[len(prompt) - 1 :].tolist()
    plain = client.completions.create(model="math", prompt=prompt, logprobs=2, **GREEDY | {"max_tokens": 6})
    found = plain.choices[0].logprobs
    assert found.tokens == [union.tokenizer.decode([one]) for one in ids]
    assert found.token_logprobs == pytest.approx([row[one] for row, one in zip(logs, ids, strict=False)], abs=1e-4)
    assert all(
        max(top.values()) == pytest.approx(value)
        for top, value in zip(found.top_logprobs, found.token_logprobs, strict=True)
    )
    chat = client.chat.completions.create(
        model="math", messages=asked(question), logprobs=True, top_logprobs=3, **GREEDY
    )
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert bytes(entry.bytes).decode() == entry.token
    bare = client.chat.completions.create(model="math", messages=asked(question), logprobs=True, **GREEDY)
    assert bare.choices[0].logprobs.content[0].top_logprobs == []
    assert client.chat.completions.create(model="math", messages=asked(question), **GREEDY).choices[0].logprobs is None


def test_weights_and_methods_of_a_request(client, catalog, union, small_world, question):
    prompt = union.encode(question)["input_ids"][0].tolist()
    own = FusedModel.from_pretrained(small_world["layers"])

    def ask(model, **extra):
        answer = client.chat.completions.create(model=model, messages=asked(question), extra_body=extra, **GREEDY)
        return answer.choices[0].message.content, answer

    weights = {"zh-chat": 0.3, "math": 0.7}
    assert ask("layers", adapter_weights=weights)[0] == text_of(own, prompt, weights)[0]
    assert ask("small", adapter_weights={"code": 1.5})[0] == text_of(union, prompt, {"code": 1.5})[0]
    assert ask("layers", fusion={"method": "qa-flora"})[0] == text_of(own, prompt, "qa-flora")[0]
    text, answer = ask("math", fusion={"method": "arrow", "options": {"top_k": 2}})
    assert text == text_of(union, prompt, "arrow")[0] or answer.fusion["parameters"]["top_k"] == 2
    assert answer.fusion["adapters"] == list(adapter_paths())
    assert answer.fusion["method"] == "arrow"
    assert answer.fusion["digest"] != catalog.find("math").digest


@pytest.mark.parametrize("name", ["layers", "linears", "steps"])
def test_tokens_come_with_their_weights(client, small_world, question, name):
    model = FusedModel.from_pretrained(small_world[name])
    prompt = model.encode(question)["input_ids"][0].tolist()
    _, ids = text_of(model, prompt)
    trace = model.trace(torch.tensor([prompt + ids]), prompt_length=len(prompt)).weights[0, len(prompt) - 1 : -1]
    for wanted, expected in (("all", trace), (True, trace.mean(dim=1))):
        settings = {"model": name, "messages": asked(question), **GREEDY}
        extra = {"return_fusion_weights": wanted}
        whole = client.chat.completions.create(**settings, extra_body=extra).choices[0].fusion_weights
        assert whole["adapters"] == model.adapter_names
        assert whole["tokens"] == [model.tokenizer.decode([one]) for one in ids]
        torch.testing.assert_close(torch.tensor(whole["weights"]), expected, rtol=1e-3, atol=1e-4)
        chunks = client.chat.completions.create(**settings, extra_body=extra, stream=True)
        streamed = [row for chunk in chunks for row in chunk.choices[0].fusion_weights["weights"]]
        assert streamed == whole["weights"]


def test_given_weights_come_back(client, question):
    settings = {"model": "small", "prompt": question, **GREEDY}
    extra = {"adapter_weights": {"code": -0.5}, "return_fusion_weights": True}
    shown = client.completions.create(**settings, extra_body=extra).choices[0].fusion_weights
    assert shown["weights"] == [[0.0, 0.0, 0.0, 0.0, -0.5]] * len(shown["tokens"])


def test_32_concurrent_requests_are_answered_as_alone(server, service, small_world, union):
    """Over five fusions, methods of requests and hand-set weights, in shuffled order."""
    questions = [load_task(name).test[index].prompt for name in ("zh-math", "es-code", "ru-math") for index in range(3)]
    kinds = [
        *[(name, {}) for name in ("layers", "linears", "steps", "mix", "arrows")],
        ("small", {}),
        ("math", {}),
        ("layers", {"adapter_weights": {"zh-chat": 0.3, "math": 0.7}}),
        ("small", {"adapter_weights": {"code": 0.9, "ru-chat": -0.2}}),
        ("layers", {"fusion": {"method": "qa-flora"}}),
        ("steps", {"fusion": {"method": "average"}}),
    ]
    cases = [(*kinds[index % len(kinds)], questions[index % len(questions)]) for index in range(32)]
    models = {name: FusedModel.from_pretrained(path) for name, path in small_world.items()}
    expected = []
    for name, extra, question in cases:
        model = models.get(name, union)
        method = extra.get("adapter_weights") or extra.get("fusion", {}).get("method")
        method = method or (None if name in models else "base" if name == "small" else name)
        prompt = model.encode(question)["input_ids"][0].tolist()
        expected.append(text_of(model, prompt, method, 24)[0])
    random.Random(3).shuffle(order := list(range(len(cases))))

    async def ask_all():
        async with openai.AsyncOpenAI(
            base_url=f"{server[1]}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S
        ) as client:

            async def ask(index):
                name, extra, question = cases[index]
                settings = {"model": name, "messages": asked(question), "temperature": 0, "max_tokens": 24}
                if index % 2:
                    answer = await client.chat.completions.create(**settings, extra_body=extra)
                    return answer.choices[0].message.content
                chunks = await client.chat.completions.create(**settings, extra_body=extra, stream=True)
                return "".join([chunk.choices[0].delta.content async for chunk in chunks])

            return dict(zip(order, await asyncio.gather(*map(ask, order)), strict=True))

    found = asyncio.run(ask_all())
    for index, case in enumerate(cases):
        assert found[index] == expected[index], case
    assert len(set(expected)) > 12
    assert service.engine.running == 0


# ---- Errors --------------------------------------------------------------------------------------------------------

CHAT = {"model": "layers", "messages": [{"role": "user", "content": "1 + 1?"}], "temperature": 0, "max_tokens": 4}
PLAIN = {"model": "layers", "prompt": "1 + 1 =", "temperature": 0, "max_tokens": 4}


@pytest.mark.parametrize(
    ("change", "status", "message", "param"),
    [
        ({"model": "layer"}, 404, "There is no model 'layer'. Known: 'arrows', 'code', ", "model"),
        ({"adapter_weights": {"code": 1.0}}, 400, "names the unknown adapter 'code'", "adapter_weights"),
        ({"fusion": {"method": "arow"}}, 400, "Unknown method 'arow'.", "fusion"),
        ({"fusion": {"method": "lora-flow"}}, 400, "learns, and a request cannot wait for that", "fusion"),
        (
            {"adapter_weights": {"math": 1.0}, "fusion": {"method": "arrow"}},
            400,
            "`adapter_weights` and `fusion` exclude each other. Give one of them.",
            "adapter_weights",
        ),
        ({"model": "small", "return_fusion_weights": True}, 400, "The base has no fusion weights. Ask for", None),
        ({"max_tokens": 401}, 400, "`max_tokens` (=401) must be at most 400: the prompt has", "max_tokens"),
        ({"stop": ""}, 400, "`stop`: a stop string is empty. Leave it out.", "stop"),
        ({"temperature": 3}, 400, "`temperature`: Input should be less than or equal to 2", "temperature"),
        ({"unknown": 1}, 400, "`unknown` is unknown or not supported. Leave it out.", "unknown"),
        (
            {"adapter_weights": {"math": 1e38, "zh-chat": -1e38}},
            400,
            "no finite numbers. Ask for smaller weights",
            None,
        ),
    ],
)
@pytest.mark.parametrize("body", [CHAT, PLAIN], ids=["chat", "plain"])
def test_errors_are_openais(client, service, body, change, status, message, param):
    create = client.chat.completions.create if body is CHAT else client.completions.create
    fields = {key: value for key, value in change.items() if key in body or key == "stop"}
    extra = {key: value for key, value in change.items() if key not in fields}
    with pytest.raises(openai.APIStatusError) as error:
        create(**body | fields, extra_body=extra)
    assert error.value.status_code == status
    assert message in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"
    if param is not None:
        assert error.value.param.startswith(param)
    if status == 404:
        assert error.value.code == "model_not_found"
    assert service.engine.failure is None
    wait_for(lambda: service.engine.running == 0)


def test_what_is_no_text_is_named(server):
    _, address = server
    found = post(address, "completions", b'{"model": "layers", "prompt": "\\ud83d"}').json()["error"]["message"]
    assert found == "`body`: '\\ud83d' is half of a surrogate pair, and no text. Leave it out."
    body = b'{"model": "layers", "prompt": "1", "fusion": {"method": "arrow", "options": {"a": NaN}}}'
    found = post(address, "completions", body).json()["error"]["message"]
    assert found.startswith("`fusion.options`: the options are no JSON (Out of range float values")
    assert found.endswith("). Give finite numbers.")


def post(address, path, body, **headers):
    return call("POST", f"{address}/v1/{path}", body, **headers)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "system", "content": "a"}]},
            400,
            "must end with the user's",
        ),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "`top_logprobs` needs `logprobs`. Set it to true."),
        ("chat/completions", CHAT | {"messages": []}, 400, "`messages`: List should have at least 1 item"),
        ("completions", PLAIN | {"best_of": 3}, 400, "`best_of` (=3) is not supported. Leave it out."),
        ("completions", PLAIN | {"prompt": []}, 400, "`prompt` is empty. Give text, or token ids."),
        ("completions", PLAIN | {"prompt": ""}, 400, "The prompt has no tokens. Give some text."),
        ("completions", PLAIN | {"prompt": [[5], []]}, 400, "The prompt has no tokens. Give some text."),
        ("completions", PLAIN | {"prompt": [5, 1536]}, 400, "; tokens are from 0 to 1535."),
        ("completions", PLAIN | {"prompt": [-1]}, 400, "; tokens are from 0 to 1535."),
        ("completions", PLAIN | {"prompt": ["a"] * 257}, 400, "257 prompts times n=1 are more than the server takes."),
        (
            "completions",
            PLAIN | {"prompt": [5] * 512},
            400,
            "The prompt has 512 tokens, and prompt and answer together",
        ),
        ("nothing", {}, 404, "POST /v1/nothing: Not Found"),
        ("models", {}, 405, "POST /v1/models: Method Not Allowed"),
    ],
)
def test_requests_that_cannot_be_answered(server, service, path, body, status, message):
    answer = post(server[1], path, body)
    assert answer.status == status
    assert message in answer.json()["error"]["message"]
    wait_for(lambda: service.engine.running == 0)


def test_bodies_are_bounded(catalog):
    with serving(catalog, ServerConfig(limits=CONFIG.limits, max_body_bytes=1000)) as (_, address):
        assert post(address, "completions", PLAIN).status == 200
        long = post(address, "completions", PLAIN | {"prompt": "a" * 1000})
        assert long.status == 413
        assert "bytes, and may have 1000. Send less." in long.json()["error"]["message"]
        # A body in chunks has no bound; a small length beside them does not make it small.
        for headers in ({}, {"Content-Length": "2"}):
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=DEADLINE_S)
            with contextlib.closing(connection):
                connection.putrequest("POST", "/v1/completions")
                for name, value in ({"Transfer-Encoding": "chunked"} | headers).items():
                    connection.putheader(name, value)
                connection.endheaders()
                answer = connection.getresponse()
                assert answer.status == 411
                assert "comes in chunks. Send it whole" in json.loads(answer.read())["error"]["message"]


def test_a_full_queue_says_when_to_come_again(catalog):
    config = ServerConfig(limits=CONFIG.limits, max_waiting=3, max_new_tokens=400)
    with serving(catalog, config) as (service, address):
        slow = PLAIN | {"max_tokens": 400, "temperature": 1.5, "n": 2, "stream": True}
        host = address.removeprefix("http://")
        with contextlib.closing(http.client.HTTPConnection(host, timeout=DEADLINE_S)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(slow), {"Content-Type": "application/json"})
            connection.getresponse().readline()
            answer = post(address, "completions", PLAIN | {"n": 2})
            assert answer.status == 429
            assert answer.headers["Retry-After"] == "1"
            error = answer.json()["error"]
            assert error["message"] == "The server has 2 answers to give, and takes at most 3. Try again later."
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            # Of several prompts the first would fit; none is left behind.
            assert post(address, "completions", PLAIN | {"prompt": ["a", "b"]}).status == 429
            assert service.engine.running == 2
            wait_for(lambda: service.engine.batched == 2)
            assert post(address, "completions", PLAIN).status == 200
        wait_for(lambda: service.engine.running == 0)
        assert post(address, "completions", PLAIN | {"n": 2}).status == 200
        refused = 'vllm:admission_rejections_total{model_name="small",reason="max_num_queued_reqs"} 2.0'
        assert refused in call("GET", f"{address}/metrics").text


def outcomes(service):
    """How many requests have ended how."""
    found = re.findall(r'loraflow:requests_total\{.*outcome="(\w+)"\} (\S+)', service.metrics.text().decode())
    return {outcome: int(float(count)) for outcome, count in found}


def logged(caplog):
    """The lines of the log, one for each request."""
    return [json.loads(record.message) for record in caplog.records if record.name == "loraflow.serving"]


def test_requests_end_in_time(catalog, caplog):
    caplog.set_level("INFO", logger="loraflow.serving")
    config = ServerConfig(limits=CONFIG.limits, max_new_tokens=400, timeout_s=0.05)
    with serving(catalog, config) as (service, address):
        slow = PLAIN | {"max_tokens": 400, "temperature": 1.5, "n": 8}
        answer = post(address, "completions", slow)
        assert answer.status == 504
        assert answer.json()["error"]["message"] == "The request took longer than 0.05 s. Ask for a shorter answer."
        streamed = post(address, "completions", slow | {"stream": True})
        assert streamed.status == 200
        events = streamed.text.strip().split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert events[-1] == "data: [DONE]"
        wait_for(lambda: service.engine.running == 0)
        # Of several prompts the first ends the others.
        assert post(address, "completions", slow | {"prompt": ["a", "b"]}).status == 504
        assert outcomes(service) == {"timeout": 4}
    assert [(line["outcome"], line["finished"]) for line in logged(caplog)] == [("timeout", False)] * 4


@pytest.mark.parametrize("prompt", ["1 + 1 =", ["1 + 1 =", "2 + 2 ="]], ids=["one", "two"])
def test_a_request_that_spoils_its_own_numbers_is_counted_as_invalid(catalog, caplog, prompt):
    caplog.set_level("INFO", logger="loraflow.serving")
    with serving(catalog, CONFIG) as (service, address):
        answer = post(address, "completions", PLAIN | {"prompt": prompt, "adapter_weights": {"math": 1e38}})
        assert answer.status == 400
        assert answer.json()["error"]["message"].startswith("The model's logits are no finite numbers.")
    count = 1 if isinstance(prompt, str) else 2
    assert outcomes(service) == {"invalid": count}
    assert [line["outcome"] for line in logged(caplog)] == ["invalid"] * count


# ---- Coming and going ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def vanishing(address, body, read):
    """A client that sends a request, reads so many bytes of the answer, and breaks the connection off at the end."""
    host, port = address.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        while read > 0:
            received = connection.recv(1000)
            assert received, "the server ended the answer before"
            read -= len(received)
        yield


@pytest.mark.parametrize(("stream", "read"), [(True, 2000), (True, 0), (False, 0)])
@pytest.mark.parametrize("prompt", ["1 + 1 =", ["1 + 1 =", "2 + 2 ="]], ids=["one", "two"])
def test_a_client_that_goes_away_frees_its_place(server, service, monkeypatch, stream, read, prompt):
    cancelled, before = [], outcomes(service)
    real = service.engine._manager.cancel_request
    monkeypatch.setattr(service.engine._manager, "cancel_request", lambda name: (cancelled.append(name), real(name)))
    slow = PLAIN | {"prompt": prompt, "max_tokens": 400, "stream": stream}
    slow |= {"temperature": 1.8, "n": 8, "seed": 0}
    # An answer that ends by itself may do so before anybody sees that its client is gone.
    monkeypatch.setattr(service, "_endings", lambda *_: Endings())
    with vanishing(server[1], slow, read):
        wait_for(lambda: service.engine.running > 0)
    wait_for(lambda: service.engine.running == 0)
    assert cancelled, "its answers were finished for nobody"
    prompts = 1 if isinstance(prompt, str) else len(prompt)
    wait_for(lambda: outcomes(service).get("cancelled", 0) == before.get("cancelled", 0) + prompts)
    monkeypatch.undo()
    assert post(server[1], "completions", PLAIN).status == 200


def test_shutting_down_finishes_what_runs(catalog):
    answers = []
    with serving(catalog, CONFIG) as (service, address):

        def ask():
            answers.append(post(address, "completions", PLAIN | {"max_tokens": 200, "stop": None, "temperature": 1.5}))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: service.engine.running == 4 or len(answers) > 0)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert [answer.status for answer in answers] == [200] * 4
    assert all(answer.json()["choices"][0]["finish_reason"] for answer in answers)
    assert not service.engine._manager.is_running()


def test_a_closing_server_takes_nothing_new(catalog):
    with serving(catalog, CONFIG) as (service, address):
        service.closing = True
        answer = post(address, "completions", PLAIN)
        assert answer.status == 503
        assert answer.json()["error"] == {
            "message": "The server is shutting down.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        # It lives on until its answers are given: who starts it anew now would cut them off.
        assert call("GET", f"{address}/health").status == 200
        ready = call("GET", f"{address}/ready")
        assert (ready.status, ready.json()) == (503, {"status": "shutting down"})


def test_an_engine_that_has_ended_is_told(monkeypatch, caplog):
    caplog.set_level("INFO", logger="loraflow.serving")

    def fail(*_):
        raise RuntimeError("out of paper")

    # A model of its own: a step of any engine over it fails.
    model = tiny_fusion()
    asked = {"model": "tiny", "prompt": [5, 6]}
    with serving(Catalog(model, "tiny", "tiny")) as (service, address):
        with monkeypatch.context() as patched:
            patched.setattr(model.base_model.lm_head, "forward", fail)
            running = post(address, "completions", asked)
        assert (running.status, running.json()["error"]["message"]) == (500, "The engine failed: out of paper")
        wait_for(lambda: service.engine.failure is not None)
        assert outcomes(service) == {"failed": 1}
        assert [(line["outcome"], line["finished"]) for line in logged(caplog)] == [("failed", False)]
        later = post(address, "completions", asked)
        message = "The engine has ended: RuntimeError: out of paper"
        assert (later.status, later.json()["error"]["message"]) == (503, message)
        for path in ("health", "ready"):
            answer = call("GET", f"{address}/{path}")
            assert (answer.status, answer.json()) == (503, {"status": "RuntimeError: out of paper"})


def test_health_and_metrics(client, server, question):
    address = server[1]
    for path in ("health", "ready"):
        assert call("GET", f"{address}/{path}").json() == {"status": "ok"}
    extra = {"return_fusion_weights": True}

    def counters():
        text = call("GET", f"{address}/metrics").text
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        }

    before = counters()
    answer = client.chat.completions.create(model="layers", messages=asked(question), extra_body=extra, **GREEDY)
    after = counters()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown('loraflow:requests_total{model="layers",outcome="finished"}') == 1
    engine = '{engine="0",model_name="small"}'
    assert grown(f"vllm:prompt_tokens_total{engine}") == answer.usage.prompt_tokens
    assert grown(f"vllm:generation_tokens_total{engine}") == answer.usage.completion_tokens
    assert grown("loraflow:weighed_tokens_total") == answer.usage.completion_tokens
    assert grown(f"vllm:inter_token_latency_seconds_count{engine}") == answer.usage.completion_tokens - 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert grown(f"vllm:{name}_seconds_count{engine}") == 1
    for name, tokens in (("prompt", answer.usage.prompt_tokens), ("generation", answer.usage.completion_tokens)):
        assert grown(f"vllm:request_{name}_tokens_sum{engine}") == tokens
    reason = answer.choices[0].finish_reason
    assert grown(f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="small"}}') == 1
    shares = answer.choices[0].fusion_weights["weights"]
    expected = sum(max(0.0, row[1]) for row in shares)
    assert grown('loraflow:fusion_weight_total{adapter="math"}') == pytest.approx(expected, abs=1e-3)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"vllm:{name}{engine}"] == 0


def test_prompts_are_counted_where_another_of_their_request_is_refused(catalog, caplog):
    caplog.set_level("INFO", logger="loraflow.serving")
    with serving(catalog, CONFIG) as (service, address):
        answer = post(address, "completions", PLAIN | {"prompt": ["1 + 1 =", "2 + 2 =", ""]})
        assert answer.status == 400
        assert answer.json()["error"]["message"] == "The prompt has no tokens. Give some text."
        wait_for(lambda: service.engine.running == 0)
        assert outcomes(service) == {"refused": 2}
        tokens = sum(len(service.tokenizer(text)["input_ids"]) for text in ("1 + 1 =", "2 + 2 ="))
        text = call("GET", f"{address}/metrics").text
        assert f'vllm:prompt_tokens_total{{engine="0",model_name="small"}} {float(tokens)}' in text
        assert 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="small"} 2.0' in text
    assert [(line["outcome"], line["finished"]) for line in logged(caplog)] == [("refused", False)] * 2


@pytest.mark.parametrize(("error", "outcome"), [(RuntimeError("out of paper"), "failed"), (None, "cancelled")])
def test_prompts_are_counted_where_another_of_their_request_fails(catalog, monkeypatch, error, outcome):
    error = error or asyncio.CancelledError()
    with serving(catalog, CONFIG) as (service, address):
        take, taken = service.ask, []

        async def ask(*arguments):
            if taken:
                raise error
            taken.append(await take(*arguments))
            return taken[0]

        monkeypatch.setattr(service, "ask", ask)
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            post(address, "completions", PLAIN | {"prompt": ["1 + 1 =", "2 + 2 ="]})
        wait_for(lambda: service.engine.running == 0)
        assert outcomes(service) == {outcome: 1}


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_seconds_begin_when_the_request_comes(catalog, caplog, monkeypatch, path):
    caplog.set_level("INFO", logger="loraflow.serving")
    with serving(catalog, CONFIG) as (service, address):
        # What comes before the engine: reading the request, and weighing its prompt.
        for owner, name in ((service, "served_for"), (catalog, "weigher")):
            work = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *arguments, work=work: (time.sleep(0.5), work(*arguments))[1])
        body = {"messages": asked("1 + 1 =")} if path == "chat/completions" else {"prompt": "1 + 1 ="}
        assert post(address, path, {"model": "layers", "max_tokens": 2} | body).status == 200
        counted = service.metrics.text().decode()
    (line,) = logged(caplog)
    assert min(line["seconds"], line["first_token_s"]) >= 1
    for name in ("e2e_request_latency", "time_to_first_token"):
        assert float(re.search(rf"vllm:{name}_seconds_sum\{{.*\}} (\S+)", counted)[1]) >= 1


@pytest.mark.parametrize("log_prompts", [False, True])
def test_logs_have_prompts_only_where_asked_for(catalog, caplog, log_prompts):
    caplog.set_level("INFO", logger="loraflow.serving")
    with serving(catalog, ServerConfig(limits=CONFIG.limits, log_prompts=log_prompts)) as (_, address):
        post(address, "completions", PLAIN)
    (record,) = logged(caplog)
    assert (record["model"], record["finished"], record["answers"]) == ("layers", True, 1)
    assert record["outcome"] == "finished"
    assert ("prompt" in record) == log_prompts
    assert ("1 + 1" in caplog.text) == log_prompts


@pytest.mark.parametrize("name", ["max_waiting", "max_new_tokens", "max_body_bytes", "timeout_s", "receive_timeout_s"])
def test_settings_are_checked(name):
    with pytest.raises(LoraflowError, match=rf"`{name}` \(=0\) must be greater than 0\."):
        ServerConfig(**{name: 0})


def test_a_base_without_a_tokenizer_is_refused(catalog, monkeypatch):
    monkeypatch.setattr(catalog.model, "tokenizer", None)
    with pytest.raises(LoraflowError, match="tokenizer"):
        Service(catalog)

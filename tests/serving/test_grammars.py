"""Answers have the form that was asked for, beside others that have none, and no form holds up others."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import threading
import time

import jsonschema
import openai
import pytest
import torch

from loraflow.demo.world import base_path
from loraflow.errors import LoraflowError
from loraflow.serving import grammar_trial, grammars
from loraflow.serving.forms import MOST_CHARACTERS, Form
from loraflow.serving.grammar_trial import GivenUpError, Trial
from loraflow.serving.service import ServerConfig
from loraflow.serving.turns import READING, Reading, Turns
from tests.serving.worlds import DEADLINE_S, call, serving

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "apples": {"type": "integer", "minimum": 0, "maximum": 999},
        "kinds": {"type": "array", "items": {"$ref": "#/$defs/kind"}, "maxItems": 2},
    },
    "required": ["name", "apples", "kinds"],
    "additionalProperties": False,
    "$defs": {"kind": {"enum": ["red", "green"]}},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "counted", "schema": SCHEMA, "strict": True}}
QUESTION = {"model": "layers", "messages": [{"role": "user", "content": "Anna has 3 apples."}], "max_tokens": 200}
PLAIN = {"model": "math", "prompt": "1 + 1 =", "max_tokens": 100}


@pytest.fixture(scope="module")
def server(catalog):
    with serving(catalog, ServerConfig()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S) as client:
        yield client


def refused(server, **fields):
    answer = call("POST", f"{server[1]}/v1/completions", PLAIN | fields)
    assert answer.status == 400, answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_are_by_their_schema(client, temperature):
    settings = QUESTION | {"temperature": temperature, "seed": 3, "n": 3, "response_format": FORMAT}
    whole = client.chat.completions.create(**settings, logprobs=True)
    for choice in whole.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"
    if temperature:
        assert len({choice.message.content for choice in whole.choices}) > 1
    assert whole.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in whole.choices)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**settings, stream=True)]
    for choice in whole.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.delta.content for chunk in mine) == choice.message.content
        assert mine[-1].finish_reason == "stop"


def test_stop_strings_and_the_longest_length_end_them_too(client):
    stopped = client.chat.completions.create(**QUESTION, temperature=0, response_format=FORMAT, stop='"apples"')
    assert stopped.choices[0].message.content.startswith("{")
    assert '"apples"' not in stopped.choices[0].message.content
    cut = client.chat.completions.create(**QUESTION | {"max_tokens": 3}, temperature=0, response_format=FORMAT)
    assert cut.choices[0].finish_reason == "length"


def test_any_object_and_the_words_of_vllm(client):
    def text(**fields):
        return client.completions.create(**PLAIN, temperature=0, extra_body=fields).choices[0].text

    free = text()
    assert text(response_format={"type": "json_object"}).startswith("{")
    assert text(response_format={"type": "text"}) == free
    assert text(structured_outputs={"choice": ["zero", 'the "two"']}) in ("zero", 'the "two"')
    assert text(structured_outputs={"regex": "[0-9]{3}-[a-c]{2}"})[3] == "-"
    for given in (SCHEMA, json.dumps(SCHEMA)):
        jsonschema.validate(json.loads(text(structured_outputs={"json": given})), SCHEMA)


def test_others_in_the_batch_are_answered_as_without_them(client):
    body = PLAIN | {"prompt": ["1 + 1 =", "Anna has"], "temperature": 0, "max_tokens": 24}
    expected = [choice.text for choice in client.completions.create(**body).choices]
    found = []

    def ask_freely():
        found.extend(choice.text for _ in range(4) for choice in client.completions.create(**body).choices)

    beside = threading.Thread(target=ask_freely)
    beside.start()
    answer = client.chat.completions.create(**QUESTION | {"n": 8}, temperature=1, response_format=FORMAT)
    beside.join(DEADLINE_S)
    assert found == expected * 4
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#/$defs/none"}, "Pointer '/$defs/none' does not exist"),
        ({"$ref": "https://example.com/schema.json"}, "'https://example.com/schema.json' is not present"),
        ({"$ref": "#"}, "no text is of this form"),
        ({"not": {"type": "object"}}, 'Unimplemented keys: ["not"]'),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "number?"}, "Invalid type: number?"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        (nested(100), "recursion limit exceeded"),
        ({"type": "integer", "multipleOf": 999_983}, "it takes more than 2 s"),
        ({"enum": ["x" * MOST_CHARACTERS]}, f"characters, and may have {MOST_CHARACTERS}. Ask for less."),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_schema_that_cannot_be_held_to_is_refused_with_the_reason(server, schema, reason):
    message = refused(server, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert message.startswith("`response_format` ")
    assert reason in message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"response_format": {"type": "json_schema"}}, "need each other. Give both, or neither."),
        (
            {"response_format": {"type": "structural_tag"}},
            'only "text" or "json_object" or "json_schema" is',
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "Field required"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "exclude each other"),
        (
            {"structured_outputs": {}},
            "0 of `json`, `json_object`, `regex` and `choice` are given, and exactly",
        ),
        ({"structured_outputs": {"grammar": "a"}}, "start the server with --engine vllm"),
        ({"structured_outputs": {"regex": "("}}, "`structured_outputs` cannot be held to: "),
    ],
    ids=str,
)
def test_a_form_that_is_none_is_refused(server, fields, reason):
    assert reason in refused(server, **fields)


def test_nobody_waits_for_a_form_that_takes_long(server, client, monkeypatch):
    trying, release = threading.Event(), threading.Event()

    def check(*_):
        trying.set()
        assert release.wait(60)
        raise LoraflowError("it took long")

    monkeypatch.setattr(Trial, "check", check)
    message = []
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "slow"}}}
    hostile = threading.Thread(target=lambda: message.append(refused(server, response_format=form)))
    hostile.start()
    assert trying.wait(60)
    answered = [client.completions.create(**PLAIN | {"max_tokens": 4}).choices for _ in range(3)]
    release.set()
    hostile.join(60)
    assert len(answered) == 3
    assert message == ["`response_format` cannot be held to: it took long. Ask for another form."]


def test_one_that_was_built_is_kept(server, client, monkeypatch):
    service = server[0]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "once"}}}
    for _ in range(2):
        assert client.completions.create(**PLAIN, extra_body={"response_format": form}).choices[0].text == '"once"'
        # Another time it would fail.
        monkeypatch.setattr(service.grammars, "_build", None)
    monkeypatch.undo()
    monkeypatch.setattr(grammars, "_KEPT_BYTES", 3 * 2**15)
    for number in range(5):
        form["json_schema"]["schema"] = {"const": number}
        client.completions.create(**PLAIN, extra_body={"response_format": form})
    assert len(service.grammars._kept) == 2


def test_who_hangs_up_keeps_its_turn_and_one_thread_until_its_form_is_built(catalog, monkeypatch):
    kept = grammars.Grammars(catalog.model.tokenizer, 1536, 1)
    building, release = [], threading.Event()

    def build(form):
        building.append(form.content)
        assert release.wait(60)
        return "slow"

    monkeypatch.setattr(kept, "_build", build)

    async def run():
        reading = Reading(Turns(), "hostile")
        READING.set(reading)
        for number in range(3):
            asked = asyncio.ensure_future(kept.find(Form("regex", str(number), "response_format")))
            await asyncio.sleep(0.05)
            asked.cancel()
            await asyncio.sleep(0.01)
        assert building == ["0"]
        release.set()
        with pytest.raises(LoraflowError, match="cannot be held to: slow"):
            await kept.find(Form("regex", "last", "response_format"))
        assert building == ["0", "last"]
        # What was built for nobody counts as read for nothing.
        assert reading.seconds >= 0.1

    try:
        asyncio.run(run())
    finally:
        release.set()
        kept.close()


def test_what_is_kept_is_found_by_any_thread_while_another_stores(monkeypatch):
    monkeypatch.setattr(grammars, "_KEPT_BYTES", 8 * 2**15)
    kept, ended = grammars._Kept(), threading.Event()

    def store():
        for number in range(20_000):
            kept.store(("regex", str(number % 50)), "reason")
        ended.set()

    storing = threading.Thread(target=store)
    storing.start()
    while not ended.is_set():
        for number in range(50):
            assert kept.get(("regex", str(number))) in (None, "reason")
    storing.join(60)
    assert kept._bytes == sum(map(grammars._bytes_of, kept._found)) <= 8 * 2**15
    oldest = next(iter(kept._found))
    assert kept.get(oldest) == "reason"
    assert list(kept._found)[-1] == oldest


def test_one_that_is_held_to_too_slowly_ends_its_own_request_alone(server, client, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(grammars, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(grammars.Constraint, "_find", lambda self: release.wait(DEADLINE_S))
    found = []
    beside = threading.Thread(target=lambda: found.append(client.completions.create(**PLAIN).choices[0].text))
    beside.start()
    message = refused(server, response_format={"type": "json_object"})
    release.set()
    beside.join(DEADLINE_S)
    assert message == "The form that was asked for takes more than 0.2 s to be held to. Ask for a simpler one."
    assert found


def test_all_tokens_of_an_answer_have_so_much_time_together(monkeypatch):
    class Busy:
        def compute_bitmask(self):
            until = time.thread_time() + 0.05
            while time.thread_time() < until:
                pass
            return b"\xff"

        def is_accepting(self):
            return False

        def consume_token(self, token):
            return True

        def is_error(self):
            return False

        is_stopped = is_accepting

    monkeypatch.setattr(grammars, "_PATIENCE_S", 0.12)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        constraint = grammars.Constraint(Busy(), threads)
        # Those that were found meanwhile cost nobody anything.
        constraint._next.result(60)
        assert constraint.limit(torch.zeros(8), ()).isfinite().all()
        constraint.accept(1)
        constraint._patience_s = 0.001
        with pytest.raises(LoraflowError, match=r"takes more than 0\.12 s to be held to"):
            constraint.limit(torch.zeros(8), ())


def test_a_form_that_fails_half_way_is_no_whole_answer():
    class Failing:
        def compute_bitmask(self):
            return b"\xff"

        def consume_token(self, token):
            return False

        def is_error(self):
            return True

        def is_stopped(self):
            return True

        def get_error(self):
            return "too many items"

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        constraint = grammars.Constraint(Failing(), threads)
        with pytest.raises(LoraflowError, match=r"cannot be held to: too many items\. Ask for a simpler one"):
            constraint.accept(1)


@pytest.mark.parametrize("fault", ["start", "memory"])
def test_a_process_that_ends_is_started_again(fault, monkeypatch):
    made = Trial({"tokenizer": base_path().joinpath("tokenizer.json").read_text(), "n_vocab": None, "eos_token": 2})
    try:
        made.check("regex", "a")
        first = made._process.pid
        made._process.kill()
        with pytest.raises(
            GivenUpError,
            match=r"the process that prepares it ended \(exit code -9\), as it does where it needs",
        ):
            made.check("regex", "b")
        if fault == "start":
            monkeypatch.setattr(grammar_trial.sys, "executable", "false")
            with pytest.raises(GivenUpError, match=r"that tries grammars did not start: .* \(exit code 1\)"):
                made.check("regex", "b")
            monkeypatch.undo()
        made.check("regex", "b")
        assert made._process.pid != first
        # A terminal's Ctrl-C goes to the server's group alone.
        assert os.getpgid(made._process.pid) != os.getpgid(0)
    finally:
        made.close()


def test_a_tokenizer_that_cannot_be_read_is_refused(monkeypatch, catalog):
    def fail(settings):
        raise ValueError("unknown kind")

    monkeypatch.setattr(grammars, "reading_tokenizer", fail)
    kept = grammars.Grammars(catalog.model.tokenizer, 1536, 1)
    with pytest.raises(LoraflowError, match=r"needs a tokenizer that llguidance reads, which .* \(unknown kind\)"):
        kept._started(Form("regex", "a", "response_format"))


def test_without_the_library_it_is_named(server, monkeypatch):
    service = server[0]
    monkeypatch.setattr(service.grammars, "_trial", None)
    monkeypatch.setattr(service.grammars, "_kept", grammars._Kept())
    monkeypatch.setattr(grammars.importlib.util, "find_spec", lambda name: None)
    message = refused(server, response_format={"type": "json_object"})
    assert message == "`response_format` needs llguidance: pip install 'loraflow[schema]'"


def test_a_slow_tokenizer_is_refused():
    class Slow:
        backend_tokenizer = None

    form = Form("regex", "a", "response_format")
    with pytest.raises(LoraflowError, match="`response_format` needs a fast tokenizer, and Slow is none"):
        grammars.Grammars(Slow(), 5, 1)._started(form)

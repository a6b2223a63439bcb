"""A field that changes nothing is no error, and one that would change something is never ignored."""

from __future__ import annotations

import typing

import openai
import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chats
from pydantic import ValidationError

from loraflow import PromptFormat
from loraflow.serving.catalog import Catalog
from loraflow.serving.no_ops import ChatNoOps, CompletionNoOps, NoOps
from loraflow.serving.protocol import ChatRequest, CompletionRequest
from tests.serving.worlds import DEADLINE_S, call, serving, tiny_fusion

PLAIN = {"model": "tiny", "prompt": [5, 6], "temperature": 0, "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "5 6"}], "temperature": 0, "max_tokens": 4}

BOTH = {
    "user": ["somebody"],
    "metadata": [{}, {"purpose": "a test"}],
    "safety_identifier": ["x"],
    "prompt_cache_key": ["x"],
    "store": [False],
    "service_tier": ["auto", "default"],
    "frequency_penalty": [0, 0.0],
    "presence_penalty": [0, 0.0],
    "repetition_penalty": [1, 1.0],
    "length_penalty": [1.0],
    "logit_bias": [{}, {"5": 0}],
    "top_k": [-1, 0],
    "min_p": [0, 0.0],
    "min_tokens": [0],
    "ignore_eos": [False],
    "stop_token_ids": [[]],
    "bad_words": [[]],
    "include_stop_str_in_output": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "use_beam_search": [False],
    "response_format": [{"type": "text"}],
    "priority": [0],
    "return_token_ids": [False],
    "vllm_xargs": [{}],
    "stop": [[]],
    "stream_options": [{}, {"include_usage": False}],
    "best_of": [],
    "prompt_logprobs": [None],
    "structured_outputs": [None],
    "kv_transfer_params": [None],
}
OF_CHATS = {
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "modalities": [["text"]],
    "top_logprobs": [0],
    "echo": [False],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
    "chat_template_kwargs": [{}],
    "documents": [[]],
}
OF_COMPLETIONS = {"echo": [False], "suffix": [""], "best_of": [1, 1.0], "add_special_tokens": [True]}


@pytest.fixture(scope="module")
def address():
    model = tiny_fusion()
    # Numbers are all that its tokenizer reads.
    turns = "{% for turn in messages %}{{ turn.role | length }} {{ turn.content }} {% endfor %}"
    model.prompt = PromptFormat(chat_template=turns)
    with serving(Catalog(model, "tiny", "tiny")) as (_, found):
        yield found


def cases(fields):
    return [(name, value) for name, values in fields.items() for value in values]


def choices(address, path, body):
    answer = call("POST", f"{address}/v1/{path}", body)
    assert answer.status == 200, answer.text
    return answer.json()["choices"]


@pytest.mark.parametrize(
    ("path", "plain", "fields"),
    [("completions", PLAIN, BOTH | OF_COMPLETIONS), ("chat/completions", CHAT, BOTH | OF_CHATS)],
    ids=["plain", "chat"],
)
def test_what_changes_nothing_is_answered_as_without_it(address, path, plain, fields):
    expected = choices(address, path, plain)
    for name, value in cases(fields):
        assert choices(address, path, plain | {name: value}) == expected, name
    together = {name: values[0] for name, values in fields.items() if values}
    assert choices(address, path, plain | together) == expected
    nothing = dict.fromkeys(together)
    assert choices(address, path, plain | nothing) == expected


def test_openais_client_sends_them(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S) as client:
        plain = client.chat.completions.create(**CHAT)
        answer = client.chat.completions.create(
            **CHAT | {"messages": [{"role": "user", "content": "5 6", "name": "somebody"}]},
            response_format={"type": "text"},
            tools=[],
            tool_choice="none",
            parallel_tool_calls=True,
            logit_bias={},
            frequency_penalty=0,
            presence_penalty=0,
            user="somebody",
            metadata={"purpose": "a test"},
            store=False,
            service_tier="auto",
            extra_body={"top_k": -1},
        )
    assert answer.choices == plain.choices


def test_what_developers_say_is_the_systems(address):
    def said(role):
        body = CHAT | {"messages": [{"role": role, "content": "7 8"}, *CHAT["messages"]], "max_tokens": 8}
        return choices(address, "chat/completions", body)

    assert said("developer") == said("system") != said("assistant")


def test_an_answer_is_taken_back_as_it_came(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S) as client:
        first = client.chat.completions.create(**CHAT).choices[0].message
        nothing = {"tool_calls": [], "annotations": [], "refusal": None, "audio": None, "function_call": None}
        for message in (first, first.model_dump(exclude={"reasoning"}), {**first.model_dump(), **nothing}):
            messages = [*CHAT["messages"], message, *CHAT["messages"]]
            assert client.chat.completions.create(**CHAT | {"messages": messages}).choices


REFUSED = {
    "frequency_penalty": (0.5, "only 0 is", True),
    "presence_penalty": (-1, "only 0 is", True),
    "repetition_penalty": (1.1, "only 1 is", True),
    "logit_bias": ({"5": 2}, "only 0 is", True),
    "top_k": (5, "only -1 or 0 is", True),
    "min_p": (0.1, "only 0 is", True),
    "ignore_eos": (True, "only false is", True),
    "skip_special_tokens": (False, "only true is", True),
    "stop_token_ids": ([5], "only [] is", True),
    "prompt_logprobs": (2, "only null is", True),
    "vllm_xargs": ({"a": 1}, "only {} is", True),
    "store": (True, "only false is", False),
    "service_tier": ("priority", 'only "auto" or "default" is', False),
}
REFUSED_CHATS = {
    "tools": ([{"type": "function", "function": {"name": "f"}}], "only [] is", True),
    "tool_choice": ("required", 'only "none" or "auto" is', True),
    "functions": ([{"name": "f"}], "only [] is", False),
    "reasoning_effort": ("high", 'only "none" is', True),
    "modalities": (["text", "audio"], 'only ["text"] is', False),
    "prediction": ({"type": "content", "content": "x"}, "only null is", False),
    "continue_final_message": (True, "only false is", True),
}


@pytest.mark.parametrize(
    ("path", "plain", "name", "case"),
    [
        *[("completions", PLAIN, *item) for item in REFUSED.items()],
        *[("chat/completions", CHAT, *item) for item in (REFUSED | REFUSED_CHATS).items()],
    ],
)
def test_what_would_change_something_is_refused_by_name(address, path, plain, name, case):
    value, allowed, vllm = case
    answer = call("POST", f"{address}/v1/{path}", plain | {name: value})
    assert answer.status == 400
    error = answer.json()["error"]
    assert error["param"].startswith(name)
    assert error["message"].startswith(f"`{name}")
    remedy = "Leave it out, or start the server with --engine vllm." if vllm else "Leave it out."
    assert error["message"].endswith(f") is not supported, {allowed}. {remedy}")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}, "messages.0.content.0.type"),
        ({"content": [{"type": "text", "text": "5"}, {"type": "input_audio"}]}, "messages.0.content.1.type"),
        ({"role": "tool", "tool_call_id": "x"}, "messages.0.role"),
        ({"tool_calls": [{"id": "x"}]}, "messages.0.tool_calls"),
    ],
)
def test_what_is_no_text_is_refused_by_name(address, message, param):
    turn = {"role": "user", "content": "5 6"} | message
    answer = call("POST", f"{address}/v1/chat/completions", CHAT | {"messages": [turn]})
    assert answer.status == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert "is not supported, only " in error["message"]
    assert error["message"].endswith("Leave it out, or start the server with --engine vllm.")


def test_an_endpoint_of_vllms_alone_is_named(address):
    answer = call("POST", f"{address}/v1/embeddings", PLAIN)
    assert answer.status == 404
    assert answer.json()["error"]["message"] == (
        "POST /v1/embeddings: Not Found. Endpoints that vLLM has beyond these are there with --engine vllm."
    )


NUMBERS = ["n", "max_tokens", "temperature", "top_p", "seed", "top_k", "frequency_penalty", "presence_penalty", "min_p"]


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in NUMBERS for value in (True, False, "1", "0", [1])],
        *[(name, value) for name in ("stream", "store", "ignore_eos") for value in (0, 1, "true", "false")],
        ("logprobs", "1"),
        ("adapter_weights", {"a": True}),
        ("adapter_weights", {"a": "0.5"}),
        ("logit_bias", {"5": False}),
        ("stream_options", {"include_usage": 1}),
        ("user", 1),
        ("metadata", "x"),
        ("stop", [1]),
        ("n", 1.5),
    ],
)
def test_a_value_of_another_type_is_an_error(request_type, name, value):
    plain = CHAT if request_type is ChatRequest else PLAIN
    stream = {"stream": True} if name == "stream_options" else {}
    with pytest.raises(ValidationError) as error:
        request_type.model_validate(plain | stream | {name: value})
    assert error.value.errors()[0]["loc"][0] == name


@pytest.mark.parametrize(
    "change",
    [{"prompt": [True]}, {"prompt": [[5], [False]]}, {"prompt": ["1", 1]}, {"logprobs": True}, {"best_of": True}],
)
def test_values_of_another_type_in_completions(change):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate(PLAIN | change)


@pytest.mark.parametrize("change", [{"logprobs": 1}, {"top_logprobs": True}, {"max_completion_tokens": True}])
def test_values_of_another_type_in_chats(change):
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | {"logprobs": True} | change)


def test_a_whole_number_may_have_a_point():
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 16.0, "n": 2.0}).max_tokens == 16


@pytest.mark.parametrize(
    ("request_type", "openais"),
    [
        (ChatRequest, of_chats.CompletionCreateParamsNonStreaming),
        (CompletionRequest, of_completions.CompletionCreateParamsNonStreaming),
    ],
)
def test_every_field_of_openais_is_known(request_type, openais):
    assert set(typing.get_type_hints(openais)) <= set(request_type.model_fields)


def test_every_field_is_in_one_place():
    assert not set(NoOps.model_fields) & set(CompletionNoOps.__annotations__)
    assert not set(NoOps.model_fields) & set(ChatNoOps.__annotations__)

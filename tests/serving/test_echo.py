"""Prompts that are told: text and log-probabilities before the answer's, as a plain forward gives them."""

from __future__ import annotations

from unittest import mock

import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from loraflow import FusedModel
from loraflow.serving.config import EngineLimits
from loraflow.serving.service import ServerConfig
from loraflow.serving.text import show_prompt
from loraflow.serving.turns import Reading
from tests.serving.worlds import DEADLINE_S, call, serving

# Steps that are shorter than the prompts, which are read in several.
CONFIG = ServerConfig(limits=EngineLimits(requests=8, batch_tokens=24, cache_tokens=2048, page_tokens=16))
PROMPTS = ["Anna has 3 apples and buys 12 more, and then 4 are eaten by Ivan. How many?", "¡Señor! 世界 1 + 1 ="]


@pytest.fixture(scope="module")
def address(catalog):
    with serving(catalog, CONFIG) as (_, found):
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S) as client:
        yield client


@pytest.mark.parametrize("name", ["layers", "linears", "steps", "arrows", "mix"])
def test_a_prompt_is_as_likely_as_in_a_plain_forward(client, small_world, name):
    model = FusedModel.from_pretrained(small_world[name])
    prompts = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    body = {"model": name, "prompt": prompts, "echo": True, "logprobs": 3, "temperature": 0, "n": 2}
    answer = client.completions.create(**body, max_tokens=1)
    for choice in answer.choices:
        ids = prompts[choice.index // 2]
        logs = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        found = choice.logprobs
        likeliest = int(logs[-1].argmax())
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        expected = [float(logs[at, token]) for at, token in enumerate([*ids[1:], likeliest])]
        assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        for at, top in enumerate(found.top_logprobs[1:]):
            assert max(top.values()) == pytest.approx(float(logs[at].max()), abs=1e-4)
        assert len(found.tokens) == len(ids) + 1
    told = client.completions.create(**body, max_tokens=0)
    assert [one.logprobs.token_logprobs for one in told.choices] == [
        pytest.approx(one.logprobs.token_logprobs[:-1], abs=1e-4) for one in answer.choices
    ]
    assert told.usage.completion_tokens == 0
    assert answer.usage.completion_tokens == 4
    assert told.usage.prompt_tokens == answer.usage.prompt_tokens == sum(map(len, prompts))
    assert {one.finish_reason for one in told.choices} == {"length"}


@pytest.mark.parametrize("more", [{}, {"logprobs": 0}, {"logprobs": 2, "stop": ["1", "e"]}, {"max_tokens": 0}], ids=str)
@pytest.mark.parametrize("tokens", [False, True])
def test_an_echo_is_the_prompt_and_then_the_answer(client, catalog, more, tokens):
    tokenizer = catalog.model.tokenizer
    given = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS] if tokens else PROMPTS
    body = {"model": "math", "prompt": given, "temperature": 1.5, "seed": 5, "n": 2, "max_tokens": 12} | more
    echoed = client.completions.create(**body, echo=True)
    if more.get("max_tokens") == 0:
        assert [choice.text for choice in echoed.choices] == [prompt for prompt in PROMPTS for _ in range(2)]
    else:
        plain = client.completions.create(**body)
        expected = [PROMPTS[choice.index // 2] + choice.text for choice in plain.choices]
        assert [choice.text for choice in echoed.choices] == expected
        assert echoed.usage == plain.usage
    chunks = [chunk.choices[0] for chunk in client.completions.create(**body, echo=True, stream=True)]
    for choice in echoed.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.text for chunk in mine) == choice.text
        assert [chunk.finish_reason for chunk in mine if chunk.finish_reason] == [choice.finish_reason]
        if "logprobs" in more:
            for field in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
                streamed = [one for chunk in mine for one in getattr(chunk.logprobs, field)]
                assert streamed == getattr(choice.logprobs, field), field
        else:
            assert choice.logprobs is None


def test_tokens_begin_where_the_offsets_say(client):
    body = {"model": "math", "prompt": PROMPTS[1], "temperature": 0.7, "seed": 3, "max_tokens": 40, "logprobs": 1}
    both = [(echo, client.completions.create(**body, n=4, echo=echo).choices) for echo in (False, True)]
    for echo, choice in [(echo, choice) for echo, choices in both for choice in choices]:
        found = choice.logprobs
        assert found.text_offset == sorted(found.text_offset)
        whole = [one for one in zip(found.tokens, found.text_offset, strict=True) if "\ufffd" not in one[0]]
        assert len(whole) > 2
        for token, start in whole:
            # An end has no text.
            assert choice.text[start : start + len(token)] == token or (token, start) == ("</s>", len(choice.text))
        for token, top in zip(found.tokens[echo:], found.top_logprobs[echo:], strict=True):
            assert token in top


@pytest.fixture
def lower_case():
    """One that changes texts, and adds a token to each."""
    words = {"<s>": 0, "a": 1, "b": 2, "e": 3, " ": 4}
    backend = Tokenizer(models.BPE(words, []))
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing("<s> $A <s>", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", clean_up_tokenization_spaces=False)


def test_tokens_of_a_text_that_the_tokenizer_changes_begin_where_it_says(lower_case):
    given = "A\u0065\u0301 É" + "b"
    ids = lower_case(given)["input_ids"]
    text, starts = show_prompt(lower_case, given, ids)
    assert text == given
    assert [given[start] for start in starts[1:-1]] == ["A", "e", " ", "É", "b"]
    assert (starts[0], starts[-1]) == (0, len(given))
    # Tokens that were given are read.
    assert show_prompt(lower_case, None, ids)[0] == "ae eb"
    # One that cannot say where its tokens come from has its own text shown.
    with mock.patch.object(PreTrainedTokenizerFast, "is_fast", False):
        assert show_prompt(lower_case, given, ids) == ("ae eb", [0, 0, 1, 2, 3, 4, 5])


def test_others_are_read_between_the_prompts_that_are_told(address, monkeypatch):
    pauses = []
    pause = Reading.pause

    async def counted(self):
        pauses.append(self.client)
        await pause(self)

    monkeypatch.setattr(Reading, "pause", counted)
    body = {"model": "math", "prompt": ["1"] * 5, "echo": True, "max_tokens": 0}
    assert call("POST", f"{address}/v1/completions", body).status == 200
    # Once before each is told, and once before each is handed over.
    assert len(pauses) == 10


def test_a_prompt_may_fill_all_that_there_is_room_for(address, catalog):
    longest = catalog.model.config.max_position_embeddings
    body = {"model": "math", "prompt": [5] * longest, "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = call("POST", f"{address}/v1/completions", body)
    assert len(answer.json()["choices"][0]["logprobs"]["tokens"]) == longest


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_tokens": 0}, "`max_tokens` (=0) asks for nothing without `echo`. Set that to true, or ask for more."),
        ({"max_tokens": 0, "echo": True, "prompt": [5] * 513}, "The prompt has 513 tokens"),
        ({"echo": True, "prompt": [999_999]}, "The prompt has the token 999999; tokens are from 0 to"),
        ({"echo": 1}, "`echo`: Input should be a valid boolean"),
        ({"best_of": 2}, "`best_of` (=2) is not supported. Leave it out."),
        (
            {"stop": ["a" * 1000] * 5},
            "`stop`: the stop strings have 5000 characters, and may have at most 4000 together.",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(address, more, message):
    answer = call("POST", f"{address}/v1/completions", {"model": "math", "prompt": "1"} | more)
    assert answer.status == 400
    assert message in answer.json()["error"]["message"]

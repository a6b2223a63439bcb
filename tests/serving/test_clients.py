"""Clients of other projects against a real server on loopback: lm-evaluation-harness and LiteLLM."""

from __future__ import annotations

import json

import pytest

from loraflow import FusedModel
from loraflow.demo.tasks import load_task
from loraflow.demo.world import base_path
from loraflow.evaluation.harness.models import lm_classes
from loraflow.serving.config import EngineLimits
from loraflow.serving.service import ServerConfig
from tests.serving.worlds import serving

CONFIG = ServerConfig(limits=EngineLimits(requests=16, batch_tokens=96, cache_tokens=4096, page_tokens=16))


@pytest.fixture(scope="module")
def address(catalog):
    with serving(catalog, CONFIG) as (_, found):
        yield found


@pytest.fixture(scope="module")
def fusion(small_world):
    return FusedModel.from_pretrained(small_world["layers"])


@pytest.fixture(scope="module")
def examples():
    return [load_task(name).test[index] for name in ("zh-math", "es-code") for index in range(3)]


# ---- lm-evaluation-harness ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness(address):
    pytest.importorskip("tenacity", reason="lm-eval's clients need it")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model="layers",
        base_url=f"{address}/v1/completions",
        tokenizer=str(base_path()),
        tokenizer_backend="huggingface",
        max_length=512,
        max_retries=1,
        timeout=60,
        batch_size=2,
    )


def requests_of(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def test_log_likelihoods_are_the_harnesses(harness, fusion, examples):
    prompts = [example.prompt[:-6] for example in examples]
    found = generated(fusion, prompts)
    pairs = [(example.prompt, " " + example.completion[:20]) for example in examples]
    # What is answered greedily is said to be.
    pairs += [(prompt, text) for prompt, text in zip(prompts, found, strict=True) if text]
    requests = requests_of("loglikelihood", pairs)
    expected = lm_classes().FusionLM(fusion, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    answered = harness.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in answered] == [greedy for _, greedy in expected]
    assert len({greedy for _, greedy in answered}) == 2
    assert [sum_ for sum_, _ in answered] == pytest.approx([sum_ for sum_, _ in expected], abs=1e-3)


def generated(fusion, prompts):
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = requests_of("generate_until", [(prompt, dict(options)) for prompt in prompts])
    return lm_classes().FusionLM(fusion, batch_size=2).generate_until(requests)


def test_answers_are_the_harnesses(harness, fusion, examples):
    # As many ends as tasks have.
    until = ["\n\n", "Question:", "</s>", "<|im_end|>", "。", "def "]
    options = {"until": until, "max_gen_toks": 20, "do_sample": False}
    requests = requests_of("generate_until", [(example.prompt, dict(options)) for example in examples])
    expected = lm_classes().FusionLM(fusion, batch_size=2).generate_until(requests)
    requests = requests_of("generate_until", [(example.prompt, dict(options)) for example in examples])
    assert harness.generate_until(requests, disable_tqdm=True) == expected
    assert any(expected)


# ---- LiteLLM --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litellm(address):
    # 200 MB with what it needs: `pip install litellm` to run these. It would ask the network for prices.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        module = pytest.importorskip("litellm")
    known = {"api_base": f"{address}/v1", "api_key": "any", "temperature": 0, "timeout": 60, "num_retries": 0}

    def complete(**fields):
        return module.completion(**{"model": "openai/layers"} | known | fields)

    def continued(**fields):
        return module.text_completion(**{"model": "text-completion-openai/layers"} | known | fields)

    return complete, continued


def test_litellm_asks_and_streams(litellm, examples):
    complete, continued = litellm
    settings = {"messages": [{"role": "user", "content": examples[0].prompt}], "max_tokens": 12}
    answer = complete(**settings, n=2, seed=3, logprobs=True, top_logprobs=2, user="somebody")
    first, second = (choice.message.content for choice in answer.choices)
    assert first == second
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in answer.choices)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in complete(**settings, stream=True)) == first
    stopped = complete(**settings, stop=[first[2:4]]).choices[0].message.content
    assert stopped == first[: first.index(first[2:4])]
    text = continued(prompt=examples[0].prompt, max_tokens=4, echo=True, logprobs=1)
    assert text.choices[0].text.startswith(examples[0].prompt)


def test_litellm_gets_json_by_a_schema(litellm):
    pytest.importorskip("llguidance")
    complete, _ = litellm
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"n": digit}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = complete(messages=[{"role": "user", "content": "1 + 1"}], max_tokens=60, response_format=form)
    assert set(json.loads(answer.choices[0].message.content)) == {"n"}

"""Questions as prompts: plain templates, chat templates, what ends an answer, and every refusal."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from loraflow import PromptFormat
from loraflow.endings import Endings
from loraflow.errors import DataError
from tests.tiny import CHATML, chat_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{{ raise_exception('no system turn') if messages[0]['role'] == 'system' }}" + CHAT
# Writes past turns without their thoughts, as Qwen3's template does.
FORGETFUL = CHAT.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
# Writes a longer start of the answer than its generation prompt has.
UNEVEN = CHAT.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")

USER = [{"role": "user", "content": "2+2?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
TURNS = [*USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "sure?"}]


braced = st.lists(st.sampled_from(["{system}", "{prompt}", "{", "{0}", "a "])).map("".join)
"""Texts with what looks like places in a template."""


@pytest.fixture
def tokenizer():
    """Every byte a token; `<s>` before any text that is no chat, as Llama's tokenizer puts it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    fast = Tokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>"])
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


def prompt_text(prompt, tokenizer, messages):
    prompt = prompt.resolve(tokenizer)
    return tokenizer.decode(prompt.prompt_ids(tokenizer, messages))


def completion_text(prompt, tokenizer, messages, answer):
    return tokenizer.decode(prompt.resolve(tokenizer).completion_ids(tokenizer, messages, answer))


# ---- Plain templates -----------------------------------------------------------------------------------------------


def test_without_any_template_the_prompt_is_the_question(tokenizer):
    assert PromptFormat().resolve(tokenizer) == PromptFormat(template="{prompt}")
    assert prompt_text(PromptFormat(), tokenizer, USER) == "<s>2+2?"


def test_a_system_prompt_goes_before_the_question(tokenizer):
    prompt = PromptFormat(system_prompt="Be kind.")
    assert prompt_text(prompt, tokenizer, USER) == "<s>Be kind.\n\n2+2?"
    assert prompt_text(prompt, tokenizer, SYSTEM) == "<s>Be brief.\n\n2+2?"


def test_a_template_is_filled(tokenizer):
    prompt = PromptFormat(template="{system}|Q: {prompt}\nA:")
    assert prompt_text(prompt, tokenizer, USER) == "<s>|Q: 2+2?\nA:"
    assert prompt_text(prompt, tokenizer, SYSTEM) == "<s>Be brief.|Q: 2+2?\nA:"


@settings(max_examples=50)
@given(system=braced, question=braced)
def test_any_text_stands_in_a_template_as_it_is(system, question):
    prompt = PromptFormat(template="{system}|{prompt}", system_prompt=system)
    assert prompt._plain([{"role": "user", "content": question}]) == f"{system}|{question}"


def test_a_system_prompt_is_never_dropped_in_silence(tokenizer):
    with pytest.raises(DataError, match=r"\{system\}"):
        prompt_text(PromptFormat(template="Q: {prompt}", system_prompt="Be kind."), tokenizer, USER)
    with pytest.raises(DataError, match=r"\{system\}"):
        prompt_text(PromptFormat(template="Q: {prompt}"), tokenizer, SYSTEM)


def test_a_plain_answer_ends_with_the_end_token(tokenizer):
    assert completion_text(PromptFormat(), tokenizer, USER, " 4") == " 4</s>"
    tokenizer.eos_token = None
    assert completion_text(PromptFormat(), tokenizer, USER, " 4") == " 4"


# ---- Chat templates ------------------------------------------------------------------------------------------------


def test_the_tokenizers_chat_template_is_kept_with_the_format(tokenizer):
    tokenizer.chat_template = CHAT
    prompt = PromptFormat(system_prompt="Be kind.").resolve(tokenizer)
    assert prompt == PromptFormat(system_prompt="Be kind.", chat_template=CHAT)
    tokenizer.chat_template = "changed later"
    assert prompt_text(prompt, tokenizer, USER) == "<system>Be kind.</s>\n<user>2+2?</s>\n<assistant>"


def test_a_given_chat_template_goes_before_the_tokenizers(tokenizer):
    tokenizer.chat_template = "the tokenizer's"
    assert prompt_text(PromptFormat(chat_template=CHAT), tokenizer, USER) == "<user>2+2?</s>\n<assistant>"


def test_a_conversations_own_system_turn_goes_before_the_formats(tokenizer):
    prompt = PromptFormat(system_prompt="Be kind.", chat_template=CHAT)
    assert prompt_text(prompt, tokenizer, SYSTEM) == "<system>Be brief.</s>\n<user>2+2?</s>\n<assistant>"


def test_the_answer_ends_as_the_template_ends_it(tokenizer):
    prompt = PromptFormat(chat_template=CHAT)
    assert completion_text(prompt, tokenizer, TURNS, "yes") == "yes</s>"
    whole = prompt_text(prompt, tokenizer, TURNS) + completion_text(prompt, tokenizer, TURNS, "yes")
    assert whole + "\n" == tokenizer.apply_chat_template(
        [*TURNS, {"role": "assistant", "content": "yes"}], chat_template=CHAT, tokenize=False
    )


@pytest.mark.parametrize(
    ("template", "answer"), [(FORGETFUL, "<think>hm</think>4"), (UNEVEN, "4")], ids=["forgetful", "uneven"]
)
def test_a_template_that_rewrites_the_answer_is_not_used_for_it(tokenizer, template, answer):
    assert completion_text(PromptFormat(chat_template=template), tokenizer, USER, answer) == f"{answer}</s>"


@pytest.mark.parametrize("answer", ["4", "s", "<|im", "im_end", " spaced ", "assistant"])
def test_what_is_trained_ends_with_the_turns_end_and_nothing_more(answer):
    tokenizer = chat_tokenizer()
    prompt = PromptFormat(chat_template=CHATML + "{% if not add_generation_prompt %}</s>{% endif %}")
    assert completion_text(prompt, tokenizer, TURNS, answer) == f"{answer}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT.replace("</s>", ""), "</s>"),
        (CHAT.replace("</s>", "\n"), "</s>"),
        (CHAT.replace("</s>", "[END]"), "[END]"),
        (FORGETFUL.replace("</s>", "<|im_end|>"), "<|im_end|>"),
        (UNEVEN.replace("</s>", "<|im_end|>"), "<|im_end|>"),
        (CHAT.replace("</s>", "").replace("<{{ m['role'] }}>", "<|im_start|>"), "\n<|im_start|>"),
    ],
    ids=["no end", "space", "text", "forgetful", "uneven", "the next turn's start"],
)
def test_whatever_a_template_writes_what_is_trained_ends(template, end):
    tokenizer = chat_tokenizer()
    prompt = PromptFormat(chat_template=template).resolve(tokenizer)
    answer = "<think>hm</think>4"
    assert completion_text(prompt, tokenizer, USER, answer) == f"{answer}{end}"
    ends = Endings.find(prompt, tokenizer, GenerationConfig())
    last = prompt.completion_ids(tokenizer, USER, answer)[-1]
    assert last in ends.token_ids or end in ends.texts
    assert ends.token_ids or ends.texts


def test_special_tokens_of_a_chat_are_not_doubled(tokenizer):
    ids = PromptFormat(chat_template="<s>" + CHAT).prompt_ids(tokenizer, USER)
    assert ids.count(tokenizer.bos_token_id) == 1


# ---- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PromptFormat(template="{prompt}", chat_template=CHAT), "`template` and `chat_template` exclude each other."),
        (PromptFormat(template="Q:"), "`template` (='Q:') has no {prompt} in it. Say where the prompt goes."),
    ],
)
def test_templates_that_cannot_be_used_are_refused(tokenizer, prompt, expected):
    with pytest.raises(DataError, match=re.escape(expected)):
        prompt.resolve(tokenizer)


def test_a_choice_of_chat_templates_is_not_guessed(tokenizer):
    tokenizer.chat_template = {"default": CHAT, "tools": CHAT}
    with pytest.raises(DataError, match=r"several chat templates\. Give one as `chat_template`\."):
        PromptFormat().resolve(tokenizer)


@pytest.mark.parametrize(
    "messages", [TURNS, TURNS[:2], [*USER, *USER]], ids=["three turns", "answered", "two questions"]
)
def test_several_turns_need_a_chat_template(tokenizer, messages):
    with pytest.raises(DataError, match="several turns needs a chat template"):
        prompt_text(PromptFormat(), tokenizer, messages)


def test_what_a_chat_template_refuses_is_refused(tokenizer):
    with pytest.raises(DataError, match="The chat template refuses the conversation: no system turn"):
        prompt_text(PromptFormat(chat_template=STRICT), tokenizer, SYSTEM)


def test_a_broken_chat_template_is_refused(tokenizer):
    with pytest.raises(DataError, match="The chat template refuses the conversation: "):
        prompt_text(PromptFormat(chat_template="{% for %}"), tokenizer, USER)


def test_a_format_is_frozen_and_takes_no_unknown_fields():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        PromptFormat(chat_tempalte=CHAT)
    with pytest.raises(ValidationError, match="frozen"):
        PromptFormat().template = "x"


@pytest.mark.parametrize("fault", ["{{ 1 + 'a' }}", "{{ messages | length + none }}"])
def test_a_template_that_fails_in_python_is_named(tokenizer, fault):
    prompt = PromptFormat(chat_template=fault).resolve(tokenizer)
    with pytest.raises(DataError, match="The chat template refuses the conversation: "):
        prompt.prompt_text(tokenizer, USER)


@pytest.mark.parametrize("mark", [".", '"', ".\n"])
def test_a_single_mark_behind_an_answer_ends_none(tokenizer, mark):
    for written, token_id in ((mark, None), (mark + "</s>", 1)):
        prompt = PromptFormat(chat_template=CHAT.replace("</s>\n", written)).resolve(tokenizer)
        end = prompt.turn_end(tokenizer, USER)
        assert (end and end.token_id) == token_id
        assert end is None or not end.string


PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


def test_a_template_that_reads_parts_is_given_parts():
    tokenizer = chat_tokenizer()
    prompt = PromptFormat(chat_template=PARTS).resolve(tokenizer)
    asked = prompt.prompt_text(tokenizer, [{"role": "user", "content": "What is 2+2?"}])
    assert asked == "<|im_start|>user: What is 2+2?<|im_end|>\n<|im_start|>assistant:"


def test_a_template_that_writes_no_question_is_refused():
    tokenizer = chat_tokenizer()
    prompt = PromptFormat(chat_template="{% for m in messages %}{{ m['role'] }}{% endfor %}").resolve(tokenizer)
    with pytest.raises(DataError, match="writes nothing of what a user says, neither as a text nor as a list of parts"):
        prompt.prompt_text(tokenizer, [{"role": "user", "content": "What is 2+2?"}])

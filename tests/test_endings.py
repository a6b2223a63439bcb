"""What ends an answer: found by template, tokenizer and configuration, added to, and taken by `generate`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from loraflow import PromptFormat
from loraflow.endings import Endings, before_first, token_ids
from loraflow.errors import LoraflowError
from tests.tiny import CHATML, GEMMA, TURNS, byte_tokenizer, chat_tokenizer, number_tokenizer

USER = [{"role": "user", "content": "2+2?"}]
EOS = 2
LOOP = "{% for m in messages %}"
START = "{% if add_generation_prompt %}<a>{% endif %}"
LLAMA2 = (
    LOOP + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = LOOP + "<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}" + START.replace("%}<a>", "%}<a>{% else %}</s>")
# Ends no turn, and begins each with a token, as GLM's does.
GLM = LOOP + "{{ '<|im_start|>' if m['role'] == 'user' else '<a>' }}\n{{ m['content'] }}{% endfor %}" + START
ALPACA = (
    LOOP + "### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}### a:\n{% endif %}"
)
WRITTEN = (
    LOOP
    + "<{{ m['role'] }}>{{ m['content'] }}\n[END]\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MIXED = WRITTEN.replace("[END]", "###<|im_end|>")
WITH_SYSTEM = "{{ raise_exception('no') if messages[0]['role'] != 'system' }}" + CHATML
# Drops what is thought in past turns, and the answer of a probe with it.
NEVER = LOOP + "{{ m['content'] if m['role'] == 'user' }}{% endfor %}"


def config(end: Any = EOS, **more: Any) -> GenerationConfig:
    return GenerationConfig(eos_token_id=end, **more)


def found(template: str | None, tokenizer: Any = None, end: Any = EOS, **prompt: Any) -> Endings:
    tokenizer = tokenizer or chat_tokenizer(template=None)
    format_ = PromptFormat(chat_template=template, **prompt).resolve(tokenizer)
    return Endings.find(format_, tokenizer, config(end))


# ---- Where they come from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", TURNS)
def test_a_template_ends_turns_with_a_token_that_is_not_the_models(end: str) -> None:
    tokenizer = chat_tokenizer(end)
    token = tokenizer.convert_tokens_to_ids(end)
    assert found(TURNS[end], tokenizer) == Endings(token_ids=(EOS, token))
    assert found(None, tokenizer) == Endings(token_ids=(EOS, token)), "the tokenizer's own template"


@pytest.mark.parametrize(
    ("template", "tokens", "strings"),
    [
        (LLAMA2, (), ()),
        (PHI3, ("<|im_end|>",), ()),
        (GLM, ("<|im_start|>",), ()),
        (ALPACA, (), ()),
        (WRITTEN, (), ("[END]",)),
        (MIXED, ("<|im_end|>",), ("###",)),
        (WITH_SYSTEM, ("<|im_end|>",), ()),
        (NEVER, (), ()),
        ("{{ raise_exception('never') }}", (), ()),
        ("{% for %}", (), ()),
    ],
    ids=["llama2", "phi3", "glm", "alpaca", "written", "mixed", "with system", "never", "refuses", "broken"],
)
def test_templates_end_turns_in_their_own_ways(template: str, tokens: Any, strings: Any) -> None:
    ids = chat_tokenizer().convert_tokens_to_ids(list(tokens))
    assert found(template) == Endings(token_ids=(EOS, *ids), strings=strings)


def test_a_turns_end_that_is_no_token_of_the_tokenizers_is_text() -> None:
    assert found(CHATML, byte_tokenizer()) == Endings(token_ids=(EOS,), strings=("<|im_end|>",))
    assert found(GEMMA, byte_tokenizer()) == Endings(token_ids=(EOS,), strings=("<end_of_turn>",))


def test_a_system_prompt_that_the_template_refuses_hides_no_end() -> None:
    assert found(GEMMA, chat_tokenizer("<end_of_turn>"), system_prompt="Be brief.") == Endings(token_ids=(EOS,))
    format_ = PromptFormat(chat_template=GEMMA)
    assert found(GEMMA, chat_tokenizer("<end_of_turn>")).and_turn_end(format_, byte_tokenizer(), USER) is not None


def test_the_models_configuration_and_the_tokenizer_both_count() -> None:
    tokenizer = byte_tokenizer()
    assert found(None, tokenizer, [7, 8]) == Endings(token_ids=(7, 8, EOS))
    assert found(None, tokenizer, None) == Endings(token_ids=(EOS,))
    tokenizer.eos_token = None
    assert found(None, tokenizer, -1) == Endings()
    texts = Endings.find(PromptFormat(template="{prompt}"), None, config(stop_strings="x"))
    assert texts == Endings(token_ids=(EOS,), strings=("x",))


@pytest.mark.parametrize(
    ("value", "ids"), [(None, ()), (3, (3,)), ([3, 4, 3], (3, 4)), (-1, ()), (torch.tensor([5, 6]), (5, 6))]
)
def test_end_tokens_are_written_in_several_ways(value: Any, ids: Any) -> None:
    assert token_ids(value) == ids


# ---- Further texts -------------------------------------------------------------------------------------------------


def test_further_texts_are_added_once() -> None:
    tokenizer = byte_tokenizer()
    ends = Endings(strings=("a",)).and_stop(["b", "a"], tokenizer).and_stop("b", tokenizer)
    assert (ends.stop, ends.texts) == (("b", "a"), ("a", "b"))
    assert ends.and_stop([], None) is ends


def test_the_text_of_a_special_token_means_the_token() -> None:
    tokenizer = chat_tokenizer()
    token = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Endings().and_stop(["<|im_end|>"], tokenizer) == Endings(token_ids=(token,), stop=("<|im_end|>",))
    shown = chat_tokenizer(special=False)
    assert Endings().and_stop(["<|im_end|>\n"], shown) == Endings(stop=("<|im_end|>\n",))


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], r"The stop string '' must be text, and not empty\."),
        ("", None),
        ([3], r"The stop string 3 must be text"),
        (
            ["<|im_end|>\n"],
            r"has the special token '<\|im_end\|>' in it, .* Give '<\|im_end\|>' alone, or text without it",
        ),
    ],
)
def test_texts_that_would_end_nothing_are_refused(stop: Any, message: str | None) -> None:
    if message is None:
        assert Endings().and_stop(stop, chat_tokenizer()) == Endings()
        return
    with pytest.raises(LoraflowError, match=message):
        Endings().and_stop(stop, chat_tokenizer())


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(LoraflowError, match=r"The stop string 'x' is looked for in text, .* Give it as `tokenizer=`"):
        Endings().and_stop(["x"], None)


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("a b c", [], "a b c"),
        ("a b c", ["c", "b"], "a "),
        ("abc", ["x"], "abc"),
        ("stop", ["stop"], ""),
        ("aXbX", ["X"], "a"),
        ("abcd", ["bcd", "c"], "ab"),
    ],
)
def test_a_text_ends_before_the_first_stop_that_is_complete(text: str, stop: list[str], kept: str) -> None:
    assert before_first(text, stop) == kept


# ---- Options of `generate` -----------------------------------------------------------------------------------------

ENDS = Endings(token_ids=(EOS, 7), strings=("x",), stop=("y",))
BASE = config()


def test_generate_gets_the_ends_where_its_caller_names_none() -> None:
    tokenizer = number_tokenizer()
    options, given = ENDS.options({"max_new_tokens": 3}, None, BASE, tokenizer)
    expected = {"max_new_tokens": 3, "eos_token_id": [EOS, 7], "stop_strings": ["x", "y"], "tokenizer": tokenizer}
    assert (options, given) == (expected, None)
    assert Endings().options({}, None, BASE, tokenizer) == ({}, None)


def test_a_callers_own_ends_stay() -> None:
    tokenizer, mine = number_tokenizer(), byte_tokenizer()
    given = {"eos_token_id": None, "stop_strings": ["z"], "tokenizer": mine}
    assert ENDS.options(given, None, BASE, tokenizer) == (given, None)
    options, _ = ENDS.options({"stop_strings": ["z"]}, None, BASE, tokenizer)
    assert options == {"stop_strings": ["z"], "tokenizer": tokenizer, "eos_token_id": [EOS, 7]}


def test_a_configuration_of_the_callers_is_neither_changed_nor_named_beside_options() -> None:
    tokenizer = number_tokenizer()
    own = GenerationConfig(max_new_tokens=4)
    options, used = ENDS.options({}, own, BASE, tokenizer)
    assert options == {"tokenizer": tokenizer}
    assert used is not None
    assert (used.eos_token_id, used.stop_strings, used.max_new_tokens) == ([EOS, 7], ["x", "y"], 4)
    assert (own.eos_token_id, own.stop_strings) == (None, None)
    # A copy of the base's says what the base says, which is no choice.
    _, used = ENDS.options({}, copy.deepcopy(BASE), BASE, tokenizer)
    assert used is not None
    assert used.eos_token_id == [EOS, 7]
    _, used = ENDS.options({}, config(9, stop_strings=["z"]), BASE, tokenizer)
    assert used is not None
    assert (used.eos_token_id, used.stop_strings) == (9, ["z"])


def test_they_are_told_to_people() -> None:
    tokenizer = chat_tokenizer()
    token = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = Endings(token_ids=(EOS, token), strings=("###",), stop=("<|im_end|>", "\n\n"))
    assert ends.describe(tokenizer) == f"'</s>' (2), '<|im_end|>' ({token}), '###', '\\n\\n'"
    assert ends.describe(None) == f"2, {token}, '###', '<|im_end|>', '\\n\\n'"
    assert Endings().describe(tokenizer) == "the longest length only"

"""Answers to many prompts: what is counted, where they end, and that a batch changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from loraflow.answers import Answer, generate_answers, padding_id, require_tokenizer
from loraflow.errors import LoraflowError
from loraflow.prompts import PromptFormat
from tests.tiny import TURNS, byte_tokenizer, chat_tokenizer, number_tokenizer, tiny_model, writing_model

PLAIN = PromptFormat(template="{prompt}")
END = 2


class Scripted:
    """Answers each prompt, told by its last token, with given tokens, padded as `generate` pads."""

    def __init__(self, script: dict[int, list[int]], pad: int, end: Any = END) -> None:
        self.script, self.pad = script, pad
        self.device = torch.device("cpu")
        self.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
        self.calls: list[dict[str, Any]] = []

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls.append({"rows": len(input_ids), **options})
        answers = [self.script[ids[-1]] for ids in input_ids.tolist()]
        width = max(map(len, answers))
        padded = [[*answer, *[self.pad] * (width - len(answer))] for answer in answers]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def ask(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def answer(model: Any, *texts: str, tokenizer: Any = None, **options: Any) -> list[Answer]:
    settings = {"tokenizer": tokenizer or number_tokenizer(), "prompt": PLAIN, "max_new_tokens": 8, **options}
    return generate_answers(model, ask(*texts), **settings)


SCRIPT = {10: [20, 21, END], 11: [22, END], 12: [23, 24, 25, 26], 13: [END]}


@pytest.mark.parametrize("end", [END, [END, 1]])
@pytest.mark.parametrize("pad", [0, END])
def test_tokens_count_up_to_and_with_the_end_token(pad: int, end: Any) -> None:
    answers = answer(Scripted(SCRIPT, pad, end), "10", "11", "12", "13")
    assert answers == [Answer("20 21", 3), Answer("22", 2), Answer("23 24 25 26", 4), Answer("", 1)]
    assert [list(each.token_ids) for each in answers] == [SCRIPT[number] for number in (10, 11, 12, 13)]


@pytest.mark.parametrize("pad", [0, END])
def test_padding_after_a_stop_string_is_not_counted(pad: int) -> None:
    tokenizer = number_tokenizer()
    tokenizer.pad_token_id = pad
    # The first row was ended by the stop string, without an end token; the second goes on.
    script = {10: [20, 30], 11: [21, 22, 23, 24, END]}
    answers = answer(Scripted(script, pad), "10", "11", tokenizer=tokenizer, stop=["30"])
    assert answers == [Answer("20 ", 2), Answer("21 22 23 24", 5)]


def test_prompts_of_like_length_share_a_batch_and_keep_their_order() -> None:
    model, sizes = Scripted(SCRIPT, 0), []
    texts = ("5 5 5 10", "11", "5 5 12", "13", "5 10")
    answers = answer(model, *texts, batch_size=2, on_batch=sizes.append)
    assert [a.text for a in answers] == ["20 21", "22", "23 24 25 26", "", "20 21"]
    assert sizes == [call["rows"] for call in model.calls] == [2, 2, 1]
    assert all(call["do_sample"] is False for call in model.calls)
    assert [call["attention_mask"].sum(dim=1).tolist() for call in model.calls][-1] == [4]


def test_options_go_to_generate() -> None:
    model = Scripted(SCRIPT, 0)
    answer(model, "10", do_sample=True, temperature=0.5, stop=["x"])
    call = model.calls[0]
    assert (call["do_sample"], call["temperature"], call["stop_strings"]) == (True, 0.5, ["x"])
    answer(model, "10")
    assert "stop_strings" not in model.calls[1]


# ---- A real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(vocab_size=259, max_position_embeddings=512)


def test_a_batch_gives_what_each_prompt_gives_alone(model: Any) -> None:
    texts, tokenizer = ("12 + 3", "7", "a longer question than the others"), byte_tokenizer()
    together = answer(model, *texts, tokenizer=tokenizer)
    alone = [answer(model, text, tokenizer=tokenizer)[0] for text in texts]
    assert together == alone
    assert len({a.text for a in together}) > 1


def test_a_stop_string_ends_the_generation(model: Any) -> None:
    # Only ASCII, so that every token is one character.
    tokenizer, bias = byte_tokenizer(), {(i,): -1e9 for i in range(259)}
    for token, index in tokenizer.get_vocab().items():
        if token.isascii() and token.isalnum():
            del bias[(index,)]
    options = {"tokenizer": tokenizer, "sequence_bias": bias, "max_new_tokens": 30}
    whole = answer(model, "go", **options)[0]
    assert (len(whole.text), whole.tokens) == (30, 30)
    stop = whole.text[3:5]
    cut = answer(model, "go", "stay a while", stop=[stop], **options)[0]
    place = whole.text.index(stop)
    assert cut == Answer(whole.text[:place], place + 2)


def test_what_is_missing_is_told() -> None:
    with pytest.raises(LoraflowError, match=r"the base model came without one. Give it as `tokenizer=`"):
        require_tokenizer(None)
    tokenizer = number_tokenizer()
    assert require_tokenizer(tokenizer) is tokenizer
    assert padding_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == END


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("end", TURNS)
def test_answers_end_where_the_template_ends_a_turn(end: str, special: bool) -> None:
    tokenizer = chat_tokenizer(end, special=special)
    model = writing_model(tokenizer, f"ok{end}x")
    prompt = PromptFormat().resolve(tokenizer)
    assert answer(model, "go", tokenizer=tokenizer, prompt=prompt) == [Answer("ok", 3)]
    # Without the template, the model's own end, which it never writes, is the only one.
    assert answer(model, "go\n", tokenizer=tokenizer)[0].tokens == 8


def test_a_turns_end_that_is_text_is_no_part_of_the_answer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURNS["<|im_end|>"].replace("<|im_end|>", "<e>")
    model = writing_model(tokenizer, "ok<e>x")
    answers = answer(model, "go", "away", tokenizer=tokenizer, prompt=PromptFormat().resolve(tokenizer))
    assert answers == [Answer("ok", 5), Answer("ok", 5)]


def test_a_special_token_may_be_asked_for_as_the_end() -> None:
    tokenizer = chat_tokenizer(template=None)
    model = writing_model(tokenizer, "ok<|im_end|>x")
    found = answer(model, "go\n", tokenizer=tokenizer, stop=["<|im_end|>"])
    assert found == [Answer("ok", 3)]

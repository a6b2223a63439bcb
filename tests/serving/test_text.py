"""Text as it comes is the whole text, up to the first stop string."""

from __future__ import annotations

import functools
import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from loraflow.serving.text import TextStream
from tests.tiny import byte_tokenizer, trained_tokenizer

TEXTS = [
    "a plain text, with  two spaces\n",
    "您好，世界。你好！",
    "¡Señor! Ñandú…",
    "Привет, мир",
    "👩‍👩‍👧 🏳️‍🌈 x",
    " \ufffd \ufffd",
    "",
]


@functools.cache
def tokenizers():
    # Some of its tokens are several of the characters that stop strings are made of below.
    trained = trained_tokenizer([*TEXTS * 3, "aba abb 世é ba ab世 " * 9], 320)
    return {"bytes": byte_tokenizer(), "trained": trained, "pieces": piece_tokenizer()}


def piece_tokenizer():
    """A tokenizer in the manner of Llama 2: a first space is dropped, and rare characters are bytes."""
    pieces = ["<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b", "▁b", "世", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def stream(tokenizer, ids, stop=()):
    """The pieces of an answer, and whether it was stopped."""
    text = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces, True
    pieces.append(text.finish())
    return pieces, text.stopped


def cut(text, stop):
    """The text before the stop string that is complete first; of several, before the longest."""
    ends = [(match.end(), match.start()) for one in stop if (match := re.search(re.escape(one), text))]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@pytest.mark.parametrize("kind", ["bytes", "trained"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(kind, text):
    tokenizer = tokenizers()[kind]
    ids = tokenizer(text)["input_ids"]
    pieces, stopped = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not stopped
    assert kind == "trained" or len(pieces) > len(text)


def test_a_character_of_several_tokens_comes_with_its_last():
    tokenizer = tokenizers()["bytes"]
    pieces, _ = stream(tokenizer, tokenizer("x世é")["input_ids"])
    assert pieces == ["x", "", "", "世", "", "é", ""]


@settings(max_examples=150)
@given(kind=st.sampled_from(["bytes", "trained"]), data=st.data())
def test_any_tokens_are_decoded_as_a_whole(kind, data):
    tokenizer = tokenizers()[kind]
    ids = data.draw(st.lists(st.integers(3, len(tokenizer) - 1), max_size=30))
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@settings(max_examples=100)
@given(parts=st.lists(st.sampled_from(["▁", "▁a", "a", "b", "▁b", "世", "é", "好", "👩", "\n"]), max_size=20))
def test_first_spaces_and_characters_of_bytes(parts):
    tokenizer = tokenizers()["pieces"]
    known = tokenizer.get_vocab()
    ids = [known[p] for part in parts for p in ([part] if part in known else [f"<0x{b:02X}>" for b in part.encode()])]
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "".join(parts).replace("▁", " ").removeprefix(" ")


def test_special_tokens_are_left_out():
    tokenizer = tokenizers()["bytes"]
    ids = tokenizer("ab")["input_ids"]
    assert "".join(stream(tokenizer, [1, ids[0], 2, ids[1], 2])[0]) == "ab"


@settings(max_examples=300)
@given(
    kind=st.sampled_from(["bytes", "trained"]),
    text=st.text("ab世 é", max_size=24),
    stop=st.lists(st.text("ab世 é", min_size=1, max_size=4), max_size=4),
)
@example(kind="bytes", text="aab", stop=["ab"])
@example(kind="trained", text=" abb", stop=[" abb", "b"])
def test_stop_strings_cut_wherever_tokens_end(kind, text, stop):
    tokenizer = tokenizers()[kind]
    ids = tokenizer(text)["input_ids"]
    assume(tokenizer.decode(ids) == text)
    pieces, stopped = stream(tokenizer, ids, stop)
    assert ("".join(pieces), stopped) == cut(text, stop)


def test_held_text_is_released():
    tokenizer = tokenizers()["bytes"]

    def pieces(text, *stop):
        return stream(tokenizer, tokenizer(text)["input_ids"], stop)

    assert pieces("abx", "abc") == (["", "", "abx", ""], False)
    assert pieces("aabc", "abc") == (["", "a", "", ""], True)
    assert pieces("xab", "abc") == (["x", "", "", "ab"], False)
    # Of overlapping ones the first to be complete counts, not the first to begin.
    assert pieces("abcd", "abcd", "bc") == (["", "", "a"], True)
    assert pieces("ab", "abc", "b") == (["", "a"], True)


def test_after_the_end_nothing_comes():
    text = TextStream(byte_tokenizer(), ["b"])
    ids = byte_tokenizer()("abc")["input_ids"]
    assert [text.push(token) for token in ids] == ["a", "", ""]
    assert text.stopped
    assert text.finish() == ""


def test_a_stop_string_may_come_with_the_end():
    # Half a character at the end becomes a replacement, and may complete a stop string.
    tokenizer = tokenizers()["bytes"]
    ids = tokenizer("a世")["input_ids"][:-1]
    assert stream(tokenizer, ids) == (["a", "", "", "\ufffd"], False)
    pieces, stopped = stream(tokenizer, ids, ["a\ufffd"])
    assert stopped
    assert "".join(pieces) == ""

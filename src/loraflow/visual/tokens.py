"""Tokens as text that can be shown anywhere."""

from __future__ import annotations

import unicodedata

from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token, such that together they are the text of all.

    Decoded alone, a token loses its leading space in some tokenizers, and is no text at all where it is one byte of a
    character: such tokens give "", and the last byte's token the character.
    """
    texts: list[str] = []
    shown, start = 0, 0
    for end in range(1, len(ids) + 1):
        before = str(tokenizer.decode(ids[shown:start]))
        text = str(tokenizer.decode(ids[shown:end]))[len(before) :]
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(text)
            shown, start = start, end
    return texts


def printable(token: str) -> str:
    """A token with its control characters spelled out; raw, they could do anything to a terminal or a page's text.

    Spaces of all kinds and the joiners that scripts and emoji need stay.
    """
    return "".join(
        c if c.isprintable() or c in "\n\u200c\u200d" or unicodedata.category(c) == "Zs" else repr(c)[1:-1]
        for c in token
    )

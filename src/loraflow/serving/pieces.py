"""What is wanted of a request's answers, and the pieces in which they come."""

from __future__ import annotations

from dataclasses import dataclass

from loraflow.serving.grammars import Grammar
from loraflow.serving.jobs import Token


@dataclass(frozen=True)
class Piece:
    """What one token brought to one of a request's answers.

    Attributes:
        index: which answer.
        text: the text that became known, which may be empty.
        token: the token; None for text that was held back until the end.
        finish: why it is the last piece; None where it is not.
        start: characters of the answer before the token's.
        prompt: the prompt's tokens, with the first piece of an answer that tells them.
    """

    index: int
    text: str
    token: Token | None
    finish: str | None = None
    start: int = 0
    prompt: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What is wanted of the answers to one prompt, by whichever endpoint.

    Attributes:
        started: when the request came, in seconds of a monotonic clock.
        max_tokens: the longest answer; None for what the server allows, 0 for nothing but the prompt.
        logprobs: how many of the likeliest tokens are told at each position, with the chosen one; None tells nothing.
        tells_prompt: whether the prompt's tokens are told in the same way.
        continues: whether the answers continue the prompt's text, where those to a conversation begin one.
        grammar: the form that they are to have.
    """

    started: float
    max_tokens: int | None = None
    logprobs: int | None = None
    tells_prompt: bool = False
    continues: bool = False
    grammar: Grammar | None = None

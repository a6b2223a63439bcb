"""Answers in OpenAI's form, with the fusion that made them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraflow.serving.asked import Asked
from loraflow.serving.auto import AUTO
from loraflow.serving.jobs import Token
from loraflow.serving.pieces import Piece
from loraflow.serving.protocol import Generation
from loraflow.serving.service import Service


@dataclass(frozen=True)
class Echo:
    """A prompt as it is shown before its answers.

    Attributes:
        starts: where each token's text begins in it.
    """

    text: str
    starts: Sequence[int]


@dataclass(frozen=True)
class Reply:
    """What all chunks of one answer share.

    Attributes:
        asked: the requests of which it is the answer; several where there are several prompts.
        created: when it began, in seconds since 1970.
        prompts: what each prompt is shown as, where answers begin with it.
        begun: the choices that have begun.
    """

    service: Service
    body: Generation
    asked: Sequence[Asked]
    prefix: str
    object: str
    created: int = field(default_factory=lambda: int(time.time()))
    prompts: Sequence[Echo] = ()
    begun: set[int] = field(default_factory=set)

    def head(self, *, chunk: bool = False) -> dict[str, Any]:
        """What every answer and every chunk begins with."""
        served = self.asked[0].served
        return {
            "id": f"{self.prefix}-{self.asked[0].id}",
            "object": f"{self.object}.chunk" if chunk and self.prefix == "chatcmpl" else self.object,
            "created": self.created,
            "model": served.id,
            "system_fingerprint": served.digest.removeprefix("sha256:")[:16],
            "fusion": self.service.fusion_of([asked.served for asked in self.asked]),
        }


def usage(reply: Reply) -> dict[str, int]:
    """OpenAI's count of tokens."""
    prompt = sum(len(asked.prompt) for asked in reply.asked)
    generated = sum(asked.generated for asked in reply.asked)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def chat_reply(reply: Reply, pieces: Sequence[Piece]) -> dict[str, Any]:
    """A whole answer to a conversation."""
    choices = []
    for index in range(len(reply.asked[0].jobs)):
        mine = [piece for piece in pieces if piece.index == index]
        message = {"role": "assistant", "content": "".join(piece.text for piece in mine)}
        choice = _choice(reply, 0, index, {"message": message}, mine, _chat_logprobs(reply, mine))
        choices.append(choice | _picks(reply, 0, index, mine, begins=True))
    return {**reply.head(), "choices": choices, "usage": usage(reply)}


def chat_chunk(reply: Reply, number: int, piece: Piece) -> dict[str, Any]:
    """A piece of it."""
    # Clients put the chunks of a message together, its role too.
    begins = piece.index not in reply.begun
    reply.begun.add(piece.index)
    delta = {"delta": {**({"role": "assistant"} if begins else {}), "content": piece.text}}
    choice = _choice(reply, number, piece.index, delta, [piece], _chat_logprobs(reply, [piece]))
    return {**reply.head(chunk=True), "choices": [choice | _picks(reply, number, piece.index, [piece], begins=begins)]}


def completion_reply(reply: Reply, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
    """Whole continuations of texts."""
    choices = []
    for number, of_prompt in enumerate(pieces):
        for index in range(len(reply.asked[number].jobs)):
            mine = [piece for piece in of_prompt if piece.index == index]
            choices.append(_completion_choice(reply, number, index, mine))
    return {**reply.head(), "choices": choices, "usage": usage(reply)}


def completion_chunk(reply: Reply, number: int, piece: Piece) -> dict[str, Any]:
    """A piece of one."""
    choice = _completion_choice(reply, number, piece.index, [piece])
    return {**reply.head(chunk=True), "choices": [choice]}


def _completion_choice(reply: Reply, number: int, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    answer, index = index, index + number * len(reply.asked[number].jobs)
    echo = reply.prompts[number] if reply.prompts else None
    begins, shown = index not in reply.begun, "" if echo is None else echo.text
    reply.begun.add(index)
    text = {"text": (shown if begins else "") + "".join(piece.text for piece in pieces)}
    choice = _choice(reply, number, index, text, pieces, _completion_logprobs(reply, pieces, echo))
    return choice | _picks(reply, number, answer, pieces, begins=begins)


def _choice(
    reply: Reply, number: int, index: int, said: Mapping[str, Any], pieces: Sequence[Piece], logprobs: Any
) -> dict[str, Any]:
    choice = {"index": index, **said, "finish_reason": pieces[-1].finish, "logprobs": logprobs}
    return choice | _weights(reply, number, pieces)


def _picks(reply: Reply, number: int, answer: int, pieces: Sequence[Piece], *, begins: bool) -> dict[str, Any]:
    """What `auto` picked, with the beginning of an answer; where each token is weighed, with its end."""
    asked = reply.asked[number]
    if asked.served.auto is None:
        return {}
    known = asked.jobs[0].weigher.picks is not None
    picks = asked.picks(answer) if (begins if known else pieces[-1].finish is not None) else None
    return {} if picks is None else {AUTO: picks.as_json()}


def _tokens(pieces: Sequence[Piece]) -> list[Token]:
    return [piece.token for piece in pieces if piece.token is not None]


def _weights(reply: Reply, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    wanted = reply.body.return_fusion_weights
    if not wanted:
        return {}
    served = reply.asked[number].served
    tokens = _tokens(pieces)
    return {
        "fusion_weights": {
            "adapters": list(served.adapters),
            "tokens": [reply.service.token_texts[token.id] for token in tokens],
            "weights": [reply.service.shown_weights(token, wanted) for token in tokens],
        }
    }


def _chat_logprobs(reply: Reply, pieces: Sequence[Piece]) -> dict[str, Any] | None:
    if not getattr(reply.body, "logprobs", False):
        return None

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = reply.service.token_texts[token]
        # A part of a character has no text of its own.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}
        for token in _tokens(pieces)
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(reply: Reply, pieces: Sequence[Piece], echo: Echo | None) -> dict[str, Any] | None:
    if getattr(reply.body, "logprobs", None) is None:
        return None
    prompt = next((piece.prompt for piece in pieces if piece.prompt), ())
    before = 0 if echo is None else len(echo.text)
    starts = [*(() if echo is None or not prompt else echo.starts)]
    starts += [before + piece.start for piece in pieces if piece.token is not None]
    tokens = [*prompt, *_tokens(pieces)]
    return {
        "tokens": [reply.service.token_texts[token.id] for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_likeliest(reply, token) for token in tokens],
        "text_offset": starts,
    }


def _likeliest(reply: Reply, token: Token) -> dict[str, float] | None:
    """The likeliest tokens at a place by their texts, and the one that is there; None where nothing says so."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for one, logprob in (*token.top, (token.id, token.logprob)):
        # Parts of characters look the same: the likeliest of them counts.
        text = reply.service.token_texts[one]
        found[text] = max(logprob, found.get(text, logprob))
    return found

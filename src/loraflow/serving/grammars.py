"""Answers that have the form that was asked for, held to it token by token by llguidance."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import importlib.util
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraflow.errors import LoraflowError
from loraflow.serving.forms import Form
from loraflow.serving.grammar_trial import Trial, build, reading_tokenizer
from loraflow.serving.turns import Turns, current_client, end_reading

# How long all tokens of one answer together may be waited for, beyond the steps of the model that they are found in.
_PATIENCE_S = 1.0
# How many bytes of grammars are kept, by what one has been measured to take at most for each of its characters.
_KEPT_BYTES = 2**26
_BYTES_A_CHARACTER, _LEAST_BYTES = 256, 2**15


class Constraint:
    """What one answer may go on with; for the engine's thread.

    The tokens that may follow are found in a thread of their own while the model runs.

    Args:
        matcher: llguidance's matcher, which is this answer's own.
        threads: where the next tokens are found.
    """

    def __init__(self, matcher: Any, threads: concurrent.futures.Executor) -> None:
        self._matcher = matcher
        self._threads = threads
        self._patience_s = _PATIENCE_S
        self._next = threads.submit(self._find)

    def limit(self, logits: Float[Tensor, " vocabulary"], ends: Sequence[int]) -> Float[Tensor, " vocabulary"]:
        """The logits, without those of tokens that may not follow.

        Args:
            logits: the model's.
            ends: tokens that end an answer, which may follow where it is whole.

        Raises:
            LoraflowError: if no token may follow, or they are not found in time.
        """
        started = time.monotonic()
        try:
            found = self._next.result(self._patience_s)
        except TimeoutError:
            raise LoraflowError(
                f"The form that was asked for takes more than {_PATIENCE_S:g} s to be held to. Ask for a simpler one."
            ) from None
        self._patience_s -= time.monotonic() - started
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[: len(found)] = torch.from_numpy(found[: len(logits)])
        whole = self._matcher.is_accepting()
        for end in ends:
            allowed[end] = whole
        if not allowed.any():
            reason = self._matcher.get_error().removesuffix("\n<non-verbose/>") or "no token of the model may follow"
            raise LoraflowError(f"The form that was asked for cannot be held to: {reason}. Ask for a simpler one.")
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def accept(self, token: int) -> bool:
        """Go on with a token that does not end the answer, and say whether nothing may follow it."""
        self._matcher.consume_token(token)
        if self._matcher.is_stopped():
            return True
        self._next = self._threads.submit(self._find)
        return False

    def _find(self) -> Bool[np.ndarray, " vocabulary"]:
        return np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little").astype(bool)


@dataclass(frozen=True)
class Grammar:
    """A grammar that can be held to.

    Attributes:
        matcher: at its start; answers have copies of it.
    """

    matcher: Any
    threads: concurrent.futures.Executor

    def constraint(self) -> Constraint:
        """That of another answer."""
        return Constraint(self.matcher.deep_copy(), self.threads)


class Grammars:
    """The grammars of one server, built one at a time, each client in its turn, and kept while there is room.

    Args:
        tokenizer: the tokenizer that answers are of.
        vocabulary: size of the model's vocabulary.
        answers: how many answers may be in a step.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, answers: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._threads = concurrent.futures.ThreadPoolExecutor(answers, "loraflow-grammar")
        self._turns = Turns()
        self._one_at_a_time = threading.Lock()
        self._reading: Any = None
        self._trial: Trial | None = None
        # What cannot be built is kept too, with the reason.
        self._kept: OrderedDict[tuple[str, str], Grammar | str] = OrderedDict()

    def close(self) -> None:
        """Build nothing more."""
        with self._one_at_a_time:
            if self._trial is not None:
                self._trial.close()
        self._threads.shutdown(wait=False)

    async def find(self, form: Form) -> Grammar:
        """The grammar of a form.

        Raises:
            LoraflowError: if it cannot be had.
        """
        found = self._kept.get((form.kind, form.content))
        if found is None:
            await end_reading()
            async with self._turns.turn(current_client()):
                found = await asyncio.to_thread(self._build, form)
        if isinstance(found, str):
            raise LoraflowError(f"`{form.param}` cannot be held to: {found}. Ask for another form.")
        return found

    def _build(self, form: Form) -> Grammar | str:
        with self._one_at_a_time:
            key = (form.kind, form.content)
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            trial = self._started(form)
            found: Grammar | str
            try:
                trial.check(*key)
                found = Grammar(build(self._reading, *key), self._threads)
            except LoraflowError as error:
                found = str(error)
            self._kept[key] = found
            while sum(map(_bytes_of, self._kept)) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            return found

    def _started(self, form: Form) -> Trial:
        if self._trial is None:
            if importlib.util.find_spec("llguidance") is None:
                raise LoraflowError(f"`{form.param}` needs llguidance: pip install 'loraflow[schema]'")
            settings = _settings(self._tokenizer, self._vocabulary, form)
            self._reading = reading_tokenizer(settings)
            self._trial = Trial(settings)
        return self._trial


def _bytes_of(key: tuple[str, str]) -> int:
    return _LEAST_BYTES + _BYTES_A_CHARACTER * len(key[1])


def _settings(tokenizer: PreTrainedTokenizerBase, vocabulary: int, form: Form) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LoraflowError(
            f"`{form.param}` needs a fast tokenizer, and {type(tokenizer).__name__} is none. Leave it out, or start "
            "the server with --engine vllm."
        )
    backend = copy.copy(backend)
    backend.no_padding()
    backend.no_truncation()
    size = max(vocabulary, len(tokenizer))
    return {"tokenizer": backend.to_str(), "n_vocab": size, "eos_token": tokenizer.eos_token_id}

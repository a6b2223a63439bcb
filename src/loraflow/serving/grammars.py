"""Answers that have the form that was asked for, held to it token by token by llguidance."""

from __future__ import annotations

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
from loraflow.serving.grammar_trial import GivenUpError, Trial, build, reading_tokenizer
from loraflow.serving.turns import Turns, counted_as_reading, current_client, end_reading, work_in

# How long one token may be waited for, and the time of a processor that all of an answer's may take of others'.
_PATIENCE_S = 1.0
# How many bytes of grammars are kept; what one takes is guessed, generously, by its characters.
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
            found, spent_s = self._next.result(_PATIENCE_S)
            # On a busy machine the threads wait too, and that is no fault of the form.
            self._patience_s -= min(spent_s, time.monotonic() - started)
        except TimeoutError:
            self._patience_s = -1
        if self._patience_s < 0:
            raise LoraflowError(
                f"The form that was asked for takes more than {_PATIENCE_S:g} s to be held to. Ask for a simpler one."
            )
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[: len(found)] = torch.from_numpy(found[: len(logits)])
        whole = self._matcher.is_accepting()
        for end in ends:
            allowed[end] = whole
        if not allowed.any():
            raise LoraflowError(self._failed())
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def _failed(self) -> str:
        reason = self._matcher.get_error().removesuffix("\n<non-verbose/>") or "no token of the model may follow"
        return f"The form that was asked for cannot be held to: {reason}. Ask for a simpler one."

    def accept(self, token: int) -> bool:
        """Go on with a token that does not end the answer, and say whether nothing may follow it.

        Raises:
            LoraflowError: if the form cannot be held to any further.
        """
        taken = self._matcher.consume_token(token)
        if not taken or self._matcher.is_error():
            raise LoraflowError(self._failed())
        if self._matcher.is_stopped():
            return True
        self._next = self._threads.submit(self._find)
        return False

    def _find(self) -> tuple[Bool[np.ndarray, " vocabulary"], float]:
        started = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little").astype(bool), time.thread_time() - started


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


class _Kept:
    """What was built, and of what cannot be the reason, as long as there is room; for all threads."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, str], Grammar | str] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: tuple[str, str]) -> Grammar | str | None:
        """What was found for a form, which is used now; None where nothing is kept of it."""
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
            return found

    def store(self, key: tuple[str, str], found: Grammar | str) -> None:
        """Keep it, and give up what was not used for longest."""
        with self._lock:
            if key not in self._found:
                self._bytes += _bytes_of(key)
            self._found[key] = found
            while self._bytes > _KEPT_BYTES:
                self._bytes -= _bytes_of(self._found.popitem(last=False)[0])


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
        # Of its own, so that nothing else waits for a thread that builds.
        self._builder = concurrent.futures.ThreadPoolExecutor(1, "loraflow-forms")
        self._turns = Turns()
        self._one_at_a_time = threading.Lock()
        self._reading: Any = None
        self._trial: Trial | None = None
        self._kept = _Kept()

    def close(self) -> None:
        """Build nothing more."""
        with self._one_at_a_time:
            if self._trial is not None:
                self._trial.close()
        self._threads.shutdown(wait=False)
        self._builder.shutdown(wait=False)

    async def find(self, form: Form) -> Grammar:
        """The grammar of a form.

        Raises:
            LoraflowError: if it cannot be had.
        """
        found = self._kept.get((form.kind, form.content))
        if found is None:
            await end_reading()
            async with self._turns.turn(current_client()):
                with counted_as_reading():
                    found = await work_in(self._builder, self._build, form)
        if isinstance(found, str):
            raise LoraflowError(f"`{form.param}` cannot be held to: {found}. Ask for another form.")
        return found

    def _build(self, form: Form) -> Grammar | str:
        with self._one_at_a_time:
            key = (form.kind, form.content)
            found = self._kept.get(key)
            if found is not None:
                return found
            trial = self._started(form)
            try:
                trial.check(*key)
                found = Grammar(build(self._reading, *key), self._threads)
            except GivenUpError as error:
                # Another time there may be less to do.
                return str(error)
            except LoraflowError as error:
                found = str(error)
            self._kept.store(key, found)
            return found

    def _started(self, form: Form) -> Trial:
        if self._trial is None:
            if importlib.util.find_spec("llguidance") is None:
                raise LoraflowError(f"`{form.param}` needs llguidance: pip install 'loraflow[schema]'")
            settings = _settings(self._tokenizer, self._vocabulary, form)
            try:
                self._reading = reading_tokenizer(settings)
            except ValueError as error:
                raise LoraflowError(
                    f"`{form.param}` needs a tokenizer that llguidance reads, which this one is not ({error}). Leave "
                    "it out, or start the server with --engine vllm."
                ) from error
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

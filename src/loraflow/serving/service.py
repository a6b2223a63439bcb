"""From a request to its answers: who weighs it, what it may ask for, and how its tokens come back."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from loraflow.answers import require_tokenizer
from loraflow.endings import Endings
from loraflow.errors import LoraflowError
from loraflow.serving.accounts import Accounts
from loraflow.serving.asked import Asked
from loraflow.serving.auto import AUTO
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import ServerConfig
from loraflow.serving.engine import Engine
from loraflow.serving.grammars import Grammar, Grammars
from loraflow.serving.jobs import Failure, Job, Sampling, Token, Weigher
from loraflow.serving.metrics import Metrics
from loraflow.serving.picking import MeanWeights
from loraflow.serving.pieces import Piece, Wanted
from loraflow.serving.protocol import ApiError, AutoChoice, Generation
from loraflow.serving.reading import Reader
from loraflow.serving.served import Served
from loraflow.serving.text import TextStream, TokenTexts
from loraflow.serving.tracing import Tracing
from loraflow.serving.turns import current_client


def find_model(catalog: Catalog, name: str, param: str = "model") -> Served:
    """A model by its name.

    Raises:
        ApiError: if there is none; the message lists those that there are.
    """
    try:
        return catalog.find(name)
    except LoraflowError as error:
        raise ApiError(404, str(error), param=param, code="model_not_found") from error


class Service:
    """One engine, made by `start`, and what it offers."""

    engine: Engine

    def __init__(self, catalog: Catalog, config: ServerConfig | None = None, tracing: Tracing | None = None) -> None:
        self.catalog = catalog
        self.config = config or ServerConfig()
        self.started = self.closing = False
        self._stopping: asyncio.Task[None] | None = None
        self.tokenizer = require_tokenizer(catalog.model.tokenizer)
        self.token_texts = TokenTexts(self.tokenizer)
        self.reader = Reader(self.tokenizer, self.longest)
        self.grammars = Grammars(self.tokenizer, self._vocabulary, self.config.max_waiting)
        self.metrics = Metrics(catalog.base_id, self.longest)
        endpoint = self.config.otlp_traces_endpoint
        self.tracing = Tracing.to(endpoint) if tracing is None and endpoint is not None else tracing
        text_of = self.tokenizer.decode if self.config.log_prompts else None
        self.accounts = Accounts(self.metrics, self.tracing, lambda: catalog.served, text_of)

    def start(self) -> None:
        """Start the engine."""
        self.engine = Engine(self.catalog.model, self.config.limits)
        self.metrics.watch(self.engine)
        self.started = True

    async def stop(self) -> None:
        """Take no new requests, let the running ones finish for a while, and end the engine; once, whoever asks."""
        self.closing = True
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        until = time.monotonic() + self.config.drain_s
        while self.engine.running and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.engine.close, finish=False)
        self.reader.close()
        await asyncio.to_thread(self.grammars.close)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    @property
    def unready(self) -> str | None:
        """Why no requests are taken; None where they are."""
        if self.closing:
            return "shutting down"
        return self.engine.failure if self.started else "loading"

    @property
    def _cut(self) -> str:
        return (
            f"The server is shutting down, and the answer was not finished in the {self.config.drain_s:g} s that it "
            "still had. Ask again."
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer together."""
        config = self.catalog.model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None) or self.config.limits.cache_tokens
        return int(min(positions, self.config.limits.cache_tokens))

    @property
    def _vocabulary(self) -> int:
        return int(self.catalog.model.config.get_text_config(decoder=True).vocab_size)

    # What a request asks for.

    async def find_grammar(self, body: Generation) -> Grammar | None:
        """The form that a request's answers are to have.

        Raises:
            ApiError: if they cannot be held to it.
        """
        try:
            form = body.form()
            return None if form is None else await self.grammars.find(form)
        except LoraflowError as error:
            param = "response_format" if body.structured_outputs is None else "structured_outputs"
            raise ApiError(400, str(error), param=param) from error

    async def find(self, body: Generation) -> Served:
        """Who answers a request, as `served_for` finds it; directions of adapters, say, take a while."""
        simple = body.fusion is None and body.model != AUTO
        return await (self.reader.do if simple else self.reader.weigh)(self.served_for, body)

    async def read_conversation(self, served: Served, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation's tokens in a model's prompt format; one that is far too long is refused by its beginning.

        Raises:
            ApiError: if it is too long, or the format does not take it.
        """
        if len(messages) > self.longest:
            message = f"The conversation has {len(messages)} messages, and prompt and answer together may have "
            raise ApiError(400, f"{message}{self.longest} tokens. Send fewer.", param="messages")
        await self.reader.check_length(await self.reader.do(self._prompt_text, served, messages))
        return await self.reader.do(self.prompt_ids, served, messages)

    def served_for(self, body: Generation) -> Served:
        """Who answers a request.

        Raises:
            ApiError: if there is no such model, or the weights or the method that it asks for cannot be had.
        """
        served = find_model(self.catalog, body.model)
        if served.auto is not None:
            return self._picking_for(served, body)
        if body.auto is not None:
            message = f"`auto` is for the model {AUTO!r}, and {body.model!r} is asked. Ask that one, or leave it out."
            raise ApiError(400, message, param="auto")
        if body.adapter_weights is not None and body.fusion is not None:
            message = "`adapter_weights` and `fusion` exclude each other. Give one of them."
            raise ApiError(400, message, param="adapter_weights")
        try:
            if body.adapter_weights is not None:
                return self.catalog.with_weights(served, body.adapter_weights)
            if body.fusion is not None:
                return self.catalog.with_method(served, body.fusion.method, body.fusion.options)
        except (LoraflowError, TypeError) as error:
            self._check_named(served)
            param = "adapter_weights" if body.adapter_weights is not None else "fusion"
            raise ApiError(400, str(error), param=param) from error
        return served

    def _picking_for(self, served: Served, body: Generation) -> Served:
        """What picks adapters for a request to `auto`.

        Raises:
            ApiError: if the request says the weights itself, or what it asks for cannot be had.
        """
        if body.adapter_weights is not None:
            message = f"`adapter_weights` says what {AUTO!r} is there to find. Ask for the base, or leave them out."
            raise ApiError(400, message, param="adapter_weights")
        wish = body.auto or AutoChoice()
        method = None if body.fusion is None else (body.fusion.method, body.fusion.options)
        try:
            return self.catalog.with_picks(served, wish.adapters, wish.top_k, wish.floor, method)
        except (LoraflowError, TypeError) as error:
            raise ApiError(400, str(error), param=AUTO if method is None else "fusion") from error

    def prompt_ids(self, served: Served, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation in a model's prompt format.

        Raises:
            ApiError: if the format does not take it.
        """
        try:
            return served.prompt.prompt_ids(self.tokenizer, [dict(message) for message in messages])
        except LoraflowError as error:
            raise ApiError(400, str(error), param="messages") from error

    def _prompt_text(self, served: Served, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return served.prompt.prompt_text(self.tokenizer, [dict(message) for message in messages])
        except LoraflowError as error:
            raise ApiError(400, str(error), param="messages") from error

    async def ask(self, body: Generation, served: Served, prompt: Sequence[int], wanted: Wanted) -> Asked:
        """Check a request, and hand it to the engine; `pieces` gives its answers.

        Raises:
            ApiError: if it asks for too much, or the server has too much to do.
        """
        stages = self.accounts.open(served)
        limit = self.check_prompt(prompt, wanted.max_tokens)
        self._admit(body.n)
        if not served.gates and body.return_fusion_weights:
            raise ApiError(400, "The base has no fusion weights. Ask for a fusion.", param="return_fusion_weights")
        endings = self._endings(served, body)
        served, weigher = await self._weigh(body, served, prompt)
        # Nothing is awaited from here on: what was found is what the engine takes.
        self._admit(body.n)
        name = uuid.uuid4().hex
        events: asyncio.Queue[tuple[int, Token | Failure]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        jobs = []
        for index in range(body.n):

            def listen(event: Token | Failure, index: int = index) -> None:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            seed = None if body.seed is None else (body.seed + index) % 2**63
            sampling = Sampling(body.temperature, body.top_p, seed, wanted.logprobs)
            # Whom a method of tokens picks is known by what it weighed.
            wants = bool(body.return_fusion_weights) or (served.auto is not None and weigher.picks is None)
            job = Job(f"{name}-{index}", prompt, weigher, sampling, max(limit, 1), endings.token_ids, wants, listen)
            job.client = current_client()
            job.tells_prompt = wanted.tells_prompt
            job.prefix = weigher.prefix(body.cache_salt)
            job.constraint = None if wanted.grammar is None else wanted.grammar.constraint()
            jobs.append(job)
        before = prompt if wanted.continues else ()
        streams = [TextStream(self.tokenizer, endings.texts, before) for _ in jobs]
        stages.weighed = time.monotonic()
        asked = Asked(name, served, list(prompt), jobs, streams, events, wanted.started, stages)
        asked.only_prompt, asked.tells_weights = limit == 0, bool(body.return_fusion_weights)
        try:
            for job in jobs:
                self.engine.submit(job)
        except LoraflowError as error:
            self.cancel(asked)
            raise ApiError(503, str(error), kind="server_error") from error
        return asked

    async def _weigh(self, body: Generation, served: Served, prompt: Sequence[int]) -> tuple[Served, Weigher]:
        """Who weighs a prompt, of what is offered once that is known: others may have come or left meanwhile.

        Where they did, and the model that the request named is what it was, the request is as one that came later.

        Raises:
            ApiError: if that model was unloaded, or the prompt cannot be weighed.
        """
        while True:
            try:
                passes = served.method.reads_prompt
                do = self.reader.weigh if passes else asyncio.to_thread
                weigher = await do(self.catalog.weigher, served, prompt)
                if self.catalog.is_current(served):
                    return served if weigher.picks is None else served.among(weigher.adapters or ()), weigher
            except LoraflowError as error:
                if self.catalog.is_current(served):
                    raise ApiError(400, str(error), param="fusion") from error
            self._check_named(served)
            served = await self.find(body)

    def cancel(self, asked: Asked) -> None:
        """Take a request's answers out of the engine, where they are not finished."""
        for job in asked.jobs:
            self.engine.cancel(job.id)

    def end(self, asked: Asked) -> None:
        """Take a request out of the engine for good, and count it, once."""
        self.cancel(asked)
        if not asked.ended:
            asked.ended = True
            self.accounts.close(asked)

    def check_prompt(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """Check a prompt's tokens, and give how many may follow them.

        Raises:
            ApiError: if there are none or too many, or one is none of the model's.
        """
        limit = self._new_tokens(len(prompt), max_tokens)
        for token in prompt:
            if not 0 <= token < self._vocabulary:
                message = f"The prompt has the token {token}; tokens are from 0 to {self._vocabulary - 1}."
                raise ApiError(400, message, param="prompt")
        return limit

    def _new_tokens(self, prompt: int, max_tokens: int | None) -> int:
        if not prompt:
            raise ApiError(400, "The prompt has no tokens. Give some text.", param="prompt")
        room = self.longest - prompt
        if max_tokens == 0 and room >= 0 and prompt < self.config.limits.cache_tokens:
            return 0
        if room < 1:
            raise ApiError(
                400,
                f"The prompt has {prompt} tokens, and prompt and answer together may have {self.longest}. Shorten it.",
                param="messages",
                code="context_length_exceeded",
            )
        if max_tokens is None:
            return min(room, self.config.max_new_tokens)
        if max_tokens > min(room, self.config.max_new_tokens):
            raise ApiError(
                400,
                f"`max_tokens` (={max_tokens}) must be at most {min(room, self.config.max_new_tokens)}: the prompt has "
                f"{prompt} tokens, prompt and answer together may have {self.longest}, and an answer "
                f"{self.config.max_new_tokens}.",
                param="max_tokens",
            )
        return max_tokens

    def _admit(self, answers: int) -> None:
        if self.closing:
            raise ApiError(503, "The server is shutting down.", kind="server_error")
        if self.engine.failure is not None:
            raise ApiError(503, f"The engine has ended: {self.engine.failure}", kind="server_error")
        waiting = self.engine.running
        if waiting + answers > self.config.max_waiting:
            self.metrics.refused.inc()
            raise ApiError(
                429,
                f"The server has {waiting} answers to give, and takes at most {self.config.max_waiting}. Try again "
                "later.",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def _check_named(self, served: Served) -> None:
        if not self.catalog.is_named(served):
            message = f"{served.id!r}, or an adapter of its, was unloaded. Ask for another model."
            raise ApiError(404, message, param="model", code="model_not_found")

    def _endings(self, served: Served, body: Generation) -> Endings:
        """The ends of a request's answers: its model's, and its own."""
        try:
            return served.endings.and_stop(body.stops, self.tokenizer)
        except LoraflowError as error:
            raise ApiError(400, str(error), param="stop") from error

    # Its answers.

    async def pieces(self, asked: Asked) -> AsyncIterator[Piece]:
        """Generate a request's answers, piece by piece; who stops listening cancels it.

        Yields:
            What each token brought, as it comes; the answers' pieces are mixed.

        Raises:
            ApiError: if it takes too long, or the engine fails.
        """
        open_answers = set(range(len(asked.jobs)))
        try:
            async with asyncio.timeout(self.config.timeout_s):
                while open_answers:
                    index, event = await asked.events.get()
                    if index not in open_answers:
                        continue
                    if isinstance(event, Failure) and event.asked_for:
                        raise ApiError(400, event.message)
                    if isinstance(event, Failure) and self.closing:
                        raise ApiError(503, self._cut, kind="server_error", code="shutting_down")
                    if isinstance(event, Failure):
                        raise ApiError(500, f"The engine failed: {event.message}", kind="server_error")
                    for piece in self._pieces_of(asked, index, event):
                        if piece.finish is not None:
                            open_answers.discard(index)
                            asked.stages.finishes[index] = piece.finish
                        yield piece
        except TimeoutError as error:
            asked.outcome = "timeout"
            message = f"The request took longer than {self.config.timeout_s:g} s. Ask for a shorter answer."
            raise ApiError(504, message, kind="server_error", code="timeout") from error
        except Exception as error:
            asked.outcome = "invalid" if isinstance(error, ApiError) and error.status < 500 else "failed"
            raise
        finally:
            if not open_answers:
                asked.outcome = "finished"
            self.end(asked)

    def _pieces_of(self, asked: Asked, index: int, token: Token) -> list[Piece]:
        if asked.only_prompt:
            # The engine has no requests without a token, and this one is nobody's.
            return [Piece(index, "", None, "length", prompt=token.prompt)]
        self.accounts.add_token(asked, index, token)
        if asked.served.auto is not None and token.weights is not None:
            asked.noted.setdefault(index, MeanWeights()).add(token.weights)
        stream = asked.streams[index]
        start = stream.length
        text = "" if token.id in asked.jobs[index].ends else stream.push(token.id)
        if stream.stopped:
            self.engine.cancel(asked.jobs[index].id)
            return [Piece(index, text, token, "stop", start, token.prompt)]
        if token.finish is None:
            return [Piece(index, text, token, None, start, token.prompt)]
        rest = stream.finish()
        return [Piece(index, text + rest, token, "stop" if stream.stopped else token.finish, start, token.prompt)]

    def fusion_of(self, served: Sequence[Served]) -> dict[str, Any]:
        """What an answer says of the fusion that made it; prompts differ in the adapters that were picked for them."""
        return {
            "model": served[0].id,
            "method": served[0].method.name,
            "parameters": served[0].method.parameters(),
            "adapters": list(dict.fromkeys(name for one in served for name in one.adapters)),
            "digest": served[0].digest,
        }

    def shown_weights(self, token: Token, wanted: bool | str) -> Any:
        """A token's weights as a request wants them, of its own adapters: `[adapters]`, or for "all" those by layer."""
        if token.weights is None:
            return None
        weights: Tensor = token.weights.float()
        if wanted == "all":
            return [[round(w, 5) for w in layer] for layer in weights.tolist()]
        return [round(w, 5) for w in weights.mean(dim=0).tolist()]

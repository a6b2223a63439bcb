"""The HTTP server: OpenAI's endpoints over one `Service`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import reprlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from loraflow import __version__
from loraflow.serving.admin import Admin
from loraflow.serving.asked import Asked, Outcome
from loraflow.serving.intake import Entrance, Intake
from loraflow.serving.keys import LOAD, UNLOAD, check_caller
from loraflow.serving.observed import Observed
from loraflow.serving.page import make_page
from loraflow.serving.pieces import Piece, Wanted
from loraflow.serving.protocol import ApiError, ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from loraflow.serving.replies import Echo, Reply, chat_chunk, chat_reply, completion_chunk, completion_reply, usage
from loraflow.serving.served import Served
from loraflow.serving.service import Service, find_model
from loraflow.serving.text import show_prompt
from loraflow.serving.turns import end_reading, let_others_go_first

log = logging.getLogger("loraflow.serving")

_CHAT, _COMPLETIONS = _ASKING = ("/v1/chat/completions", "/v1/completions")
# With OpenTelemetry's names of what is asked there.
_TRACED = {_CHAT: "chat", _COMPLETIONS: "text_completion"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}},
    }
    for status, text in (
        (400, "The request is wrong"),
        (401, "The key is missing or wrong"),
        (403, "It is not allowed"),
        (404, "There is no such model"),
        (413, "The request is too large"),
        (429, "The queue is full"),
        (503, "The server is shutting down"),
        (504, "The request took too long"),
    )
}


def make_app(service: Service) -> FastAPI:
    """The server of a service, which starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = _App(title="loraflow", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Intake, service=service, refuse=_error_response, paths=_ASKING)
    app.add_middleware(_Guard, service=service)
    _add_errors(app)
    _add_information(app, service)
    _add_generation(app, service)
    _add_admin(app, service)
    _add_page(app)
    return app


class _App(FastAPI):
    """Has its requests observed from outside of everything, errors that nobody expected included."""

    def build_middleware_stack(self) -> ASGIApp:
        """Starlette's layers, and one around them."""
        service: Service = self.state.service
        handlers = {path for route in self.routes if "{" not in (path := getattr(route, "path", "{"))}
        return Observed(super().build_middleware_stack(), service.metrics, service.tracing, handlers, _TRACED)


class _Guard:
    """Refuses requests before they are read. Starlette's own kind of middleware would hide that a client goes away."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._entrance = Entrance(service.reader, service.metrics, _error_response)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            try:
                check_caller(request, self._service.config)
                _check_size(request, self._service.config.max_body_bytes)
            except ApiError as error:
                await self._entrance.answer_shortly(_error_response(error), scope, receive, send)
                return
        await self._app(scope, receive, send)


def _check_size(request: Request, limit: int) -> None:
    length = request.headers.get("content-length")
    # A body in chunks may be of any size, whatever length is said beside it.
    if request.headers.get("transfer-encoding"):
        raise ApiError(411, "The request comes in chunks. Send it whole, with a Content-Length.")
    if length is not None and (not length.isdecimal() or int(length) > limit):
        raise ApiError(413, f"The request has {length} bytes, and may have {limit}. Send less.")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return _error_response(error)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.scope["path"], exc_info=error)
        return _error_response(ApiError(500, f"The server failed: {type(error).__name__}.", kind="server_error"))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            message = f"The body is no valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}."
            return _error_response(ApiError(400, message))
        place = [str(part) for part in first["loc"] if part != "body"]
        param = ".".join(place) or None
        if first["type"] == "extra_forbidden":
            return _error_response(ApiError(400, f"`{param}` is unknown or not supported. Leave it out.", param=param))
        if first["type"] == "not_supported":
            message = f"`{param}` (={reprlib.repr(first['input'])}) {first['msg']}."
            return _error_response(ApiError(400, message, param=param))
        if first["type"] == "value_error":
            # Those of our own say what was found, and what to do.
            return _error_response(ApiError(400, f"`{param or 'body'}`: {first['ctx']['error']}", param=param))
        found = "" if first["type"] == "missing" else f", found {reprlib.repr(first['input'])}"
        return _error_response(ApiError(400, f"`{param or 'body'}`: {first['msg']}{found}.", param=param))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 404:
            message += ". Endpoints that vLLM has beyond these are there with --engine vllm."
        return _error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


def _error_response(error: ApiError) -> Response:
    # What was wrong is quoted, and may be no valid text: half of a surrogate pair in a field's name.
    error.message = error.message.encode(errors="backslashreplace").decode()
    error.param = error.param and error.param.encode(errors="backslashreplace").decode()
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the server lives; one that does not is to be started anew."""
        failure = service.engine.failure if service.started else None
        return JSONResponse({"status": failure or "ok"}, status_code=503 if failure else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether the server takes requests."""
        reason = service.unready
        return JSONResponse({"status": reason or "ok"}, status_code=503 if reason else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> dict[str, Any]:
        """The base, each adapter, and each fusion."""
        return {"object": "list", "data": [_card(service, served) for served in service.catalog.served.values()]}

    @app.get("/v1/models/{name:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]})
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _card(service, find_model(service.catalog, name))


def _card(service: Service, served: Served) -> dict[str, Any]:
    return {
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "loraflow",
        "root": served.root,
        "parent": served.parent,
        "kind": served.kind,
        "adapters": list(service.catalog.adapters_of(served)),
        "method": served.method.name,
        "digest": served.digest,
        "max_model_len": service.longest,
    }


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post(_CHAT, responses=_ERRORS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        started = time.monotonic()
        served = await service.find(body)
        messages = [{"role": message.turn, "content": message.text} for message in body.messages]
        if messages[-1]["role"] != "user":
            raise ApiError(400, "The conversation must end with the user's turn.", param="messages")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "`top_logprobs` needs `logprobs`. Set it to true.", param="top_logprobs")
        longest = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        wanted = (body.top_logprobs or 0) if body.logprobs else None
        prompt = await service.read_conversation(served, messages)
        grammar = await service.find_grammar(body)
        asked = await service.ask(body, served, prompt, Wanted(started, longest, wanted, grammar=grammar))
        await end_reading()
        reply = Reply(service, body, [asked], "chatcmpl", "chat.completion")
        if body.stream:
            return _stream(service, reply, chat_chunk)
        return JSONResponse(chat_reply(reply, (await _gather(service, request, [asked]))[0]))

    @app.post(_COMPLETIONS, responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        started = time.monotonic()
        served = await service.find(body)
        if body.best_of is not None and body.best_of != body.n:
            raise ApiError(400, f"`best_of` (={body.best_of}) is not supported. Leave it out.", param="best_of")
        prompts = await _prompts(service, body)
        echoes = await _echoes(service, body, prompts) if body.echo else []
        tells_prompt = body.echo and body.logprobs is not None
        grammar = await service.find_grammar(body)
        wanted = Wanted(started, body.max_tokens, body.logprobs, tells_prompt, continues=True, grammar=grammar)
        asked: list[Asked] = []
        try:
            for prompt in prompts:
                await let_others_go_first()
                asked.append(await service.ask(body, served, prompt, wanted))
        except BaseException as error:
            for one in asked:
                one.outcome = _outcome_beside(error)
                service.end(one)
            raise
        await end_reading()
        reply = Reply(service, body, asked, "cmpl", "text_completion", prompts=echoes)
        if body.stream:
            return _stream(service, reply, completion_chunk)
        return JSONResponse(completion_reply(reply, await _gather(service, request, asked)))


def _add_admin(app: FastAPI, service: Service) -> None:
    admin = Admin(service)
    errors: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (400, 401, 403, 404, 413)}

    @app.post(LOAD, responses=errors)
    async def load(body: LoadRequest) -> dict[str, Any]:
        """Offer another adapter, or another saved fusion."""
        return _card(service, await admin.load(body.lora_name, body.lora_path))

    @app.post(UNLOAD, responses=errors)
    async def unload(body: UnloadRequest) -> dict[str, Any]:
        """Offer one no longer."""
        await admin.unload(body.lora_name)
        return {"id": body.lora_name, "object": "model", "deleted": True}


def _add_page(app: FastAPI) -> None:
    page = make_page()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        """The page to chat on; it has no secrets, and so needs no key."""
        return HTMLResponse(page.html, headers=page.headers)


def _given(body: CompletionRequest) -> list[Any]:
    """The prompts, each text or tokens."""
    given: Any = body.prompt
    return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


async def _echoes(service: Service, body: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[Echo]:
    """The prompts as they are shown, others being read between them."""
    echoes = []
    for given, ids in zip(_given(body), prompts, strict=True):
        await let_others_go_first()
        service.check_prompt(ids, body.max_tokens)
        text = given if isinstance(given, str) else None
        echoes.append(Echo(*await service.reader.do(show_prompt, service.tokenizer, text, ids)))
    return echoes


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    """The prompts' token ids; text is taken as it is, in no chat format."""
    given = _given(body)
    if not given:
        raise ApiError(400, "`prompt` is empty. Give text, or token ids.", param="prompt")
    if len(given) * body.n > service.config.max_waiting:
        message = f"{len(given)} prompts times n={body.n} are more than the server takes."
        raise ApiError(400, message, param="prompt")
    return [await service.reader.ids(one) if isinstance(one, str) else list(one) for one in given]


def _outcome_beside(error: BaseException) -> Outcome:
    """How prompts end that were taken, where another one of their request was not."""
    if isinstance(error, ApiError) and error.status < 500:
        return "refused"
    return "failed" if isinstance(error, Exception) else "cancelled"


async def _gather(service: Service, request: Request, asked: Sequence[Asked]) -> list[list[Piece]]:
    """All pieces of each request; where one fails, or their client goes away, all are given up."""
    found: list[list[Piece]] = [[] for _ in asked]
    async with contextlib.aclosing(_pieces(service, asked, request)) as pieces:
        async for number, piece in pieces:
            found[number].append(piece)
    return found


async def _pieces(
    service: Service, asked: Sequence[Asked], client: Request | None = None
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all prompts' answers as they come, each with the number of its prompt.

    Args:
        service: what answers.
        asked: the prompts.
        client: who may go away; where the answer is streamed, Starlette looks after that.

    Yields:
        Number and piece.

    Raises:
        ApiError: if one of them fails, or takes too long.
    """
    arrived: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def collect(number: int) -> None:
        end: Exception | None = None
        try:
            async for piece in service.pieces(asked[number]):
                arrived.put_nowait((number, piece))
        except Exception as error:
            end = error
        arrived.put_nowait((number, end))

    async def watch(client: Request) -> None:
        while not await client.is_disconnected():
            await asyncio.sleep(0.5)
        arrived.put_nowait((0, ApiError(499, "The client has gone away.")))

    work = [asyncio.ensure_future(collect(number)) for number in range(len(asked))]
    work += [] if client is None else [asyncio.ensure_future(watch(client))]
    unfinished = len(asked)
    try:
        while unfinished:
            number, found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                unfinished -= 1
            else:
                yield number, found
    finally:
        await _end(work, asked)


async def _end(work: Sequence[asyncio.Future[Any]], asked: Sequence[Asked]) -> None:
    """Give up what still works on a request; where one of its prompts ended it, that is how the others end too."""
    reason = next((one.outcome for one in asked if one.outcome not in ("finished", "cancelled")), None)
    for one in asked:
        if reason is not None and not one.ended:
            one.outcome = reason
    for future in work:
        future.cancel()
    await asyncio.gather(*work, return_exceptions=True)


Chunk = Callable[[Reply, int, Piece], Mapping[str, Any]]


class _EventStream(StreamingResponse):
    """A stream that leaves nothing in the engine, however it ends: also where it is given up before it began."""

    def __init__(self, service: Service, reply: Reply, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._service = service
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for asked in self._reply.asked:
                self._service.end(asked)


def _stream(service: Service, reply: Reply, chunk: Chunk) -> Response:
    """Server-sent events: a chunk for each piece, on request the usage, and `[DONE]`."""

    async def events() -> AsyncIterator[str]:
        try:
            async with contextlib.aclosing(_pieces(service, reply.asked)) as pieces:
                async for number, piece in pieces:
                    yield _event(chunk(reply, number, piece))
            options = reply.body.stream_options
            if options is not None and options.include_usage:
                yield _event({**reply.head(chunk=True), "choices": [], "usage": usage(reply)})
        except ApiError as error:
            # The status is sent already; the error comes as an event, as OpenAI's server sends it.
            yield _event(error.body())
        yield "data: [DONE]\n\n"

    return _EventStream(service, reply, events())


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

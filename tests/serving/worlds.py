"""What the serving tests share: requests for the engine, and what `FusedModel.generate` answers to the same."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import uvicorn

from loraflow import FusedModel, Method
from loraflow.methods import QueryMethod
from loraflow.serving.app import make_app
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from loraflow.serving.engine import Engine
from loraflow.serving.http import http_config
from loraflow.serving.jobs import Failure, Job, Sampling, Token, Weigher
from loraflow.serving.service import ServerConfig, Service
from tests.tiny import ARCHITECTURES, number_tokenizer, random_adapter, set_random_gates, tiny_model

# Generous: nothing here measures time, a hang has to end somewhere.
DEADLINE_S = 240
NAMES = ("a", "b", "c")
_numbers = itertools.count()


def tiny_fusion(architecture: str = "llama", method: str | Method = "average", **changes: object) -> FusedModel:
    """Three random adapters of unequal ranks and targets on a tiny random base."""
    base, targets = tiny_model(architecture, **changes), ARCHITECTURES[architecture][1]
    base.generation_config.eos_token_id = 2
    adapters = {
        name: random_adapter(base, name, targets[index % 2 :], r=2 * index + 2, seed=index)
        for index, name in enumerate(NAMES)
    }
    return FusedModel.from_adapters(base, adapters, method, tokenizer=number_tokenizer())


@dataclass
class Listener:
    """Keeps what a request hears, and says when it has ended."""

    heard: list[Token | Failure] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Token | Failure) -> None:
        self.heard.append(event)
        if isinstance(event, Failure) or event.finish is not None:
            self.ended.set()

    def tokens(self) -> list[Token]:
        """All tokens, once the answer has ended."""
        assert self.ended.wait(DEADLINE_S), "no end of the answer"
        assert not isinstance(self.heard[-1], Failure), self.heard[-1]
        return [token for token in self.heard if isinstance(token, Token)]

    def ids(self) -> list[int]:
        """Their ids."""
        return [token.id for token in self.tokens()]


def job(prompt: Sequence[int], weigher: Weigher | None = None, new: int = 8, **settings: object) -> Job:
    """A request that ends at token 2; `settings` are those of `Sampling`, or `weights=True`."""
    wants = bool(settings.pop("weights", False))
    name = f"request {next(_numbers)}"
    return Job(name, list(prompt), weigher or Weigher(), Sampling(**settings), new, (2,), wants, Listener())


def send(engine: Engine, request: Job) -> Listener:
    """Submit a request, and give its listener."""
    engine.submit(request)
    return request.listener


def learned(model: FusedModel, method: Method, seed: int) -> Weigher:
    """Random gates of a method, which stays the model's own until another is set."""
    model.set_method(method)
    set_random_gates(model, seed)
    return Weigher(model.method, dict(model.gates))


def weigher_of(model: FusedModel, method: object, prompt: Sequence[int]) -> Weigher:
    """Who weighs a request by a method that learns nothing."""
    chosen, gates = model._gates_of(method)
    if isinstance(chosen, QueryMethod):
        return Weigher(weights=model.weigh(torch.tensor([list(prompt)]), method=chosen)[0])
    return Weigher(chosen, gates)


def alone(model: FusedModel, prompt: Sequence[int], method: object = None, new: int = 8) -> list[int]:
    """What `generate` answers greedily, with the end token where there is one."""
    ids = torch.tensor([list(prompt)])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new, "eos_token_id": 2}
    if method is not None:
        options["methods"] = [method]
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


@contextlib.contextmanager
def running(model: FusedModel, limits: EngineLimits | None = None) -> Iterator[Engine]:
    """An engine inside a `with` block; what is in it at the end is answered first."""
    engine = Engine(model, limits)
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def serving(catalog: Catalog, config: ServerConfig | None = None) -> Iterator[tuple[Service, str]]:
    """A real server on loopback: its service, and its address."""
    service = Service(catalog, config)
    with serving_app(service) as address:
        yield service, address


@contextlib.contextmanager
def serving_app(service: Service) -> Iterator[str]:
    """The address of a real server of a service."""
    server = uvicorn.Server(http_config(make_app(service), service.config, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the server did not end"


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode()

    def json(self) -> Any:
        """The JSON value, which must be valid: no NaN."""
        return json.loads(self.content, parse_constant=lambda name: pytest.fail(f"{name} in an answer"))


def call(method: str, url: str, body: object = None, **headers: str) -> Answer:
    """One request on a connection of its own, with JSON or bytes as its body."""
    place = urlsplit(url)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    known = {} if content is None else {"Content-Type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection(place.netloc, timeout=DEADLINE_S)) as connection:
        connection.request(method, place.path, content, known | headers)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())

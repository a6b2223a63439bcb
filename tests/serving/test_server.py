"""The end of a server: a real process, and streams that are certainly still running."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
import uvicorn

from loraflow.demo.world import adapter_paths, base_path
from loraflow.errors import LoraflowError
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import ServerConfig
from loraflow.serving.server import Server
from loraflow.serving.service import Service
from tests.serving.worlds import DEADLINE_S, call, tiny_fusion, wait_for

ROOT = Path(__file__).parents[2]
SERVE = ("serve", "--base", str(base_path()), "--lora-modules", f"math={adapter_paths()['math']}", "--port", "0")
ENDLESS = {"model": "math", "prompt": "Anna has 3", "temperature": 0}


@dataclass
class Process:
    """A server in a process of its own; what it writes is read as it comes."""

    process: subprocess.Popen
    lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def ready(self) -> str:
        """Its address, once it answers."""
        wait_for(lambda: "ready at" in self.output or self.process.poll() is not None)
        found = re.search(r"ready at (http://\S+): ", self.output)
        assert found, self.output
        return found[1]

    def end(self, *signals: int) -> int:
        """Send signals, and give the exit code."""
        for one in signals:
            self.process.send_signal(one)
        return self.process.wait(DEADLINE_S)


@contextlib.contextmanager
def server(step_s: float, *arguments: str, full: bool = False) -> Iterator[Process]:
    """`loraflow serve` whose answers do not end by themselves."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.serving.slow_server", str(step_s), *["full"][:full], *SERVE, *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )
    running = Process(process)
    reader = threading.Thread(target=running.read)
    reader.start()
    try:
        yield running
    finally:
        process.kill()
        process.wait()
        reader.join(DEADLINE_S)
        process.stdout.close()


class Stream(threading.Thread):
    """A stream that somebody reads; its events as they come, and how it broke off, if it did."""

    def __init__(self, address: str, **body: object) -> None:
        super().__init__()
        self.address, self.body = address, {**ENDLESS, "stream": True, **body}
        self.events: list[str] = []
        self.broken: Exception | None = None
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=DEADLINE_S)
        with contextlib.closing(connection):
            try:
                content = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/completions", json.dumps(self.body), content)
                for line in connection.getresponse():
                    if line.startswith(b"data: "):
                        self.events.append(line.decode().strip().removeprefix("data: "))
            except (OSError, http.client.HTTPException) as error:
                self.broken = error

    def begun(self) -> Stream:
        wait_for(lambda: len(self.events) > 1 or not self.is_alive())
        assert self.is_alive(), self.events
        return self

    def ended(self) -> list[dict]:
        """Its events, the last of them `[DONE]`."""
        self.join(DEADLINE_S)
        assert self.broken is None
        assert self.events[-1] == "[DONE]"
        return [json.loads(event) for event in self.events[:-1]]


def test_streams_are_finished_in_the_time_of_grace():
    with server(0.02, "--grace", str(DEADLINE_S)) as running:
        address = running.ready()
        streams = [Stream(address, max_tokens=100 + 10 * index).begun() for index in range(3)]
        assert not any("length" in event for stream in streams for event in stream.events)
        assert running.end(signal.SIGTERM) == 0
        for index, stream in enumerate(streams):
            events = stream.ended()
            assert events[-1]["choices"][0]["finish_reason"] == "length"
            assert len(events) == 100 + 10 * index
        assert running.output.count('"outcome": "finished"') == 3
        assert "Traceback" not in running.output


def test_streams_that_take_longer_end_with_an_error():
    with server(0.1, "--grace", "0.5", "--max-requests", "4") as running:
        address = running.ready()
        streams = [Stream(address, max_tokens=400, n=n).begun() for n in (1, 2)]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S) as client:
            chunks = iter(client.completions.create(**ENDLESS, max_tokens=400, stream=True))
            next(chunks)
            # There is no room for this one, which waits.
            waiting = Stream(address, max_tokens=400)
            answers, body = [], {**ENDLESS, "max_tokens": 400}
            whole = threading.Thread(target=lambda: answers.append(call("POST", f"{address}/v1/completions", body)))
            whole.start()
            wait_for(lambda: answers_in(call("GET", f"{address}/metrics").text) == 6)
            running.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match=r"The server is shutting down") as error:
                list(chunks)
        assert error.value.code == "shutting_down"
        assert running.process.wait(DEADLINE_S) == 0
        for stream in (*streams, waiting):
            events = stream.ended()
            message = "The server is shutting down, and the answer was not finished in the 0.5 s that it still had."
            assert events[-1]["error"]["message"] == f"{message} Ask again."
            assert (events[-1]["error"]["type"], events[-1]["error"]["code"]) == ("server_error", "shutting_down")
            assert all("choices" in event for event in events[:-1])
        assert len(waiting.events) == 2
        whole.join(DEADLINE_S)
        assert (answers[0].status, answers[0].json()["error"]["code"]) == (503, "shutting_down")
        assert running.output.count('"outcome": "failed"') == 5
        assert "Traceback" not in running.output


def answers_in(metrics: str) -> float:
    """How many answers run and wait."""
    return sum(float(count) for count in re.findall(r"^vllm:num_requests_\w+\{.*\} (\S+)$", metrics, re.MULTILINE))


def test_a_second_signal_ends_it_at_once():
    with server(0.1, "--grace", str(DEADLINE_S)) as running:
        stream = Stream(running.ready(), max_tokens=400).begun()
        running.process.send_signal(signal.SIGINT)
        wait_for(lambda: refuses_connections(stream.address))
        assert stream.is_alive()
        assert running.end(signal.SIGTERM) == -signal.SIGTERM
        stream.join(DEADLINE_S)
        assert len(stream.events) < 400


def refuses_connections(address: str) -> bool:
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) != 0


# ---- Folders and disks ---------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """All files in a folder, with their sizes and times."""
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*")}


def test_servers_write_nothing():
    """Two on one folder, where no file may grow: as on a full disk, or one that is read only."""
    folder = adapter_paths()["math"].parent
    before = snapshot(folder)
    loading = ("--load-from", str(folder), "--admin-key", "boss")
    with server(0, *loading, full=True) as one, server(0, *loading, full=True) as other:
        for address in (one.ready(), other.ready()):
            body = {"lora_name": "code", "lora_path": "code"}
            admin = {"Authorization": "Bearer boss"}
            assert call("POST", f"{address}/v1/load_lora_adapter", body, **admin).status == 200
            for model in ("math", "code"):
                answer = call("POST", f"{address}/v1/completions", {**ENDLESS, "model": model, "max_tokens": 4})
                assert answer.status == 200, answer.text
        assert [one.end(signal.SIGTERM), other.end(signal.SIGTERM)] == [0, 0]
    assert snapshot(folder) == before


def test_an_address_that_another_server_took_meanwhile():
    service = Service(Catalog(tiny_fusion(), "tiny", "tiny"), ServerConfig(drain_s=0))
    with socket.socket() as first, socket.socket() as second:
        for listener in (first, second):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind(("127.0.0.1", 0))
        second.bind(first.getsockname())
        first.listen()
        with pytest.raises(LoraflowError, match=r"The address cannot be listened on \(.*in use.*\)\. Give"):
            Server(service).run(sockets=[second])
    assert not service.engine._manager.is_running()


def test_it_is_uvicorns_server_and_says_when_it_is_ready():
    ready = threading.Event()
    service = Service(Catalog(tiny_fusion(), "tiny", "tiny"), ServerConfig(drain_s=1))
    running = Server(service, ready.set)
    assert isinstance(running, uvicorn.Server)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(DEADLINE_S)
        running.should_exit = True
        thread.join(DEADLINE_S)
    assert service.closing

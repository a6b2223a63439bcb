"""`loraflow serve`, run as a user runs it."""

from __future__ import annotations

import builtins
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from typer.testing import CliRunner

from loraflow.cli import app
from loraflow.demo.world import adapter_paths, base_path

DEADLINE_S = 200
MODULES = [f"{name}={path}" for name, path in adapter_paths().items() if name in ("zh-chat", "math")]
SERVE = ("serve", "--base", str(base_path()), "--lora-modules", *MODULES)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_it_explains_itself(run):
    result = run("serve", "--help")
    assert result.exit_code == 0, result.output
    for option in ("--base", "--lora-modules", "--host", "--port", "--api-key", "--max-waiting", "--cache-tokens"):
        assert option in result.output
    assert "LORAFLOW_API_KEY" in result.output


def test_a_missing_package_is_told(run, monkeypatch):
    real = builtins.__import__

    def without_uvicorn(name, *args, **kwargs):
        if name == "uvicorn":
            raise ImportError("No module named 'uvicorn'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_uvicorn)
    result = run("serve", "somewhere")
    assert result.exit_code == 1
    assert "Serving needs some packages (No module named 'uvicorn'): pip install 'loraflow[serve]'" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve",), "There is nothing to serve. Give a fusion, or a base and adapters."),
        (("serve", "--base", str(base_path())), "There are no adapters to serve. Give --lora-modules, or a fusion."),
        (("serve", "a/one", "b/one"), "Two fusions are called 'one'. Name them as name=path."),
        (("serve", "one=a", "one=b"), "Two fusions are called 'one'. Name them as name=path."),
        ((*SERVE, "--max-requests", "0"), "`requests` (=0) must be at least 1."),
        ((*SERVE, "--max-waiting", "0"), "`max_waiting` (=0) must be greater than 0."),
        ((*SERVE, "--served-model-name", "math"), "Two models are called 'math'. Give each a name of its own."),
    ],
)
def test_errors_are_one_clear_line(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(port, path, body=None):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, headers)
    with opener.open(request, timeout=DEADLINE_S) as answer:
        return json.loads(answer.read())


def test_it_serves_and_ends_when_told_to():
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", "from loraflow.cli import app; app()", *SERVE, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "LORAFLOW_API_KEY": "secret"},
    )
    try:
        until = time.monotonic() + DEADLINE_S
        while True:
            try:
                assert ask(port, "/health") == {"status": "ok"}
                break
            except OSError:
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < until, "the server did not start"
                time.sleep(0.2)
        assert [model["id"] for model in ask(port, "/v1/models")["data"]] == ["base", "zh-chat", "math"]
        body = {"model": "math", "messages": [{"role": "user", "content": "2 + 3 = ?"}], "temperature": 0}
        answer = ask(port, "/v1/chat/completions", body)
        assert answer["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    assert "fusion" not in output.splitlines()[0]
    assert "adapter  math  (static on math)" in output
    assert '"model": "math", "method": "static"' in output
    assert "2 + 3" not in output
    assert "Traceback" not in output

"""`loraflow serve`, run as a user runs it."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from loraflow import FusedModel, PromptFormat
from loraflow.cli import app, serve
from loraflow.cli.serve import offered
from loraflow.demo.world import adapter_paths, base_path
from loraflow.methods import Logo, get_method
from loraflow.serving.auto import Auto
from loraflow.serving.catalog import Catalog

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
        ((*SERVE, "--admin-key", "x"), "needs both: an admin key, and folders to load from"),
        ((*SERVE, "--load-from", "."), "needs both: an admin key, and folders to load from"),
        ((*SERVE, "--request-weights"), "`--request-weights` is for vLLM. Say --engine vllm too, or leave it out."),
        ((*SERVE, "--api-key", ""), "Key 1 of 1 (--api-key) is empty, as an unset variable is"),
        ((*SERVE, "--api-key", "a", "--api-key", " "), "Key 2 of 2 (--api-key) is empty, as an unset variable is"),
        ((*SERVE, "--api-key", "ü"), "Key 1 of 1 (--api-key) has characters that not every client can send"),
        ((*SERVE, "--api-key-file", "nowhere"), "The file of --api-key-file ('nowhere') cannot be read: No such file"),
        ((*SERVE, "--admin-key", "", "--load-from", "."), "Key 1 of 1 (--admin-key) is empty, as an unset variable"),
        (
            (*SERVE, "--admin-key-file", "nowhere", "--load-from", "."),
            "The file of --admin-key-file ('nowhere') cannot",
        ),
        (
            (*SERVE, "--api-key", "a", "--admin-key", "a", "--load-from", "."),
            "A key is among both --api-key and --admin-key: whoever may ask could load and unload too.",
        ),
        ((*SERVE, "--allowed-host", "http://x"), "`http://x` is no host of --allowed-host. Give a name or an address"),
        ((*SERVE, "--max-waiting", "0"), "`max_waiting` (=0) must be greater than 0."),
        ((*SERVE, "--auto-top-k", "2"), "`--auto-option`, `--auto-top-k` and `--auto-floor` need `--auto METHOD`."),
        ((*SERVE, "--auto-option", "score=norm"), "need `--auto METHOD`. Give it too."),
        ((*SERVE, "--auto", "logo", "--auto-floor", "nan"), "The `floor` of `auto` (=nan) must be a finite number."),
        ((*SERVE, "--auto", "logo", "--auto-option", "score"), "`--auto-option` takes key=value, found 'score'."),
        ((*SERVE, "--auto", "lgo"), "`auto` cannot pick by 'lgo': there is no such method, and no such fusion here."),
        ((*SERVE, "--served-model-name", "math"), "Two models are called 'math'. Give each a name of its own."),
    ],
)
def test_errors_are_one_clear_line(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("kind", ["API", "ADMIN"])
@pytest.mark.parametrize("value", ["", " ", "\t"])
@pytest.mark.parametrize("more", [(), ("--api-key", "good")])
def test_an_empty_variable_is_no_key(run, monkeypatch, kind, value, more):
    monkeypatch.setenv(f"LORAFLOW_{kind}_KEY", value)
    result = run(*SERVE, "--load-from", ".", *more)
    assert result.exit_code == 1, result.output
    assert f"`LORAFLOW_{kind}_KEY` is set, and empty: that is no key, and would let everybody in." in result.output


@pytest.fixture
def config(run, monkeypatch):
    """What a command would serve with."""
    found = []
    monkeypatch.setattr(Catalog, "open", lambda *arguments, **options: None)
    monkeypatch.setattr(serve, "_answer", lambda catalog, config, listener: (found.append(config), listener.close()))

    def config(*arguments):
        result = run(*SERVE, "--port", "0", *arguments)
        assert result.exit_code == 0, result.output
        return found.pop()

    return config


def test_a_variable_is_one_key(config, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFLOW_API_KEY", "three plain words")
    monkeypatch.setenv("LORAFLOW_ADMIN_KEY", "two words")
    found = config("--load-from", str(tmp_path))
    assert (found.api_keys, found.admin_keys) == (("three plain words",), ("two words",))
    (tmp_path / "keys").write_text("one\n# no key\nan other\n")
    files = ("--api-key-file", str(tmp_path / "keys"))
    assert config("--load-from", str(tmp_path), *files).api_keys == ("three plain words", "one", "an other")
    # As everywhere, an option takes the place of its variable.
    assert config("--load-from", str(tmp_path), "--api-key", "x").api_keys == ("x",)
    monkeypatch.delenv("LORAFLOW_ADMIN_KEY")
    assert config("--load-from", str(tmp_path), "--admin-key-file", str(tmp_path / "keys")).admin_keys == (
        "one",
        "an other",
    )


def test_what_picks_is_handed_on(run, monkeypatch):
    found = []
    monkeypatch.setattr(Catalog, "open", lambda *arguments, **options: found.append(options["auto"]))
    monkeypatch.setattr(serve, "_answer", lambda catalog, config, listener: listener.close())
    options = ("--auto-option", "score=entropy", "module=self_attn.q_proj", "--auto-top-k", "2", "--auto-floor", "-0.5")
    for more in ((), ("--auto", "logo"), ("--auto", "logo", *options)):
        assert run(*SERVE, "--port", "0", *more).exit_code == 0
    parameters = {"score": "entropy", "module": "self_attn.q_proj"}
    assert found == [None, Auto("logo"), Auto("logo", parameters, 2, -0.5)]


def test_hosts_are_checked_where_there_are_no_keys(config):
    assert config().allowed_hosts == ("127.0.0.1",)
    assert config("--host", "localhost", "--allowed-host", "a.example").allowed_hosts == ("a.example", "localhost")
    assert config("--api-key", "x").allowed_hosts == ()
    assert config("--api-key", "x", "--allowed-host", "a.example").allowed_hosts == ("a.example", "127.0.0.1")
    assert not config().public_metrics
    assert config("--public-metrics").public_metrics
    assert config("--grace", "2.5").drain_s == 2.5


@pytest.fixture(scope="module")
def fusion(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fusions") / "zh-math"
    paths = {name: adapter_paths()[name] for name in ("zh-chat", "math")}
    FusedModel.from_adapters(base_path(), paths, "average").save_pretrained(directory)
    return directory


def test_vllms_command_is_composed(run, fusion):
    result = run("serve", f"mix={fusion}", "--engine", "vllm", "--port", "9000", "--print-command")
    assert result.exit_code == 0, result.output
    words = shlex.split(result.output)
    program, verb, base = words[:3]
    assert (Path(program).name, verb, Path(base).resolve()) == ("vllm", "serve", base_path().resolve())
    for option, value in (
        ("--load-format", "loraflow"),
        ("--served-model-name", "mix"),
        ("--host", "127.0.0.1"),
        ("--port", "9000"),
        ("--dtype", "float32"),
    ):
        assert words.count(option) == 1
        assert words[words.index(option) + 1] == value
    assert json.loads(words[words.index("--model-loader-extra-config") + 1])["fusion"] == str(fusion)
    assert "--logits-processors" not in words


def test_options_go_to_vllm(run, fusion):
    arguments = ("--vllm-args", "--port 7 --tensor-parallel-size=2", "--request-weights", "--unverified")
    modules = ("--lora-modules", f"math={adapter_paths()['math']}", "--dtype", "bfloat16")
    result = run("serve", str(fusion), "--engine", "vllm", *arguments, *modules, "--print-command")
    words = shlex.split(result.output)
    assert [words.count(option) for option in ("--port", "--dtype", "--tensor-parallel-size=2")] == [1, 1, 1]
    assert (words[words.index("--port") + 1], words[words.index("--dtype") + 1]) == ("7", "bfloat16")
    assert words[words.index("--scheduler-cls") + 1].endswith("SaltedScheduler")
    assert words[words.index("--logits-processors") + 1].startswith("loraflow.serving.vllm.requests:")
    loader = json.loads(words[words.index("--model-loader-extra-config") + 1])
    assert loader["unverified"] is True
    assert loader["adapters"] == {"math": str(adapter_paths()["math"])}


def test_traces_go_where_vllm_is_told_too(run, fusion):
    command = ("serve", str(fusion), "--engine", "vllm", "--print-command")
    assert "--otlp-traces-endpoint" not in run(*command).output
    words = shlex.split(run(*command, "--otlp-traces-endpoint", "http://x:1").output)
    assert words[words.index("--otlp-traces-endpoint") + 1] == "http://x:1"


def test_vllm_takes_this_process(run, fusion, monkeypatch):
    started = []
    monkeypatch.setattr(shutil, "which", lambda program: f"/somewhere/{Path(program).name}")
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    run("serve", str(fusion), "--engine", "vllm", "--api-key", "secret")
    ((program, command, environment),) = started
    assert program == "/somewhere/vllm"
    assert environment["VLLM_API_KEY"] == "secret"
    assert not any("secret" in word for word in command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-requests", "3"), "`--max-requests` is for loraflow's own engine."),
        (("--admin-key", "x"), "`--admin-key` is for loraflow's own engine."),
        (("--timeout", "3"), "`--timeout` is for loraflow's own engine."),
        (("--public-metrics",), "`--public-metrics` is for loraflow's own engine."),
        (("--allowed-host", "x"), "`--allowed-host` is for loraflow's own engine."),
        (("--log-format", "json"), "`--log-format` is for loraflow's own engine."),
        (("--log-prompts",), "`--log-prompts` is for loraflow's own engine."),
        (("--grace", "3"), "`--grace` is for loraflow's own engine."),
        (("--auto", "logo"), "`--auto` is for loraflow's own engine."),
        (("--auto-top-k", "1"), "`--auto-top-k` is for loraflow's own engine."),
        (("--api-key", ""), "Key 1 of 1 (--api-key) is empty"),
        (("--vllm-args", "--api-key secret"), "The key for vLLM is among --vllm-args, which the process list and"),
        (("--vllm-args", "--api_key=secret"), "The key for vLLM is among --vllm-args"),
        (("--vllm-args", "--api-k secret"), "The key for vLLM is among --vllm-args"),
        (("other",), "vLLM serves one fusion at a time; 2 were given. Give one."),
        (("--vllm-args", "--load-format auto"), "`--load-format` is composed from the fusion. Leave it out."),
    ],
)
def test_what_vllm_cannot_take_is_told(run, fusion, arguments, message):
    result = run("serve", str(fusion), "--engine", "vllm", *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output


def test_a_missing_vllm_is_told(run, fusion, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    result = run("serve", str(fusion), "--engine", "vllm")
    assert result.exit_code == 1
    assert "vLLM is not installed in this environment: pip install 'loraflow[vllm]'" in result.output


def test_a_full_disk_is_told(run, monkeypatch):
    def find_none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", find_none)
    result = run(*SERVE)
    assert result.exit_code == 1
    message = "no temporary folder that can be written, which PyTorch needs (No usable temporary directory found in "
    assert message in result.output
    assert "name another folder in the variable TMPDIR." in result.output


def test_an_address_that_cannot_be_had_is_told_before_anything_is_loaded(run):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = run(*SERVE, "--port", str(port))
    assert result.exit_code == 1
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use). Give another --host" in result.output
    assert run(*SERVE, "--port", "99999").exit_code == 2
    assert "cannot be listened on" in run(*SERVE, "--host", "no.such.host.invalid").output


def test_the_address_says_that_the_model_still_loads(run, monkeypatch):
    port, found = free_port(), {}

    def load(*_, **__):
        for path in ("/health", "/ready", "/v1/models"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(port, path)
            found[path] = (refused.value.code, refused.value.read(), refused.value.headers["Retry-After"])

    monkeypatch.setattr(Catalog, "open", load)
    monkeypatch.setattr(serve, "_answer", lambda catalog, config, listener: listener.close())
    result = run(*SERVE, "--port", str(port))
    assert result.exit_code == 0, result.output
    assert found == dict.fromkeys(("/health", "/ready", "/v1/models"), (503, b'{"status":"loading"}', "5"))


def test_traces_and_logs_are_as_the_options_say(config, monkeypatch):
    assert (config().log_format, config().otlp_traces_endpoint) == ("text", None)
    assert config("--log-prompts").log_prompts
    monkeypatch.setattr("loraflow.serving.config.check_endpoint", lambda endpoint: None)
    assert config("--otlp-traces-endpoint", "http://x:4317").otlp_traces_endpoint == "http://x:4317"
    told = []
    monkeypatch.setattr(serve, "set_up_logs", told.append)
    assert config("--log-format", "json").log_format == "json"
    assert told == ["json"]


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
    assert "adapter  math\n" in output
    assert f"ready at http://127.0.0.1:{port}: OpenAI's API under /v1" in output
    assert '"model": "math", "method": "static"' in output
    assert "2 + 3" not in output
    assert "Traceback" not in output


def test_models_that_are_asked_otherwise_than_the_base_are_named():
    plain, chat = PromptFormat(template="{prompt}"), PromptFormat(chat_template="{{ messages }}")
    method = get_method("average", ["zh", "es"])
    served = {
        "base": SimpleNamespace(id="base", kind="base", prompt=plain),
        "zh": SimpleNamespace(id="zh", kind="adapter", prompt=chat),
        "mix": SimpleNamespace(id="mix", kind="fusion", prompt=plain, method=method, adapters=("zh", "es")),
        "auto": SimpleNamespace(id="auto", kind="auto", prompt=plain, method=Logo(), adapters=()),
    }
    catalog = SimpleNamespace(base_id="base", served=served, adapters_of=lambda one: ["zh", "es"])
    assert list(offered(catalog)) == [
        "base     base",
        "adapter  zh  asked in a prompt format of its own",
        "fusion   mix  (average on zh, es)",
        "auto     auto  (logo picks from 2 adapters)",
    ]

"""vLLM's own server, by the composed command: requests bring weights over HTTP, and what it does not do is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

pytest.importorskip("vllm")

from loraflow import FusedModel
from loraflow.methods import LoraFlow
from loraflow.serving.vllm.command import vllm_command
from tests.serving.vllm.world import TOKENS, answers_of, prompts, save_base, save_fusion

pytestmark = pytest.mark.vllm

# What a body says, and what `generate` is given for it.
MIXES: list[tuple[dict[str, Any], Any]] = [
    ({}, None),
    ({"adapter_weights": {"zh": 1.0}}, {"zh": 1.0}),
    ({"fusion": {"method": "base"}}, "base"),
    ({"fusion": {"method": "average"}}, "average"),
    ({"vllm_xargs": {"adapter_weights": '{"math": 0.5}'}}, {"math": 0.5}),
]
# Vast, for machines that do much else: a server that has ended is noticed at once.
START_S = 300.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server, as a function of a body, and what `generate` answers under each mix."""
    directory = tmp_path_factory.mktemp("server")
    base = save_base(directory / "llama")
    fusion = save_fusion(directory / "fusion", base, LoraFlow())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        "--host 127.0.0.1 --enforce-eager --skip-tokenizer-init --max-model-len 256 --max-num-seqs 4 --block-size 32"
    )
    command = vllm_command(fusion, [*options.split(), "--port", str(port)], request_weights=True)
    environment = {
        **os.environ,
        "VLLM_CACHE_ROOT": str(directory / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def ask(body: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return {"status": error.code, **json.load(error)}

    try:
        started = time.monotonic()
        while not _answers(port):
            assert process.poll() is None, (directory / "log").read_text()[-3000:]
            assert time.monotonic() - started < START_S, (directory / "log").read_text()[-3000:]
            time.sleep(0.5)
        model = FusedModel.from_pretrained(fusion)
        yield ask, {str(body): answers_of(model, prompts(), methods=[mix] * 5) for body, mix in MIXES}
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def test_answers_are_those_of_generate(server):
    ask, expected = server
    asked = {"model": "fusion", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    # Twice: prefixes come from the cache the second time, each mix's own.
    for _ in range(2):
        for body, _mix in MIXES:
            found = [ask({**asked, "prompt": prompt, **body}) for prompt in prompts()]
            assert [one["choices"][0]["token_ids"] for one in found] == expected[str(body)]
    assert len({str(answers) for answers in expected.values()}) == len(MIXES)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"return_fusion_weights": True}, "have no place for the weights of tokens"),
        ({"fusion": {"method": "qa-flora"}}, "does not compute the method 'qa-flora'"),
        ({"adapter_weights": {"de": 1.0}}, "names the unknown adapter 'de'"),
    ],
)
def test_what_is_refused(server, body, message):
    ask, _ = server
    found = ask({"model": "fusion", "prompt": [1, 2], "max_tokens": 1, **body})
    assert found["status"] == 400
    assert message in found["error"]["message"]

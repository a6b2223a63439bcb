"""The server as a user of OpenAI's client sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import openai
from openai import OpenAI
from openai.types.chat import ChatCompletion
from scripts.real.steps import LORAFLOW, check

START_S = 300
END_S = 60


@contextmanager
def serve(*arguments: str | Path) -> Iterator[str]:
    """`loraflow serve` on a free port; gives its address, and ends it as a service manager would."""
    words = [str(LORAFLOW), "serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    overdue = threading.Timer(START_S, server.kill)
    overdue.start()
    printed: list[str] = []
    try:
        for line in server.stdout:
            printed.append(line)
            if line.startswith("ready at "):
                break
        overdue.cancel()
        check(printed and printed[-1].startswith("ready at "), f"the server did not start:\n{''.join(printed)}")
        # Its log goes on, and nobody else empties the pipe.
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield printed[-1].split()[2].rstrip(":")
        server.send_signal(signal.SIGTERM)
        check(server.wait(END_S) == 0, f"the server ended with {server.returncode}")
    finally:
        overdue.cancel()
        server.kill()
        server.wait()


def try_server(address: str, prompt: str, answers: Mapping[str, str], base: str) -> None:
    """Ask every model, in both forms, streamed and whole; the answers are those of `loraflow generate`."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    models = {model.id for model in client.models.list()}
    check(models == {base, *answers}, f"the server offers {sorted(models)}")
    for name, expected in answers.items():
        answer = _chat(client, name, prompt)
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        print(f"   {name:8} {text}")
        check(text == expected.strip(), f"{name} answers {text!r}, and `loraflow generate` {expected!r}")
        check(reason == "stop", f"{name} ends by {reason!r}, and not at the end of its turn")
        pieces = _streamed(client, name, prompt)
        check(len(pieces) > 1 and "".join(pieces) == text, f"{name} streams {pieces}, and says {text!r} at once")
    _try_completions(client, base)
    _try_weights(client, prompt)
    try:
        _chat(client, "nobody", prompt)
    except openai.NotFoundError as error:
        check("nobody" in str(error) and base in str(error), f"an unknown model is refused by {error}")
    else:
        check(False, "the unknown model 'nobody' answers")


def _chat(client: OpenAI, model: str, prompt: str, **extra: object) -> ChatCompletion:
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=64,
        extra_body=extra,
    )


def _streamed(client: OpenAI, model: str, prompt: str) -> list[str]:
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=64, stream=True
    )
    return [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]


def _try_completions(client: OpenAI, base: str) -> None:
    asked = {"model": base, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    text = client.completions.create(**asked).choices[0].text
    print(f"   {base:8} The capital of France is{text}")
    check("Paris" in text, f"the base completes 'The capital of France is' by {text!r}")
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    check(streamed == text, f"the base streams {streamed!r}, and says {text!r} at once")


def _try_weights(client: OpenAI, prompt: str) -> None:
    """Weights of a request's own: one adapter at 1 is that adapter."""
    alone = _chat(client, "json", prompt).choices[0].message.content
    weighed = _chat(client, "fusion", prompt, adapter_weights={"json": 1.0}).choices[0].message.content
    check(weighed == alone, f"the fusion with json at 1 answers {weighed!r}, and json {alone!r}")

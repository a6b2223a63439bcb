"""The example that README and docs show: chosen by a rule, answered by the demo's own fusion, with its pictures.

```bash
python scripts/showcase.py                       # runs `loraflow demo` first, if loraflow-demo is not there
python scripts/showcase.py --demo some/folder    # a demo's folder of before
python scripts/showcase.py --only-text           # the pages anew, from docs/images/showcase.json
```

The rule: the first test problem of zh-math, by index, that the demo's fusion answers right and in the language of the
question; and beside it the first that it does not. All that is said of them in the pages is written by this script from
docs/images/showcase.json, between `<!-- showcase: NAME -->` and `<!-- end of showcase -->`, and a test holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
RECORD = IMAGES / "showcase.json"
TASK = "zh-math"
SOLVED, FAILED = "solved", "failed"
COMPARED = ("average", "qa-flora")
BY_HAND = (0.25, 1.0)
DEADLINE_S = 120
_MARKED = re.compile(r"(<!-- showcase: ([\w-]+) -->\n).*?(<!-- end of showcase -->)", re.DOTALL)


# ---- What is said ----------------------------------------------------------------------------------------------------


def filled(text: str, record: Mapping[str, Any]) -> str:
    """A page with every marked part as the record has it."""
    return _MARKED.sub(lambda part: f"{part[1]}{BLOCKS[part[2]](record)}{part[3]}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _demo_table(record: Mapping[str, Any]) -> str:
    head = ("model", "right", "right and in the language", "problems")
    rows = [
        (r["method"], _percent(r, "accuracy"), _percent(r, "in_language_accuracy"), str(r["problems"]))
        for r in record["results"]
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "```\n" + "\n".join(lines) + "\n```\n"


def _percent(result: Mapping[str, Any], key: str) -> str:
    low, high = result[f"{key.removesuffix('_accuracy')}_interval"]
    return f"{100 * result[key]:4.1f}  ({100 * low:.1f} to {100 * high:.1f})"


def _command(record: Mapping[str, Any]) -> str:
    compared = " ".join(COMPARED)
    return (
        f"```bash\nloraflow trace loraflow-demo/fusion --compare {compared} --html trace.html \\\n"
        f'    --prompt "{record[SOLVED]["prompt"]}"\n```\n'
    )


def _answers(record: Mapping[str, Any]) -> str:
    parts = []
    for kind, says in ((SOLVED, "solves"), (FAILED, "does not solve")):
        one = record[kind]
        width = max(map(len, one["answers"]))
        lines = [f"{name.ljust(width)}  {answer}" for name, answer in one["answers"].items()]
        head = f"test problem {one['index']}, the first that lora-flow {says}"
        parts.append("\n".join([head, "", one["prompt"], "", *lines, f"{'(right)'.ljust(width)}  {one['reference']}"]))
    return "```\n" + "\n\n\n".join(parts) + "\n```\n"


def _marked(record: Mapping[str, Any]) -> str:
    return f"```\n{record[SOLVED]['trace']}\n```\n"


BLOCKS = {"demo-table": _demo_table, "trace-command": _command, "answers": _answers, "marked": _marked}


# ---- What is measured ------------------------------------------------------------------------------------------------


def run_demo(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "loraflow", "demo", "--task", TASK, "--output", folder], check=True)


def make_record(demo: Path, model: Any) -> dict[str, Any]:
    """What a demo's folder says of the two problems that the rule takes."""
    from loraflow.demo.tasks import load_task

    results = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    answers = {r["method"]: _lines(demo / "answers" / f"{r['method']}.jsonl") for r in results["results"]}
    verdicts = [one["in_language"] for one in answers["lora-flow"]]
    task = load_task(TASK)
    record: dict[str, Any] = {
        "task": TASK,
        "seed": results["seed"],
        "rule": "the first test problem, by index, that lora-flow answers right and in the language, and the first not",
        "results": [{key: value for key, value in r.items() if key != "seconds"} for r in results["results"]],
    }
    for kind, verdict in ((SOLVED, True), (FAILED, False)):
        index = verdicts.index(verdict)
        problem = task.test[index]
        record[kind] = {
            "index": index,
            "prompt": problem.prompt,
            "reference": problem.completion,
            "answers": {name: of_all[index]["answer"] for name, of_all in answers.items()},
            "trace": marked_answer(model, problem.prompt),
        }
    return record


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def traced(model: Any, prompt: str) -> Any:
    from loraflow.cli.trace import trace_answer
    from loraflow.demo.setting import LONGEST_ANSWER

    return trace_answer(model, prompt, None, LONGEST_ANSWER)


def marked_answer(model: Any, prompt: str) -> str:
    """Prompt and answer, with the adapter's name wherever another one takes over."""
    from loraflow.visual.terminal import marked_text

    return marked_text(traced(model, prompt)).plain


# ---- What is shown ---------------------------------------------------------------------------------------------------


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    executable = os.environ.get("LORAFLOW_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        raise SystemExit("There is no Chromium here to take pictures with. Install it, or name it: LORAFLOW_CHROMIUM.")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


def draw(demo: Path, model: Any, record: Mapping[str, Any]) -> None:
    with browser() as opened, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(_two_answers(model, record), encoding="utf-8")
        # Narrow, to be read on a phone too, and sharp.
        page = opened.new_page(viewport={"width": 620, "height": 100}, device_scale_factor=2)
        page.goto(file.as_uri())
        page.screenshot(path=IMAGES / "answers.png", full_page=True)

        _explorer(model, record[SOLVED]["prompt"], file)
        page = opened.new_page(viewport={"width": 1180, "height": 980})
        page.goto(file.as_uri())
        page.screenshot(path=IMAGES / "trace.png")

        with served(demo) as url:
            _chat(opened.new_page(viewport={"width": 1180, "height": 740}), url, record[SOLVED])


def _chat(page: Any, url: str, problem: Mapping[str, Any]) -> None:
    """The server's page: the answer of the fusion, and that by weights of a hand."""
    page.set_default_timeout(1000 * DEADLINE_S)
    page.goto(url)
    page.wait_for_selector("#send:not([disabled])")
    page.select_option("#model", "fusion")
    page.fill("#question", problem["prompt"])
    page.press("#question", "Enter")
    _wait_for_answers(page, 1)
    shown = page.locator(".answer .text").first.evaluate("e => e.textContent")
    assert problem["answers"]["lora-flow"] in shown, shown
    page.click("#by-hand")
    for slider, weight in enumerate(BY_HAND):
        page.locator("#sliders input").nth(slider).fill(str(weight))
    page.click("#again")
    _wait_for_answers(page, 2)
    page.click("#by-model")
    page.locator(".answer").first.locator(".token").nth(5).click()
    page.screenshot(path=IMAGES / "serve.png")


def _wait_for_answers(page: Any, count: int) -> None:
    page.wait_for_function(
        "n => document.querySelectorAll('.answer').length === n && !document.querySelector('.answer[aria-busy=true]')",
        arg=count,
    )


def _two_answers(model: Any, record: Mapping[str, Any]) -> str:
    """A page with both answers, each token in the colour of the adapter that dominates it."""
    from loraflow.visual.notebook import trace_html

    parts = []
    for kind, says in ((SOLVED, "right"), (FAILED, "wrong")):
        shown = trace_html(traced(model, record[kind]["prompt"]))
        parts.append(f"<section><h2>test problem {record[kind]['index']}: {escape(says)}</h2>{shown}</section>")
    style = (
        "body{font:16px sans-serif;margin:12px 18px;background:#fff;color:#111}"
        "h2{font-size:16px;margin:14px 0 4px}"
        # The legend and the note once.
        "section+section>div>div:nth-child(-n+2){display:none}"
    )
    return f'<!doctype html><meta charset="utf-8"><style>{style}</style>{"".join(parts)}'


def _explorer(model: Any, prompt: str, file: Path) -> None:
    from loraflow.visual.explorer import save_explorer

    first = traced(model, prompt)
    traces = {model.method.name: first}
    for name in COMPARED:
        with model.using(name):
            traces[name] = model.trace(first.input_ids, prompt_length=first.prompt_length)
    save_explorer(traces, file, title="Fusion weights: fusion")


@contextmanager
def served(demo: Path) -> Iterator[str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "loraflow", "serve", "fusion", "--port", str(port)], cwd=demo)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + DEADLINE_S
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"The server of {demo}/fusion does not answer at {url}.") from None
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(DEADLINE_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("loraflow-demo"), help="folder of `loraflow demo`")
    parser.add_argument("--only-text", action="store_true", help="write the pages from what is recorded")
    arguments = parser.parse_args()
    if not arguments.only_text:
        from loraflow import FusedModel

        if not (arguments.demo / "fusion").is_dir():
            run_demo(arguments.demo)
        model = FusedModel.from_pretrained(arguments.demo / "fusion")
        record = make_record(arguments.demo, model)
        draw(arguments.demo, model, record)
        RECORD.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for page in pages():
        before = page.read_text(encoding="utf-8")
        if (after := filled(before, record)) != before:
            page.write_text(after, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()

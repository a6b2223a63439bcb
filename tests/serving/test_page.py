"""The page at `/`, driven in a real browser against a real server on this machine."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import uvicorn

from loraflow import FusedModel
from loraflow.demo.world import adapter_paths, base_path
from loraflow.prompts import PromptFormat
from loraflow.saved.fusion import SavedFusion
from loraflow.serving.app import make_app
from loraflow.serving.auto import Auto
from loraflow.serving.catalog import Catalog
from loraflow.serving.page import make_page
from loraflow.serving.protocol import ApiError
from loraflow.serving.service import ServerConfig, Service
from loraflow.visual.colours import PALETTE
from loraflow.visual.dominance import dominance, dominating
from tests.tiny import set_random_gates

# Generous: nothing here measures time, a hang has to end somewhere.
DEADLINE_S = 120
NAMES = ["zh-chat", "math"]
QUESTION = "列夫有 32 张票。他找到了 17 张票。他丢了 17 张票。他现在有多少张票？"
SECOND = "安娜有 12 个苹果。她买了 5 个苹果。她现在有多少个苹果？"
HOSTILE_NAME = '<img src=x onerror="document.title=1">'
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    '"><img src=//example.invalid/x onerror=alert(1)>',
    "<style>body{display:none}</style>",
    "\u202eright to left",
    "\x1b[2J",
    "&lt;b&gt;",
    "",
]


@dataclass
class Server:
    """A server in a thread of its own."""

    service: Service
    url: str

    def post(self, **body: object) -> dict:
        """What the API answers to a question, greedily and at once."""
        body = {"temperature": 0, "messages": [{"role": "user", "content": QUESTION}], **body}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            return json.load(response)

    def answer(self, **body: object) -> str:
        """The text of that."""
        return self.post(**body)["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fusions")
    model = FusedModel.from_adapters(base_path(), {name: adapter_paths()[name] for name in NAMES}, "lora-flow")
    set_random_gates(model)
    model.save_pretrained(directory / "flow")
    catalog = Catalog.open(None, fusions={"flow": str(directory / "flow")}, base_id="base")
    flow = catalog.served["flow"]
    saved = SavedFusion.open(directory / "flow")
    plain = PromptFormat(template="<|user|>{prompt}<|assistant|>")
    for name, prompt in (("plain", plain), (HOSTILE_NAME, flow.prompt)):
        manner = prompt, flow.endings
        catalog._offer(catalog._make(name, "fusion", "nowhere", tuple(NAMES), flow.method, manner, saved))
    # Random gates may find no end.
    service = Service(catalog, ServerConfig(max_new_tokens=24))
    with listening(service) as url:
        yield Server(service, url)


@contextmanager
def listening(service):
    config = uvicorn.Config(make_app(service), host="127.0.0.1", port=0, log_level="critical", access_log=False)
    uvicorn_server = uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    wait_until(lambda: uvicorn_server.started or not thread.is_alive())
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    uvicorn_server.should_exit = True
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def wait_until(true):
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def browser():
    executable = os.environ.get("LORAFLOW_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("there is no Chromium here; LORAFLOW_CHROMIUM may name one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page; requests to anywhere but the server, and errors on the page, fail the test."""
    problems: list[str] = []
    contexts = []

    def watch(request):
        if not request.url.startswith((f"{server.url}/", "data:")):
            problems.append(request.url)

    def opened(**options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * DEADLINE_S)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", watch)
        page.goto(server.url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def page(visit):
    page = visit()
    ready(page)
    return page


def ready(page):
    page.wait_for_selector("#send:not([disabled])")


def finished(page):
    page.wait_for_selector(".answer")
    page.wait_for_selector(".answer[aria-busy=true]", state="detached")
    return page.locator(".answer").last


def ask(page, question=QUESTION):
    page.fill("#question", question)
    page.press("#question", "Enter")
    return finished(page)


def text_of(answer):
    return answer.locator(".text").evaluate("e => e.textContent")


def spans(answer, what):
    """A fact of each token's span."""
    return answer.locator(".token").evaluate_all(f"spans => spans.map((e) => {what} ?? null)")


def readout(page):
    """The rows of the table of weights, by layer."""
    rows = page.locator("#numbers tbody tr").evaluate_all(
        "rows => rows.map((r) => [...r.children].map((e) => e.textContent.replace('−', '-')))"
    )
    return {name: [float(weight) for weight in weights] for name, *weights in rows}


def css_colour(colour):
    return "rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))


def mean(weights):
    return [sum(column) / len(column) for column in zip(*weights, strict=True)]


def set_slider(page, name, value):
    page.locator("#sliders input").nth(NAMES.index(name)).fill(str(value))


# ---- What is sent --------------------------------------------------------------------------------------------------


def test_the_policy_admits_its_own_script_and_style_and_this_server():
    page = make_page()
    policy = dict(part.split(" ", 1) for part in page.headers["Content-Security-Policy"].split("; "))
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_the_page_names_nothing_to_load():
    html = make_page().html.replace("http://www.w3.org/2000/svg", "").replace("xmlns", "").replace("href=", "", 1)
    assert 'rel="icon" "data:' in html
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://|innerHTML|insertAdjacent|\{\{""", html)
    assert all(colour in html for colour in PALETTE)


def test_the_page_needs_no_key(server, monkeypatch):
    monkeypatch.setattr(server.service, "config", replace(server.service.config, api_keys=("secret",)))
    with urllib.request.urlopen(server.url, timeout=DEADLINE_S) as response:
        assert response.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        server.answer(model="flow")


# ---- Answers and colours -------------------------------------------------------------------------------------------


def test_tokens_have_the_colours_of_their_weights(page, server):
    reply = server.post(model="flow", return_fusion_weights="all")
    choice = reply["choices"][0]
    weights = choice["fusion_weights"]["weights"]
    answer = ask(page)
    assert text_of(answer) == choice["message"]["content"]
    tops = [dominating(mean(w)) for w in weights]
    assert spans(answer, "e.dataset.adapter") == [None if top is None else NAMES[top] for top in tops]
    assert len(set(tops)) > 1
    lines = spans(answer, "getComputedStyle(e).textDecorationColor")
    styles = spans(answer, "getComputedStyle(e).textDecorationStyle")
    for line, style, top in zip(lines, styles, tops, strict=True):
        if top is not None:
            assert line == css_colour(PALETTE[top])
            assert style == ("solid", "dashed")[top]
    strengths = [float(s) for s in spans(answer, "e.style.getPropertyValue('--strength')")]
    assert strengths == pytest.approx([0.25 + 0.75 * dominance(mean(w)) for w in weights], abs=2e-3)
    backgrounds = spans(answer, "getComputedStyle(e).backgroundColor")
    assert len(set(backgrounds)) > 2  # two colours, in several strengths
    facts = answer.locator(".facts").inner_text()
    assert f"{reply['usage']['completion_tokens']} tokens in " in facts
    assert " tokens/s" in facts
    assert f"prompt of {reply['usage']['prompt_tokens']} tokens" in facts
    assert page.locator("#about .adapter").all_inner_texts() == ["A zh-chat", "B math"]
    maker = answer.locator(".maker").inner_text()
    assert maker == f"flow · lora-flow · {reply['fusion']['digest'].removeprefix('sha256:')[:12]}"


def test_letters_mark_where_another_adapter_takes_over(page):
    answer = ask(page)
    adapters, keys = spans(answer, "e.dataset.adapter"), spans(answer, "e.dataset.key")
    before = [None, *adapters[:-1]]
    expected = [None if a is None or a == b else "AB"[NAMES.index(a)] for a, b in zip(adapters, before, strict=True)]
    assert keys == expected
    marks = "getComputedStyle(e, '::before').content"
    assert not any("A" in mark or "B" in mark for mark in spans(answer, marks))
    page.check("#letters")
    assert spans(answer, marks)[expected.index("B")] == '"B"'


def test_the_layer_and_the_token_are_chosen(page, server):
    weights = server.post(model="flow", return_fusion_weights="all")["choices"][0]["fusion_weights"]["weights"]
    answer = ask(page)
    layers = len(weights[0])
    found = readout(page)  # nothing is chosen: the mean of the answer
    assert found["mean"] == pytest.approx(mean([mean(w) for w in weights]), abs=1e-3)
    assert list(found) == ["mean", *map(str, range(layers))]
    page.locator("#layer").fill(str(layers))
    assert page.locator("#layer-name").inner_text() == f"{layers - 1} of 0–{layers - 1}"
    tops = [dominating(w[layers - 1]) for w in weights]
    assert spans(answer, "e.dataset.adapter") == [None if top is None else NAMES[top] for top in tops]
    assert tops != [dominating(mean(w)) for w in weights]
    page.click("#layer-down")
    assert page.locator("#numbers tr[aria-current] th").inner_text() == str(layers - 2)

    tokens = answer.locator(".token")
    tokens.nth(3).hover()
    found = readout(page)
    assert found["mean"] == pytest.approx(mean(weights[3]), abs=6e-4)
    for layer in range(layers):
        assert found[str(layer)] == pytest.approx(weights[3][layer], abs=6e-4)
    tokens.nth(5).click()
    page.mouse.move(5, 5)
    assert readout(page)["0"] == pytest.approx(weights[5][0], abs=6e-4)
    assert f"token 6 of {len(weights)}" in page.locator("#numbers").inner_text()
    page.keyboard.press("ArrowRight")
    assert readout(page)["0"] == pytest.approx(weights[6][0], abs=6e-4)
    page.keyboard.press("Home")
    assert f"token 1 of {len(weights)}" in page.locator("#numbers").inner_text()
    page.locator("#numbers tbody tr").nth(1).click()
    assert page.locator("#layer-name").inner_text() == f"0 of 0–{layers - 1}"
    page.click("#let-go")
    assert "last answer" in page.locator("#numbers").inner_text()


def test_weights_by_hand_change_the_answer(page, server):
    first = text_of(ask(page))
    assert first == server.answer(model="flow")
    page.click("#by-hand")
    set_slider(page, "zh-chat", 0)
    set_slider(page, "math", 1)
    assert page.locator("#sliders output").all_inner_texts() == ["0.00", "1.00"]
    page.click("#again")
    answer = finished(page)
    assert text_of(answer) == server.answer(model="math") != first
    assert set(spans(answer, "e.dataset.adapter")) == {"math"}
    assert "weights by hand" in answer.locator(".maker").inner_text()
    assert "zh-chat 0.00, math 1.00" in answer.locator(".maker").inner_text()
    set_slider(page, "zh-chat", -0.5)
    page.click("#again")
    expected = server.answer(model="flow", adapter_weights={"zh-chat": -0.5, "math": 1.0})
    assert text_of(finished(page)) == expected
    page.click("#reset")
    assert page.locator("#sliders output").all_inner_texts() == ["0.50", "0.50"]
    page.click("#by-model")
    page.click("#again")
    assert text_of(finished(page)) == first


def test_the_base_and_single_adapters(page, server):
    labels = page.locator("#model optgroup").evaluate_all("groups => groups.map((g) => g.label)")
    assert labels == ["Fusions", "Adapters", "Base"]
    page.select_option("#model", "base")
    assert page.locator("#weights").is_hidden()
    answer = ask(page)
    assert text_of(answer) == server.answer(model="base")
    assert answer.locator(".token").count() == 0
    page.select_option("#model", "zh-chat")
    page.click("#new-chat")
    answer = ask(page)
    assert text_of(answer) == server.answer(model="zh-chat")
    assert set(spans(answer, "e.dataset.adapter")) == {"zh-chat"}
    page.click("#by-hand")
    assert page.locator("#sliders output").all_inner_texts() == ["1.00", "0.00"]


def test_what_was_picked_by_the_request_is_shown(visit, server, monkeypatch):
    catalog = server.service.catalog
    monkeypatch.setattr(catalog, "served", dict(catalog.served))
    catalog.offer_auto(Auto("logo", top_k=1))
    page = visit()
    ready(page)
    labels = page.locator("#model optgroup").evaluate_all("groups => groups.map((g) => g.label)")
    assert labels == ["Picked by the request", "Fusions", "Adapters", "Base"]
    assert page.input_value("#model") == "auto"
    assert page.locator("#about").inner_text().startswith("logo picks from 2 adapters:")
    assert page.locator("#weights").is_hidden()
    answer = ask(page)
    picks = server.post(model="auto")["choices"][0]["auto"]
    ((name, weight),) = picks["adapter_weights"].items()
    assert text_of(answer) == server.answer(model="auto")
    assert f"{name} {weight:.2f} ({picks['scores'][name]:.3f}), of 2" in answer.locator(".maker").inner_text()
    assert set(spans(answer, "e.dataset.adapter")) == {name}
    # Where none is good enough, the base answers, and no token has a colour.
    catalog.served.pop("auto")
    catalog.offer_auto(Auto("logo", floor=1e9))
    page.click("#new-chat")
    answer = ask(page)
    assert text_of(answer) == server.answer(model="base")
    best = next(iter(picks["scores"]))
    assert f"the base alone; best: {best} (" in answer.locator(".maker").inner_text()
    assert answer.locator(".token").count() == 0


# ---- Conversations -------------------------------------------------------------------------------------------------


def watch_messages(server, monkeypatch):
    """The conversations that the server is asked about."""
    seen = []
    prompt_ids = server.service.prompt_ids

    def watched(served, messages):
        seen.append([(message["role"], message["content"]) for message in messages])
        return prompt_ids(served, messages)

    monkeypatch.setattr(server.service, "prompt_ids", watched)
    return seen


def test_the_conversation_is_kept(page, server, monkeypatch):
    seen = watch_messages(server, monkeypatch)
    first = text_of(ask(page))
    ask(page, SECOND)
    assert seen[1] == [("user", QUESTION), ("assistant", first), ("user", SECOND)]
    page.click("#again")
    finished(page)
    assert seen[2] == seen[1]
    page.click("#new-chat")
    assert page.locator(".answer").count() == 0
    ask(page, SECOND)
    assert seen[3] == [("user", SECOND)]


def test_a_model_of_single_turns_is_asked_without_the_conversation(page, server, monkeypatch):
    seen = watch_messages(server, monkeypatch)
    page.select_option("#model", "plain")
    ask(page)
    assert page.locator(".note").count() == 0
    answer = ask(page, SECOND)
    assert "The server says: A conversation of several turns needs a chat template." in answer.inner_text()
    assert text_of(answer) == server.answer(model="plain", messages=[{"role": "user", "content": SECOND}])
    seen.clear()
    assert "Answered without the conversation" in ask(page, "3 + 4").inner_text()
    assert seen == [[("user", "3 + 4")]]


def test_settings_are_sent(page, server):
    page.fill("#max-tokens", "3")
    answer = ask(page)
    assert text_of(answer) == server.answer(model="flow", max_tokens=3)
    assert "3 tokens in " in answer.locator(".facts").inner_text()
    assert "cut at the longest answer" in answer.locator(".facts").inner_text()
    page.fill("#temperature", "5")
    assert "`temperature`: Input should be less than or equal to 2" in ask(page).locator(".error").inner_text()


def test_composing_does_not_send(page):
    page.fill("#question", "列夫")
    page.locator("#question").evaluate(
        "e => e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    page.press("#question", "Shift+Enter")
    assert page.locator(".answer").count() == 0
    assert page.input_value("#question") == "列夫\n"


# ---- Ends and errors -----------------------------------------------------------------------------------------------


def after(server, monkeypatch, count, then):
    """Let `then` happen after some pieces of every answer."""
    pieces = server.service.pieces

    async def watched(asked):
        number = 0
        async for piece in pieces(asked):
            if number == count:
                await then()
            number += 1
            yield piece

    monkeypatch.setattr(server.service, "pieces", watched)


def cancelled(server):
    found = re.findall(r"requests_total\{[^}]*cancelled[^}]*\} ([\d.]+)", server.service.metrics.text().decode())
    return sum(map(float, found))


def test_stop_ends_the_request(page, server, monkeypatch):
    before = cancelled(server)
    with monkeypatch.context() as patch:
        after(server, patch, 3, lambda: asyncio.sleep(DEADLINE_S))
        page.fill("#max-tokens", "6")
        page.fill("#question", QUESTION)
        page.click("#send")
        page.wait_for_selector(".answer .token:nth-child(3)")
        assert page.locator("#send").is_hidden()
        wait_until(lambda: not server.service.engine.running)
        page.click("#stop")
        answer = finished(page)
    assert answer.locator(".token").count() == 3
    assert "stopped" in answer.locator(".facts").inner_text()
    assert answer.locator(".error").count() == 0
    wait_until(lambda: cancelled(server) == before + 1)
    page.fill("#max-tokens", "")
    page.click("#again")
    assert text_of(finished(page)) == server.answer(model="flow")


def test_a_key_is_asked_for_and_kept_for_the_tab(visit, server, monkeypatch):
    monkeypatch.setattr(server.service, "config", replace(server.service.config, api_keys=("secret",)))
    page = visit()
    page.wait_for_selector("#key-form:not([hidden])")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.get_by_text("The API key is missing or wrong.").wait_for()
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    ready(page)
    assert page.locator("#key-form").is_hidden()
    assert page.input_value("#key") == ""
    assert text_of(ask(page))
    page.reload()
    ready(page)
    assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
    # The server's keys change: the question is not lost.
    monkeypatch.setattr(server.service, "config", replace(server.service.config, api_keys=("other",)))
    answer = ask(page)
    assert "The API key is missing or wrong." in answer.locator(".error").inner_text()
    assert page.locator("#key-form").is_visible()
    assert page.input_value("#question") == QUESTION


def test_errors_are_shown_as_the_server_says_them(page, server, monkeypatch):
    page.fill("#max-tokens", "100000")
    answer = ask(page)
    assert answer.locator(".error").inner_text().startswith("`max_tokens` (=100000) must be at most ")
    assert page.input_value("#question") == QUESTION
    page.fill("#max-tokens", "")

    async def late():
        raise ApiError(504, "The request took <b>longer</b> than 1 s.", kind="server_error")

    async def broken():
        raise RuntimeError("the server is gone")

    with monkeypatch.context() as patch:
        after(server, patch, 2, late)
        answer = ask(page)
        assert answer.locator(".token").count() == 2
        assert answer.locator(".error").inner_text() == "The request took <b>longer</b> than 1 s."
    with monkeypatch.context() as patch:
        after(server, patch, 2, broken)
        assert "The connection to the server was lost" in ask(page).locator(".error").inner_text()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    assert "The server cannot be reached" in ask(page).locator(".error").inner_text()
    page.unroute("**/v1/chat/completions")
    # None of these questions has an answer, and so none is part of the conversation.
    assert text_of(ask(page)) == server.answer(model="flow")


def test_a_page_without_its_server_says_so_and_tries_again(visit, server):
    page = visit()
    ready(page)
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    page.get_by_text("The server cannot be reached").wait_for()
    page.unroute("**/v1/models")
    page.click("#again")
    ready(page)
    assert page.locator("#status").is_hidden()


# ---- Strangers and small screens -----------------------------------------------------------------------------------


def test_nothing_that_a_model_says_becomes_markup(page, server, monkeypatch):
    pieces_of = server.service._pieces_of
    count = 0

    def hostile(asked, index, token):
        nonlocal count
        found = [
            replace(piece, text=HOSTILE[(count + i) % len(HOSTILE)])
            for i, piece in enumerate(pieces_of(asked, index, token))
        ]
        count += len(found)
        return found

    monkeypatch.setattr(server.service, "_pieces_of", hostile)
    texts = {token: HOSTILE[token % len(HOSTILE)] for token in range(len(server.service.tokenizer))}
    monkeypatch.setattr(server.service, "token_texts", texts)
    page.select_option("#model", HOSTILE_NAME)
    elements = "document.querySelectorAll('img, b:not(.maker b), script, style').length"
    before = page.evaluate(elements)
    answer = ask(page, "".join(HOSTILE))
    tokens = answer.locator(".token").count()
    assert text_of(answer) == "".join(HOSTILE[i % len(HOSTILE)] for i in range(tokens))
    assert tokens > len(HOSTILE)
    for index in range(len(HOSTILE)):
        answer.locator(".token").nth(index).focus()
        shown = page.locator("#numbers code").inner_text()
        assert "\u202e" not in shown
        assert "\x1b" not in shown
    assert answer.locator(".maker b").inner_text() == HOSTILE_NAME
    assert page.evaluate(elements) == before
    assert page.title() == "loraflow"
    assert page.locator("body").is_visible()


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_all_of_it(visit, width):
    page = visit(viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    ready(page)

    def fits():
        sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        wide = page.evaluate(
            """[...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest("table")
            && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
        )
        return sizes[0] <= width and sizes[1] == width and not wide

    assert fits()
    answer = ask(page, "Lev" * 60 + QUESTION)
    assert fits()
    answer.locator(".token").nth(2).tap()
    assert page.locator("#readout").is_visible()
    assert answer.locator(".token.pinned").count() == 1
    assert page.locator("#readout").evaluate("e => e.scrollWidth <= e.clientWidth")
    assert fits()
    page.click("#let-go")
    assert page.locator("#readout").is_hidden()
    page.tap("#controls summary")
    page.tap("#by-hand")
    assert page.locator("#sliders input").count() == 2
    assert fits()
    assert page.locator("#send").is_visible()


def test_dark_where_the_reader_wants_it(visit):
    light, dark = (visit(color_scheme=scheme) for scheme in ("light", "dark"))
    colour = "getComputedStyle(document.body).backgroundColor"
    assert light.evaluate(colour) == css_colour("#f6f7f9")
    assert dark.evaluate(colour) == css_colour("#121417")

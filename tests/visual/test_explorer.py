"""The explorer: what it embeds, and what a real browser makes of it."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow import FusedModel
from loraflow.errors import LoraflowError
from loraflow.visual.colours import PALETTE
from loraflow.visual.dominance import dominance, dominating
from loraflow.visual.explorer import colour_range, encode_weights, explorer_html, save_explorer
from loraflow.visual.notebook import trace_html
from loraflow.visual.tokens import printable
from loraflow.visual.trace import Trace
from tests.tiny import random_ids, save_adapter, tiny_model
from tests.visual.test_trace import make_trace

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    '"><img src=x onerror=alert(1)>',
    "{{data}}{{title}}",
    "<!--",
    "a\u2028b\u2029",
    "\u202eright to left",
    "\x1b[2J\x00",
    "\ud800",
    "&lt;",
    "'\\\n",
    "",
]


def embedded(page: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def decoded(stored: dict, layers: int, adapters: int) -> torch.Tensor:
    """The weights that a page holds."""
    integers = np.frombuffer(base64.b64decode(stored["data"]), "<i2").astype("float64")
    return torch.from_numpy(integers * stored["scale"]).view(stored["tokens"], layers, adapters)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 6),
    layers=st.integers(1, 4),
    adapters=st.integers(1, 5),
    power=st.integers(-6, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 100),
)
def test_weights_survive_to_half_a_step(tokens, layers, adapters, power, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(tokens, layers, adapters, generator=generator) * 10**power).to(dtype)
    found = decoded(encode_weights(weights), layers, adapters).expand(tokens, layers, adapters)
    assert (found - weights.double()).abs().max() <= weights.double().abs().max() / 65534 * (1 + 1e-9)


def test_the_same_weights_everywhere_are_stored_once():
    same = torch.rand(3, 2).expand(50, 3, 2)
    assert encode_weights(same)["tokens"] == 1
    other = same.clone()
    other[-1, -1, -1] += 0.01
    assert encode_weights(other)["tokens"] == 50
    assert decoded(encode_weights(torch.zeros(2, 1, 1)), 1, 1).tolist() == [[[0.0]]]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.1, 0.43], {"low": 0.0, "high": 0.5, "clipped": 0, "largest": 0.43}),
        ([0.0, 1.0], {"low": 0.0, "high": 1.0, "clipped": 0}),
        ([-0.3, 1.1], {"low": -1.2, "high": 1.2, "clipped": 0, "smallest": -0.3}),
        ([-1e-5, 0.02], {"low": 0.0, "high": 0.02}),
        (
            [0.9] * 997 + [50.0, -70.0, 3.0],
            {"low": -1.0, "high": 1.0, "clipped": 3, "smallest": -70.0, "largest": 50.0},
        ),
        ([0.0, 0.0], {"low": 0.0, "high": 1.0, "clipped": 0}),
        ([7e-9, 8.1e-9], {"high": 1e-8}),
    ],
    ids=["round", "exact", "diverging", "nearly zero", "clipped", "zero", "tiny"],
)
def test_the_colours_range(weights, expected):
    found = colour_range([torch.tensor(weights, dtype=torch.float64)[:, None, None]])
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_one_range_for_all_methods():
    small, large = torch.full((2, 1, 1), 0.1), torch.full((2, 1, 1), -0.9)
    assert colour_range([small, large])["low"] == -1.0


def test_what_dominates():
    assert dominating([0.2, 0.5, 0.3]) == 1
    assert dominating([0.5, 0.5]) is None
    assert dominating([0.5, 0.5005]) is None
    assert dominating([-1.0, -2.0]) == 0
    assert dominating([0.3]) == 0
    assert dominance([0.6, 0.2, -0.5]) == pytest.approx(0.75)
    assert dominance([-1.0, 0.0]) == 0.0


def test_control_characters_are_spelled_out():
    assert printable("a\u202eb\x1b\u2028\ud800\t") == "a\\u202eb\\x1b\\u2028\\ud800\\t"
    assert printable("a\n \u3000\u00a0é中\u200d") == "a\n \u3000\u00a0é中\u200d"


def test_nothing_in_a_trace_becomes_markup_or_script():
    name, title = "</script><b>", "<i>{{data}}&"
    trace = make_trace(len(HOSTILE), tokens=[HOSTILE], adapters=('<b onload="x">', "a&b\u2028"))
    page = explorer_html({name: trace}, title=title)
    content = embedded(page)
    assert content["tokens"] == [printable(token) for token in HOSTILE]
    assert content["adapters"][0]["name"] == '<b onload="x">'
    assert content["methods"][0]["name"] == name
    block = page[page.index('id="data">') + 10 :]
    assert not re.search("[<>&]", block[: block.index("</script>")])
    page.encode()  # a lone surrogate would not pass
    assert page.count(html.escape(title)) == 2
    assert len(re.findall("<script", page)) == 2


def test_the_page_may_load_and_run_nothing_but_itself():
    page = explorer_html({"a": make_trace()})
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", page)


def test_padding_is_left_out_and_positions_are_kept():
    content = embedded(explorer_html({"a": make_trace(6, prompt_length=4, padding=2)}))
    assert content["tokens"] == ["t2", "t3", "t4", "t5"]
    assert content["positions"] == [2, 3, 4, 5]
    assert content["promptTokens"] == 2


def test_weights_are_those_that_produced_the_tokens_of_the_row():
    trace = make_trace(5, prompt_length=2, batch=2)
    content = embedded(explorer_html({"a": trace}, row=1))
    own = trace.weights[1].double()
    torch.testing.assert_close(decoded(content["methods"][0], 2, 2), own[[0, 1, 1, 2, 3]], atol=1e-3, rtol=0)


def broken(weights, where, value):
    changed = weights.clone()
    changed[where] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: replace(t, input_ids=t.input_ids + 1), "'a' and 'b' differ in their tokens. Trace the same"),
        (lambda t: replace(t, prompt_length=3), r"differ in their prompt length \(0 and 3\)"),
        (lambda t: replace(t, adapters=("math", "zh")), r"differ in their adapters \(\('zh', 'math'\) and"),
        (lambda t: replace(t, weights=t.weights[:, :, :1]), r"differ in their number of layers \(2 and 1\)"),
        (lambda t: make_trace(padding=1), "differ in their padding"),
        (
            lambda t: replace(t, weights=broken(t.weights, (0, 3, 1, 1), float("nan"))),
            "'b' has 1 weights that are not finite, the first at position 3, layer 1, adapter 'math'",
        ),
    ],
    ids=["tokens", "prompt", "adapters", "layers", "padding", "nan"],
)
def test_traces_that_cannot_stand_side_by_side(change, message):
    trace = make_trace()
    with pytest.raises(LoraflowError, match=message):
        explorer_html({"a": trace, "b": change(trace)})


def test_there_must_be_something_to_show():
    with pytest.raises(LoraflowError, match="There are no traces to show"):
        explorer_html({})
    for row in (-1, 1):
        with pytest.raises(LoraflowError, match=rf"`row` \(={row}\) must be between 0 and the last row of the trace"):
            explorer_html({"a": make_trace()}, row=row)
    with pytest.raises(LoraflowError, match="Row 0 of the trace 'a' has no tokens, only padding"):
        explorer_html({"a": make_trace(3, padding=3)})


def test_what_stands_at_padding_is_nobodys_weight():
    trace = make_trace(4, padding=1)
    explorer_html({"a": replace(trace, weights=broken(trace.weights, (0, 0), float("nan")))})


def test_a_trace_saves_its_page(tmp_path):
    trace = replace(make_trace(), method="arrow")
    trace.save_html(tmp_path / "new" / "trace.html")
    page = (tmp_path / "new" / "trace.html").read_text(encoding="utf-8")
    assert page == explorer_html({"arrow": trace})
    with pytest.raises(LoraflowError, match=r"is a directory\. Give a file, such as"):
        trace.save_html(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(LoraflowError, match=r"cannot be written: .*Give another file\."):
        save_explorer({"a": trace}, tmp_path / "file" / "trace.html")


def test_a_trace_says_in_a_line_what_it_is():
    weights = torch.tensor([0.25, -0.5]).expand(2, 6, 3, 2)
    trace = replace(make_trace(batch=2, prompt_length=4, padding=1), weights=weights, method="arrow")
    said = "Trace(arrow: 10 tokens (6 prompt, 4 generated) in 2 rows, 3 layers; mean weights zh 0.250, math -0.500)"
    assert str(trace) == repr(trace) == said
    assert str(replace(make_trace(), weights=weights[:1])).startswith("Trace(6 tokens, 3 layers; mean")


@pytest.mark.parametrize(
    ("method", "level", "place"),
    [
        ("average", "task", "layer"),
        ("qa-flora", "query", "layer"),
        ("logo", "query", "model"),
        ("arrow", "token", "module"),
    ],
)
def test_a_trace_knows_how_its_weights_came_about(tmp_path, method, level, place):
    base = tiny_model()
    model = FusedModel.from_adapters(base, {"one": save_adapter(base, tmp_path)}, method)
    trace = model.trace(random_ids())
    assert (trace.method, trace.level, trace.place) == (method, level, place)
    assert all(html.escape(note) in trace_html(trace) or note in trace_html(trace) for note in trace.notes())
    assert len(trace.notes()) == (level != "token") + (place != "layer")


# In the browser.

ADAPTERS = ("zh-chat", "math", "code")
TOKENS = ["<s>", "How", " many", "?", "\n", "5", " +", " 3", " =", " 8"]


def text_trace(method: str, seed: int, **fields) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    trace = make_trace(len(TOKENS), prompt_length=5, layers=4, adapters=ADAPTERS, tokens=[TOKENS])
    return replace(trace, weights=torch.randn(trace.weights.shape, generator=generator), method=method, **fields)


@pytest.fixture
def traces():
    """Three methods on one text, the last with the same weights everywhere."""
    of_prompt = text_trace("qa-flora", 3, level="query")
    of_prompt = replace(of_prompt, weights=of_prompt.weights[:, :1].softmax(-1).expand(1, len(TOKENS), 4, 3))
    return {"lora-flow": text_trace("lora-flow", 1), "arrow": text_trace("arrow", 2), "qa-flora": of_prompt}


@pytest.fixture
def opened(offline_page, tmp_path):
    """Open the explorer of some traces in the browser."""

    def open_page(traces, **options):
        save_explorer(traces, tmp_path / "trace.html", **options)
        offline_page.goto((tmp_path / "trace.html").as_uri())
        return offline_page

    return open_page


def set_layer(page, value: int) -> None:
    """Move the slider: 0 is all layers, and 1 the first."""
    page.locator("#layer").evaluate(f"e => {{ e.value = {value}; e.dispatchEvent(new Event('input')) }}")


def token(page, position: int, panel: int = 0):
    return page.locator(".panel").nth(panel).locator(f"[data-token='{position}']")


def text_adapters(page, panel: int = 0) -> list[int | None]:
    """Which adapter each token of the text is shown to be dominated by."""
    found = page.locator(".panel").nth(panel).locator(".text [data-token]")
    names = found.evaluate_all("all => all.map((e) => e.dataset.adapter ?? null)")
    return [None if name is None else int(name) for name in names]


def background(locator) -> str:
    return locator.evaluate("e => getComputedStyle(e).backgroundColor")


def numbers_of(row) -> list[float]:
    return [float(text.replace("−", "-")) for text in row.locator("td").all_inner_texts()]


def readout(page) -> dict[str, list[float]]:
    """The numbers at the bottom, by method."""
    rows = page.locator("#numbers tbody tr").all()
    return {row.locator("th").inner_text(): numbers_of(row) for row in rows}


def expected(trace, position: int, layer: int | None = None) -> list[float]:
    shown = trace.shown_weights()[position]
    return (shown.mean(dim=0) if layer is None else shown[layer]).tolist()


def test_letters_of_adapters(opened, traces):
    assert opened(traces).evaluate("[0, 7, 25, 26].map(keyOf)") == ["A", "H", "Z", "27"]


# Ties and margins about the three decimals, negative weights, none that is positive, one adapter, many.
WEIGHINGS = [
    [0.2, 0.5, 0.3],
    [0.5, 0.5],
    [0.5, 0.5005],
    [0.5, 0.501],
    [0.5, 0.5011],
    [0.25, 0.251],
    [-1.0, -2.0],
    [-1.0, 0.0],
    [-0.5, -0.5],
    [0.6, 0.2, -0.5],
    [0.0, 0.0, 0.0],
    [0.3],
    [-0.3],
    [1e-9, 0.0],
    [1e30, -1e30],
    *torch.randn(200, 9, generator=torch.Generator().manual_seed(0)).mul(0.01).double().tolist(),
]


def test_the_pages_script_says_what_python_says(opened, traces):
    said = opened(traces).evaluate("all => all.map(dominating)", WEIGHINGS)
    assert [each["top"] for each in said] == [dominating(weights) for weights in WEIGHINGS]
    assert [each["share"] for each in said] == pytest.approx([dominance(weights) for weights in WEIGHINGS])


def test_text_and_facts(opened, traces):
    page = opened(traces, title="Sums & <more>")
    assert page.title() == page.locator("h1").inner_text() == "Sums & <more>"
    assert (
        page.locator("#facts").inner_text() == "10 tokens (5 prompt, 5 generated) · 4 layers · 3 adapters · 3 methods"
    )
    panel = page.locator(".panel").first
    prompt, generated = panel.locator(".part").all()
    assert [e.text_content() for e in prompt.locator(".token").all()] == TOKENS[:5]
    assert [e.text_content() for e in generated.locator(".token").all()] == TOKENS[5:]
    assert prompt.locator(".label").inner_text() == "Prompt"
    assert generated.locator(".label").inner_text() == "Generated"
    without = opened({"arrow": replace(traces["arrow"], prompt_length=0)})
    assert without.locator(".part .label").all_inner_texts() == ["Text"]
    assert "computed at its position" in without.locator("#producing").text_content()
    assert not without.locator("#methods").is_visible()


def test_the_slider_recolours_the_text(opened, traces):
    page = opened(traces)
    seen = []
    for value, layer in [(0, None), (1, 0), (4, 3)]:
        set_layer(page, value)
        for panel, trace in enumerate(traces.values()):
            tops = [dominating(expected(trace, p, layer)) for p in range(len(TOKENS))]
            assert text_adapters(page, panel) == tops
        seen.append([background(token(page, p)) for p in range(len(TOKENS))])
        assert page.locator(".mark.layer").first.is_visible() == (layer is not None)
    assert seen[0] != seen[1] != seen[2]
    assert page.locator("#layer-name").inner_text() == "3 of 0–3"
    current = page.locator(".means [aria-current] th").all_inner_texts()
    assert current == ["3"] * 3
    page.locator("#layer-down").click()
    assert page.locator("#layer-name").inner_text() == "2 of 0–3"
    page.locator("#layer-up").click()
    page.locator("#layer-up").click()
    assert page.locator("#layer").input_value() == "4"


def test_colours_are_the_palettes_and_stronger_where_one_dominates(opened):
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.3, 0.3], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]])[None, :, None]
    page = opened({"a": replace(make_trace(4, adapters=ADAPTERS, layers=1), weights=weights)})
    shades = [[float(x) for x in re.findall(r"[\d.]+", background(token(page, p)))] for p in range(4)]
    for index, colour in [(0, PALETTE[0]), (1, PALETTE[0]), (2, PALETTE[2])]:
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert shades[index][:3] == pytest.approx(rgb, abs=0.01)
    assert shades[0][3] > shades[1][3] > 0
    assert shades[3][3] == 0
    # Not by colour alone.
    strokes = [token(page, p).evaluate("e => getComputedStyle(e).textDecorationStyle") for p in (0, 2)]
    assert strokes == ["solid", "dotted"]


def test_hovering_reads_the_numbers(opened, traces):
    page = opened(traces)
    assert "Point at a token" in page.locator("#numbers").inner_text()
    set_layer(page, 3)
    token(page, 7).hover()
    assert {name: pytest.approx(found, abs=6e-4) for name, found in readout(page).items()} == {
        name: expected(trace, 7, 2) for name, trace in traces.items()
    }
    said = page.locator("#numbers p").inner_text()
    assert "position 7 · generated, by the weights of position 6 · layer 2" in said
    assert page.locator(".token.hovered").count() == 3
    set_layer(page, 0)
    assert readout(page)["arrow"] == pytest.approx(expected(traces["arrow"], 7), abs=6e-4)
    token(page, 4).hover()
    assert page.locator("#numbers code").inner_text() == "↵"
    assert "position 4 · prompt · all layers (mean)" in page.locator("#numbers p").inner_text()
    page.mouse.move(1, 1)
    assert page.locator(".token.hovered").count() == 0


def test_keys_and_focus_read_the_numbers(opened, traces):
    page = opened(traces)
    # One stop for the Tab key in each text, not one for each token.
    assert page.locator(".text [tabindex='0']").count() == 3
    token(page, 0).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    assert readout(page)["lora-flow"] == pytest.approx(expected(traces["lora-flow"], 2, 0), abs=6e-4)
    page.keyboard.press("End")
    assert token(page, 9).evaluate("e => e === document.activeElement")
    page.keyboard.press("ArrowRight")
    assert "position 9" in page.locator("#numbers").inner_text()
    page.keyboard.press("ArrowLeft")
    assert "position 8" in page.locator("#numbers").inner_text()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert readout(page)["arrow"] == pytest.approx(expected(traces["arrow"], 0), abs=6e-4)
    page.keyboard.press("Escape")
    assert "Point at a token" in page.locator("#numbers").inner_text()


def test_a_tap_keeps_the_numbers(opened, traces):
    page = opened(traces)
    token(page, 6, panel=1).click()
    page.mouse.move(1, 1)
    assert readout(page)["arrow"] == pytest.approx(expected(traces["arrow"], 6), abs=6e-4)
    assert page.locator(".token.pinned").count() == 3


def cell(canvas, position: int, layer: int) -> dict[str, float]:
    """The middle of a cell, from the canvas's corner."""
    box = canvas.bounding_box()
    return {"x": (position + 0.5) / len(TOKENS) * box["width"], "y": (3 - layer + 0.5) / 4 * box["height"]}


def test_a_click_in_a_heat_map_chooses_layer_and_token(opened, traces):
    page = opened(traces)
    panels = page.locator(".panel")
    assert [panels.nth(i).locator("canvas").count() for i in range(3)] == [3, 3, 0]
    assert "There is no heat map" in panels.nth(2).locator(".maps").inner_text()
    assert panels.nth(1).locator(".range").inner_text().startswith("The weights of all methods are from")
    canvas = panels.nth(1).locator("canvas").nth(2)
    canvas.click(position=cell(canvas, 8, 1))
    assert page.locator("#layer-name").inner_text() == "1 of 0–3"
    assert readout(page)["arrow"] == pytest.approx(expected(traces["arrow"], 8, 1), abs=6e-4)
    assert page.locator(".token.pinned").all_inner_texts() == [TOKENS[8]] * 3
    mark = page.locator(".mark.at").first
    assert mark.is_visible()
    assert mark.evaluate("e => e.style.left") == "80%"
    assert page.locator(".mark.layer").first.evaluate("e => e.style.top") == "50%"


def test_a_heat_map_shows_each_weight_in_its_cell(opened):
    weights = torch.tensor([[[1.0], [0.5]], [[0.0], [-1.0]], [[-0.5], [9.0]]])[None]
    filler = torch.zeros(1, 997, 2, 1)
    trace = replace(make_trace(1000, adapters=("zh",)), weights=torch.cat([weights, filler + 1], dim=1))
    page = opened({"a": trace})
    pixel = "e => [0, 1, 2].map((t) => [1, 0].map((y) => [...e.getContext('2d').getImageData(t, y, 1, 1).data]))"
    (high, half), (zero, low), (low_half, clipped) = page.locator("canvas").evaluate(pixel)
    assert high == clipped == [45, 0, 75, 255]
    assert half == pytest.approx([128, 115, 172, 255], abs=2)
    assert zero == [255, 255, 255, 255]
    assert low == [127, 59, 8, 255]
    assert low_half == pytest.approx([224, 130, 20, 255], abs=2)
    assert page.locator(".scale span").all_inner_texts() == ["−1.000", "1.000"]
    said = page.locator(".range").inner_text()
    assert said == "The weights are from −1.000 to 9.000. Beyond the scale, with the colour of its end: 1."


def test_hovering_a_heat_map_reads_its_cell(opened, traces):
    page = opened(traces)
    canvas = page.locator("canvas").first
    canvas.hover(position=cell(canvas, 2, 3))
    assert "position 2 · prompt · layer 3" in page.locator("#numbers").inner_text()
    assert readout(page)["lora-flow"] == pytest.approx(expected(traces["lora-flow"], 2, 3), abs=6e-4)
    assert page.locator("#layer").input_value() == "0"


def test_methods_come_and_go(opened, traces):
    page = opened(traces)
    token(page, 6).click()
    buttons = page.locator("#methods button")
    buttons.nth(1).click()
    assert [panel.is_visible() for panel in page.locator(".panel").all()] == [True, False, True]
    assert list(readout(page)) == ["lora-flow", "qa-flora"]
    assert buttons.nth(1).get_attribute("aria-pressed") == "false"
    buttons.nth(0).click()
    buttons.nth(2).click()
    assert page.locator(".panel:visible").count() == 1
    buttons.nth(1).click()
    assert list(readout(page)) == ["arrow", "qa-flora"]


def test_one_adapter_alone(opened, traces):
    page = opened(traces)
    math = page.locator("#adapters button").nth(1)
    math.click()
    assert text_adapters(page) == [1] * len(TOKENS)
    hatched = page.locator(".panel").first.locator("[data-negative]")
    shown = hatched.evaluate_all("all => all.map((e) => Number(e.dataset.token))")
    assert shown == [p for p in range(len(TOKENS)) if expected(traces["lora-flow"], p)[1] < -0.0005]
    assert math.get_attribute("aria-pressed") == "true"
    math.click()
    assert text_adapters(page) != [1] * len(TOKENS)
    assert hatched.count() == 0


def test_letters_mark_where_another_adapter_takes_over(opened, traces):
    page = opened(traces)
    page.get_by_role("button", name="Letters in the text").click()
    shown = page.locator(".panel").first.locator(".text [data-token]")
    letters = shown.evaluate_all("all => all.map((e) => e.dataset.key ?? null)")
    tops = [dominating(expected(traces["lora-flow"], p)) for p in range(len(TOKENS))]
    starts = ["ABC"[top] if p == 0 or top != tops[p - 1] else None for p, top in enumerate(tops)]
    assert letters == starts
    assert token(page, 0).evaluate("e => getComputedStyle(e, '::before').content") == f'"{letters[0]}"'


def test_tables_have_each_layers_mean_of_the_generated_part(opened, traces):
    page = opened(traces)
    for index, trace in enumerate(traces.values()):
        rows = page.locator(".panel").nth(index).locator(".means tbody tr")
        generated = trace.shown_weights()[5:].mean(dim=0)
        assert numbers_of(rows.nth(0)) == pytest.approx(generated.mean(dim=0).tolist(), abs=6e-4)
        for layer in range(4):
            assert numbers_of(rows.nth(layer + 1)) == pytest.approx(generated[layer].tolist(), abs=6e-4)
    assert page.locator(".means h3").all_inner_texts() == [
        "Mean weights, generated tokens, by layer",
        "Mean weights, generated tokens, by layer",
        "Weights, by layer",
    ]
    page.locator(".panel").first.locator(".means tbody tr").nth(2).click()
    assert page.locator("#layer").input_value() == "2"
    assert "these weights are the prompt's" in page.locator(".panel").nth(2).locator(".notes").first.inner_text()


def test_hostile_tokens_stay_text(opened):
    trace = make_trace(len(HOSTILE), tokens=[HOSTILE], adapters=("<img src=x>", "</script>"), prompt_length=3)
    page = opened({"<u>a</u>": trace, "b": trace}, title="</title><script>alert(1)</script>")
    shown = page.locator(".panel").first.locator(".text [data-token]")
    assert [e.text_content() for e in shown.all()] == [printable(t) for t in HOSTILE]
    assert page.title() == "</title><script>alert(1)</script>"
    assert page.locator("img, u").count() == 0
    assert page.locator("h2").first.inner_text() == "<u>a</u>"
    for position in range(len(HOSTILE)):
        page.evaluate(f"pin({position})")
    assert page.locator("#numbers code").inner_text() == "(part of the next character)"


def test_it_fits_a_phone_and_the_dark(opened, traces):
    page = opened(traces)
    light = background(page.locator("body"))
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    lefts = page.locator(".panel").evaluate_all("all => all.map((e) => e.getBoundingClientRect().left)")
    assert len({*lefts}) == 1
    corner = "e => [...e.getContext('2d').getImageData(0, 0, 1, 1).data]"
    before = page.locator("canvas").first.evaluate(corner)
    page.emulate_media(color_scheme="dark")
    assert background(page.locator("body")) != light
    page.wait_for_function(f"String(({corner})(document.querySelector('canvas'))) !== '{','.join(map(str, before))}'")


def large_trace(method: str, seed: int) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    trace = make_trace(2000, prompt_length=700, layers=32, adapters=tuple(f"adapter {i}" for i in range(8)))
    return replace(trace, weights=torch.randn(1, 2000, 32, 8, generator=generator).softmax(-1), method=method)


def test_a_long_text_stays_usable(opened, tmp_path):
    traces = {name: large_trace(name, seed) for seed, name in enumerate(("lora-flow", "arrow"))}
    page = opened(traces)
    assert os.path.getsize(tmp_path / "trace.html") < 3.5e6
    # Spans for the tokens, cells for the tables; nothing for the half million weights.
    assert page.evaluate("document.querySelectorAll('*').length") < 8000
    assert page.locator("canvas").count() == 16
    set_layer(page, 18)
    tops = [dominating(expected(traces["arrow"], p, 17)) for p in range(2000)]
    found = text_adapters(page, 1)
    # Ties at three decimals may fall either way after rounding.
    assert sum(a == b for a, b in zip(found, tops, strict=True)) >= 1995
    canvas = page.locator("canvas").first
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.75, "y": box["height"] * 0.5 / 32})
    assert page.locator("#layer-name").inner_text() == "31 of 0–31"
    chosen = int(page.locator(".token.pinned").first.get_attribute("data-token"))
    assert chosen == pytest.approx(1500, abs=10)  # a pixel has several tokens
    page.mouse.move(1, 1)
    assert readout(page)["arrow"] == pytest.approx(expected(traces["arrow"], chosen, 31), abs=6e-4)
    # Far down in its box, and scrolled into sight.
    box, span = page.locator(".text").first.bounding_box(), token(page, chosen).bounding_box()
    assert box["y"] <= span["y"] <= box["y"] + box["height"]
    assert token(page, chosen).is_visible()

"""A trace in a notebook: every token once, escaped, on the colour of its largest weight."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import torch

from loraflow.visual.colours import adapter_colour
from loraflow.visual.notebook import trace_html
from tests.visual.test_trace import make_trace

TOKEN = re.compile(r'<span title="([^"]*)" style="background:(#\w{6})(\w{2});[^"]*">([^<]*)</span>')


def shown_tokens(trace):
    """(numbers on hover, colour, token) of each token of the picture."""
    return [(unescape(title), colour, unescape(text)) for title, colour, _, text in TOKEN.findall(trace_html(trace))]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_each_token_has_its_colour_and_numbers():
    trace = replace(make_trace(2), weights=torch.tensor([[0.2, 0.8], [0.9, -0.1]])[None, :, None])
    assert shown_tokens(trace) == [
        ("zh 0.20, math 0.80", adapter_colour(1), "t0"),
        ("zh 0.90, math -0.10", adapter_colour(0), "t1"),
    ]


def test_a_generated_token_shows_the_weights_that_produced_it():
    trace = replace(
        make_trace(3, prompt_length=2), weights=torch.tensor([[0, 1], [1, 0], [0, 1]])[None, :, None].float()
    )
    assert [colour for _, colour, _ in shown_tokens(trace)] == [adapter_colour(1), adapter_colour(0), adapter_colour(0)]
    html = trace_html(trace)
    assert html.index("t1<") < html.index("▸") < html.index("t2<")
    assert "the weights that produced it, those of the position before it" in html
    assert "▸" not in trace_html(replace(trace, prompt_length=0))


def test_padding_is_left_out():
    assert [token for *_, token in shown_tokens(make_trace(5, padding=2))] == ["t2", "t3", "t4"]


def test_every_row_is_shown():
    assert len(shown_tokens(make_trace(4, batch=3))) == 12


def test_text_is_escaped_and_loads_nothing():
    hostile = ["<script>alert(1)</script>", '"><img src=x>', "&amp;", "'\"`"]
    trace = make_trace(4, tokens=[hostile], adapters=('<b onload="x">', "a&b"))
    assert [token for *_, token in shown_tokens(trace)] == hostile
    tags = Tags()
    tags.feed(trace_html(trace))
    assert tags.open == []
    assert tags.seen == {"div", "span"}


def test_weights_of_any_sign_have_an_opacity():
    for weights in ([0.0, 0.0], [-1.0, -2.0], [50.0, -3.0]):
        trace = replace(make_trace(1), weights=torch.tensor(weights)[None, None, None])
        ((_, _, opacity, _),) = TOKEN.findall(trace_html(trace))
        assert int(opacity, 16) <= 0.61 * 255

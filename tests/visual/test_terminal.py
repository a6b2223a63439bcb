"""A trace in the terminal: every token once, as it is, in the colour of its largest weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console

from loraflow.visual.colours import adapter_colour
from loraflow.visual.terminal import render_trace
from tests.visual.test_trace import make_trace


def shown(trace, **options) -> str:
    """The picture as plain text."""
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(render_trace(trace, **options))
    return capture.get()


def styles(trace) -> dict[str, str]:
    """Each token's style."""
    text = render_trace(trace).renderables[1]
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}


def test_each_token_has_its_colour():
    found = styles(replace(make_trace(2), weights=torch.tensor([[0.2, 0.8], [0.9, -0.1]])[None, :, None]))
    assert adapter_colour(1) in found["t0"]
    assert adapter_colour(0) in found["t1"]


def test_a_generated_token_shows_the_weights_that_produced_it():
    trace = replace(
        make_trace(3, prompt_length=2), weights=torch.tensor([[0, 1], [1, 0], [0, 1]])[None, :, None].float()
    )
    found = styles(trace)
    assert [adapter_colour(0) in found[token] for token in ("t0", "t1", "t2")] == [False, True, True]
    assert [("bold" in found[token]) for token in ("t0", "t1", "t2")] == [False, False, True]
    assert "t0t1 ▸ t2" in shown(trace)
    assert "those of the position before" in shown(trace)
    assert "▸" not in shown(replace(trace, prompt_length=0))


def test_padding_is_left_out():
    picture = shown(make_trace(5, padding=2), numbers=True)
    assert "t1" not in picture
    assert "t2t3t4" in picture


def test_any_row_can_be_shown():
    trace = make_trace(2, batch=2, tokens=[["a", "b"], ["c", "d"]])
    assert "cd" in shown(trace, row=1)
    assert "ab" not in shown(trace, row=1)


def test_numbers_are_those_of_the_picture():
    trace = replace(make_trace(3, prompt_length=2), weights=torch.tensor([[0, 1], [0.25, -0.5], [1, 1]])[None, :, None])
    rows = [
        line.split() for line in shown(trace, numbers=True).splitlines() if line.split()[0:1] in (["0"], ["1"], ["2"])
    ]
    assert rows == [
        ["0", "'t0'", "+0.000", "+1.000"],
        ["1", "'t1'", "+0.250", "-0.500"],
        ["2", "'t2'", "+0.250", "-0.500"],
    ]


def test_tokens_and_names_are_no_markup():
    tokens = ["[/INST]", "[red]", "[bold]x[/bold]", ":smile:"]
    picture = shown(make_trace(4, tokens=[tokens], adapters=("[b]", "math[/]")), numbers=True)
    assert "".join(tokens) in picture
    for token in tokens:
        assert repr(token) in picture
    assert picture.count("[b]") == 2
    assert picture.count("math[/]") == 2


def test_a_token_cannot_command_the_terminal():
    picture = shown(make_trace(1, tokens=[["\x1b]0;title\x07\x1b[2J"]]), numbers=True)
    assert "\x1b" not in picture
    assert "\x07" not in picture

"""A trace in the terminal: every token once, as it is, in the colour or after the name of its largest weight."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from loraflow.visual.colours import adapter_colour
from loraflow.visual.terminal import coloured_text, render_trace
from tests.visual.test_trace import make_trace


def shown(trace, *, colours=True, no_color=False, **options) -> str:
    """The picture as text: the colours' codes taken out, or as a console without colours has it."""
    console = Console(
        width=200, color_system="truecolor" if colours else None, force_terminal=colours, no_color=no_color, _environ={}
    )
    with console.capture() as capture:
        console.print(render_trace(trace, **options))
    return re.sub(r"\x1b\[[\d;]*m", "", capture.get())


def styles(trace) -> dict[str, str]:
    """Each token's style."""
    text = coloured_text(trace)
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
    # In the legend, the summary and the table.
    assert picture.count("[b]") == 3
    assert picture.count("math[/]") == 3
    plain = shown(make_trace(4, tokens=[tokens], adapters=("[b]", "math[/]")), colours=False)
    assert "[[b]] " in plain or "[math[/]] " in plain


def test_a_token_cannot_command_the_terminal():
    picture = shown(make_trace(1, tokens=[["\x1b]0;title\x07\x1b[2J"]]), numbers=True)
    assert "\x1b" not in picture
    assert "\x07" not in picture


WEIGHTS = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.5, 0.5], [0.5, 0.5], [0.7, 0.3]])[None, :, None]


@pytest.mark.parametrize("how", [{"colours": False}, {"no_color": True}], ids=["piped", "NO_COLOR"])
def test_without_colours_names_stand_before_the_tokens(how):
    picture = shown(replace(make_trace(6), weights=WEIGHTS), **how)
    assert "[zh] t0t1 [math] t2 [even] t3t4 [zh] t5" in picture
    assert "[name] stands before the tokens" in picture
    # What was generated is named anew, even if the adapter goes on.
    generated = shown(replace(make_trace(6, prompt_length=2), weights=WEIGHTS), **how)
    assert "[zh] t0t1 ▸ [zh] t2 [math] t3 [even] t4t5" in generated
    coloured = shown(replace(make_trace(6), weights=WEIGHTS))
    assert "t0t1t2t3t4t5" in coloured
    assert "[zh]" not in coloured


def rows_of(picture, first) -> list[list[str]]:
    """The cells of the lines that start so."""
    return [line.split() for line in picture.splitlines() if line.split()[:1] == [first]]


def test_the_summary_counts_tokens_and_averages_weights():
    picture = shown(replace(make_trace(6), weights=WEIGHTS))
    assert rows_of(picture, "zh") == [["zh", "50%", "+0.583"]]
    assert rows_of(picture, "math") == [["math", "17%", "+0.417"]]
    assert rows_of(picture, "even") == [["even", "33%"]]
    assert "of text" in picture
    # Generated tokens have the weights of the positions before: 0.8, 0.1, 0.5, 0.5.
    parts = shown(replace(make_trace(6, prompt_length=2), weights=WEIGHTS))
    assert rows_of(parts, "zh") == [["zh", "100%", "+0.850", "25%", "+0.475"]]
    assert rows_of(parts, "math") == [["math", "0%", "+0.150", "25%", "+0.525"]]
    assert rows_of(parts, "even") == [["even", "0%", "50%"]]
    assert "even" not in shown(replace(make_trace(3), weights=WEIGHTS[:, :3]))


def test_a_padded_row_counts_its_own_tokens_only():
    weights = torch.tensor([[9.0, 0.0], [0.2, 0.8], [0.4, 0.6]])[None, :, None]
    picture = shown(replace(make_trace(3, padding=1), weights=weights))
    assert rows_of(picture, "math") == [["math", "100%", "+0.700"]]


def test_weights_of_a_prompt_are_said_to_be_the_prompts_and_shown_by_layer():
    layers = torch.tensor([[0.25, 0.75], [0.5, -0.5]])
    trace = replace(make_trace(4), weights=layers.expand(1, 4, 2, 2), level="query")
    picture = shown(trace)
    assert "these weights are the prompt's, the same for every token" in picture
    assert rows_of(picture, "0") == [["0", "+0.250", "+0.750"]]
    assert rows_of(picture, "1") == [["1", "+0.500", "-0.500"]]
    by_token = shown(replace(trace, level="token"))
    assert "prompt's" not in by_token
    assert rows_of(by_token, "0") == []


def test_other_things_a_reader_must_know():
    assert "the mean over its modules" in shown(replace(make_trace(), place="module"))
    assert "the whole model's, the same in every layer" in shown(replace(make_trace(), place="model"))
    assert "the same for every prompt and token" in shown(replace(make_trace(), level="task"))

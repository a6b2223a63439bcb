"""The paper's figures: they show the numbers, read without colour, and are written whole."""

from __future__ import annotations

import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib
import pytest
import torch

from loraflow.analysis.weights import WeightStatistics, WeightSummary
from loraflow.errors import DataError, LoraflowError
from loraflow.visual import drawing, figures
from loraflow.visual.colours import adapter_colour
from tests.visual.test_trace import make_trace


def make_summary(sites, adapters):
    mean = torch.rand(sites, adapters, dtype=torch.float64)
    return WeightSummary(
        count=torch.full((sites,), 50),
        mean=mean,
        std=torch.rand(sites, adapters),
        low=mean - 0.3,
        high=mean + 0.2,
        absolute=mean.abs(),
        largest=torch.rand(sites, adapters),
        entropy=torch.rand(sites),
        silent=torch.zeros(sites),
    )


def make_statistics(adapters=("zh", "math"), layers=(0, 1, 2, 3), level="token"):
    count = len(adapters)
    return WeightStatistics(
        adapters=tuple(adapters),
        method="lora-flow",
        level=level,
        place="layer",
        examples=5,
        layers=layers,
        answers=make_summary(len(layers), count),
        prompts=None,
        overall=make_summary(1, count),
        tenths=make_summary(10, count),
    )


TASKS = ["zh-math", "es-math", "zh-code"]


def make_report(gates=("zh-math", "zh-code")):
    """A report of two gates on three tasks; the gain of gate g on task t is (10 g + t + 1) / 100."""
    rows = [
        {"contender": "math", "task": task, "fitted_on": None, "mean": 0.3, "interval": [0.2, 0.4]}
        | {"difference": None, "difference_interval": None}
        for task in [*TASKS, "average"]
    ]
    for g, gate in enumerate(gates):
        for t, task in enumerate([*TASKS, "average"]):
            gain = (10 * g + t + 1) / 100
            rows.append(
                {"contender": f"flow of {gate}", "task": task, "fitted_on": gate, "mean": 0.3, "interval": [0.2, 0.4]}
                | {"difference": gain, "difference_interval": [gain - 0.02, gain + 0.03]}
            )
    return {"reference": "math", "tasks": TASKS, "rows": rows}


def marked_lines(axes):
    """The lines with markers, which are the adapters' own."""
    return [line for line in axes.lines if line.get_marker() not in ("", "None", None)]


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.parametrize("name", ["layers", "decoding"])
def test_lines_are_the_means_and_bands_the_percentiles(name):
    found = make_statistics(("zh", "math", "code"), layers=(0, 2, 5))
    figure = getattr(figures, f"{name}_figure")(found, title="A title")
    summary, at = (found.answers, [0, 2, 5]) if name == "layers" else (found.tenths, list(range(1, 11)))
    (axes,) = figure.axes
    lines = marked_lines(axes)
    assert len(lines) == len(axes.collections) == 3
    for index, (line, band) in enumerate(zip(lines, axes.collections, strict=True)):
        assert list(line.get_xdata()) == at
        assert list(line.get_ydata()) == summary.mean[:, index].tolist()
        corners = {(x, round(y, 9)) for x, y in band.get_paths()[0].vertices.tolist()}
        for site, x in enumerate(at):
            assert (x, round(summary.low[site, index].item(), 9)) in corners
            assert (x, round(summary.high[site, index].item(), 9)) in corners
    assert {"A title", "zh", "math", "code", "10–90 % of tokens"} <= {*texts(figure)}


def test_bands_of_whole_prompts_are_named_so():
    assert "10–90 % of prompts" in texts(figures.layers_figure(make_statistics(level="query")))
    assert "10–90 % of tokens" in texts(figures.decoding_figure(make_statistics(level="query")))


def test_adapters_are_told_apart_without_colour():
    names = [f"adapter {i}" for i in range(8)]
    figure = figures.layers_figure(make_statistics(names))
    lines = marked_lines(figure.axes[0])
    assert len({line.get_marker() for line in lines}) == 8
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 8
    assert [line.get_color() for line in lines] == [adapter_colour(i) for i in range(8)]
    shown = [handle for handle in figure.legends[0].legend_handles if handle.get_label() != "10–90 % of tokens"][:8]
    assert [handle.get_marker() for handle in shown] == [line.get_marker() for line in lines]
    bars = figures.transfer_figure({**make_report(), "tasks": TASKS}).axes[0].patches
    assert len({bar.get_hatch() for bar in bars}) == 3


def test_an_answer_has_the_weights_that_produced_it():
    trace = make_trace(seq=9, prompt_length=4, padding=1, layers=3)
    figure = figures.answer_figure(trace)
    (axes,) = figure.axes
    expected = trace.weights[0, 3:8].mean(dim=1).double()
    for index, line in enumerate(marked_lines(axes)):
        torch.testing.assert_close(torch.tensor(line.get_ydata()), expected[:, index])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["t4", "t5", "t6", "t7", "t8"]


def test_without_a_prompt_all_real_tokens_are_shown():
    trace = make_trace(seq=6, padding=2)
    (axes,) = figures.answer_figure(trace).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["t2", "t3", "t4", "t5"]


def test_another_row_can_be_shown():
    trace = make_trace(seq=3, batch=2, tokens=[["a", "b", "c"], ["d", "e", "f"]])
    (axes,) = figures.answer_figure(trace, row=1).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["d", "e", "f"]
    expected = trace.weights[1].mean(dim=1)[:, 0].double()
    torch.testing.assert_close(torch.tensor(marked_lines(axes)[0].get_ydata()), expected)


@pytest.mark.parametrize(("tokens", "panels"), [(1, 1), (32, 1), (33, 2), (100, 4)])
def test_long_answers_go_on_in_further_panels(tokens, panels):
    trace = make_trace(seq=tokens + 2, prompt_length=2)
    grid = figures.answer_figure(trace).axes
    assert len(grid) == panels
    shown = [y for axes in grid for y in marked_lines(axes)[0].get_ydata()]
    torch.testing.assert_close(torch.tensor(shown), trace.token_weights()[2:, 0].double())
    assert [label.get_text() for axes in grid for label in axes.get_xticklabels()] == trace.tokens[0][2:]
    assert len({axes.get_xlim() for axes in grid}) == len({axes.get_ylim() for axes in grid}) == 1


HOSTILE = ["$x$", "$\\frac{$", "_a", "\n", " ", "\x00\x1b[2J", "", "答案是", "\U0010fffd", "函", "</s>"]


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_any_token_and_name_can_be_shown(tmp_path, ending):
    trace = make_trace(seq=len(HOSTILE), tokens=[HOSTILE], adapters=("_hidden", "$\\bad{$", "数学"), layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.answer_figure(trace, title="$\\oops{$ 标题")
        assert figures.save_figure(figure, tmp_path / f"answer{ending}")
        figures.save_figure(figures.layers_figure(make_statistics(("_a", "$b"))), tmp_path / f"layers{ending}")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[:5] == ["$x$", "$\\frac{$", "_a", "↵", "␣"]
    assert "\x1b" not in labels[5]
    assert labels[8] == "[10FFFD]"
    assert {"_hidden", "$\\bad{$"} <= {*texts(figure)}


def test_chinese_is_drawn_where_a_font_has_it():
    if len(drawing.fonts()) == 1:
        pytest.skip("no font with Chinese characters is installed")
    assert figures._token_label(" 答案是") == "答案是"

    def pixels(token):
        figure = figures.answer_figure(make_trace(seq=1, tokens=[[token]]))
        with drawing.figure_style():
            return bytes(matplotlib.backends.backend_agg.FigureCanvasAgg(figure).print_to_buffer()[0])

    # Boxes for missing characters would all look alike.
    assert pixels("汉") != pixels("字")


def test_without_such_a_font_code_points_are_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(drawing, "fonts", lambda: ("DejaVu Sans",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.answer_figure(make_trace(seq=2, tokens=[["汉b", "да"]]), title="汉")
        figures.save_figure(figure, tmp_path / "x.png")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["[6C49]b", "да"]
    assert "[6C49]" in texts(figure)


def test_an_answer_without_tokens_is_refused():
    with pytest.raises(LoraflowError, match="Row 0 of the trace has no token after the 4 positions of its prompt"):
        figures.answer_figure(make_trace(seq=4, prompt_length=4))


def test_bars_are_the_gains():
    axes = figures.transfer_figure(make_report()).axes[0]
    # Gate by gate from left to right, task by task.
    bars = sorted(axes.patches, key=lambda bar: bar.get_x())
    assert [round(bar.get_height(), 6) for bar in bars] == [1, 2, 3, 11, 12, 13]
    assert [bar.get_facecolor() for bar in bars[:3]] == [bar.get_facecolor() for bar in bars[3:]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["flow of zh-math", "flow of zh-code"]
    for place, bar in enumerate(bars[:3]):
        assert abs(bar.get_x() + bar.get_width() / 2 - (place - 1) * bar.get_width()) < 1e-9
    middles = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in bars}
    intervals = {
        round(line.get_xdata()[0], 6): list(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 1.1
    }
    for place, height in middles.items():
        assert intervals[place] == pytest.approx([height - 2, height + 3])
    assert axes.get_ylabel() == "gain over math (points)"


def test_each_gates_own_task_is_marked():
    axes = figures.transfer_figure(make_report()).axes[0]
    marks = [text for text in axes.texts if text.get_gid() == "own task"]
    bars = sorted(axes.patches, key=lambda bar: bar.get_x())
    middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    # zh-math is the first task, zh-code the third.
    assert sorted(mark.xy[0] for mark in marks) == pytest.approx([middles[0], middles[5]])
    assert sorted(mark.xy[1] for mark in marks) == pytest.approx([1 + 3, 13 + 3])


def test_gates_with_one_name_are_told_apart_by_their_tasks():
    report = make_report()
    rows = [{**row, "contender": "flow"} if row["fitted_on"] else row for row in report["rows"]]
    axes = figures.transfer_figure({**report, "rows": rows}).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["flow\n(zh-math)", "flow\n(zh-code)"]


def test_gains_without_intervals_or_differences():
    report = make_report(["zh-math"])
    report["rows"] = [{**row, "difference_interval": None} for row in report["rows"]]
    report["rows"][5]["difference"] = None
    gains = figures.transfer_gains(report)
    assert [(gain.task, gain.interval, gain.own) for gain in gains] == [
        ("zh-math", None, True),
        ("zh-code", None, False),
    ]
    axes = figures.transfer_figure(report).axes[0]
    assert [round(bar.get_height(), 6) for bar in axes.patches] == [1, 3]
    assert len(axes.lines) == 1


def test_reports_without_gates_are_refused():
    with pytest.raises(DataError, match=r"No row of the report has both `fitted_on` and a `difference`.* 'math'"):
        figures.transfer_figure(make_report(gates=()))


@pytest.mark.parametrize(
    "report", [{}, [1], None, {"reference": "a", "tasks": ["b"], "rows": [{"task": "b"}]}], ids=str
)
def test_other_files_are_no_reports(report):
    with pytest.raises(DataError, match=r"This is no report of a comparison: .*Give the report.json that `loraflow"):
        figures.transfer_gains(report)


def test_files_are_what_their_endings_say(tmp_path):
    figure = figures.layers_figure(make_statistics())
    both = figures.save_figure(figure, tmp_path / "deep" / "layers")
    assert both == [tmp_path / "deep" / "layers.png", tmp_path / "deep" / "layers.svg"]
    assert both[0].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ET.parse(both[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    # As paths: no reader needs the fonts.
    assert "<text" not in both[1].read_text()
    (pdf,) = figures.save_figure(figure, str(tmp_path / "layers.PDF"))
    assert pdf.read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["layers.PDF", "layers.png", "layers.svg"]


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_files_of_one_figure_are_the_same(tmp_path, ending):
    found = make_statistics()
    for name in ("a", "b"):
        figures.save_figure(figures.layers_figure(found), tmp_path / f"{name}{ending}")
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(LoraflowError, match=r"ends in '.jpg'. Let it end in .png, .svg, .pdf, or in nothing"):
        figures.save_figure(figures.layers_figure(make_statistics()), tmp_path / "x.jpg")


def settings():
    """matplotlib's settings; reading the backend's would choose one."""
    return {key: matplotlib.rcParams[key] for key in list(matplotlib.rcParams.keys()) if key != "backend"}


def test_the_users_matplotlib_stays_as_it_is(tmp_path):
    matplotlib.rcParams["axes.facecolor"] = "red"
    try:
        before, backend = settings(), matplotlib.get_backend(auto_select=False)
        figure = figures.layers_figure(make_statistics())
        figures.save_figure(figure, tmp_path / "x.png")
        assert settings() == before
        assert matplotlib.get_backend(auto_select=False) == backend
        # Nor does theirs reach the figure.
        assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)
    finally:
        matplotlib.rcdefaults()


def test_pyplot_is_not_needed(tmp_path):
    # pyplot would open windows; in a process of its own, for other tests may have imported it.
    code = (
        "import sys\n"
        "from tests.visual.test_figures import figures, make_statistics\n"
        "figures.save_figure(figures.layers_figure(make_statistics()), sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_matplotlib_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (figures.layers_figure, figures.decoding_figure):
        with pytest.raises(LoraflowError, match=r"Figures need matplotlib. Run: pip install 'loraflow\[plots\]'"):
            draw(make_statistics())
    with pytest.raises(LoraflowError, match="Figures need matplotlib"):
        figures.answer_figure(make_trace())
    with pytest.raises(LoraflowError, match="Figures need matplotlib"):
        figures.transfer_figure(make_report())


def test_padding_between_rows_is_no_token():
    trace = make_trace(seq=5, prompt_length=2)
    mask = trace.attention_mask.clone()
    mask[0, 4] = 0
    (axes,) = figures.answer_figure(replace(trace, attention_mask=mask)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["t2", "t3"]

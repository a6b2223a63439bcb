"""The table for a paper: what LaTeX reads is what was measured, and nothing in a name is read as a command."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from loraflow.evaluation.compare.latex import escaped
from loraflow.evaluation.compare.report import write_report
from tests.evaluation.compare.synthetic import synthetic_run

SCORES = {
    ("100 % & more_\\", "zh"): [[0.0, 0.0, 1.0, 0.0]],
    ("100 % & more_\\", "es"): [[1.0, 1.0, 0.0, 1.0]],
    ("high", "zh"): [[1.0, 1.0, 1.0, 1.0]],
    ("high", "es"): [[0.0, 0.0, 0.0, 0.0]],
}


def lines_of(tmp_path: Path, scores: dict, **plan: object) -> list[str]:
    comparison, store = synthetic_run(tmp_path, scores, **plan)
    write_report(comparison, store)
    return (store.root / "report.tex").read_text(encoding="utf-8").splitlines()


def test_each_row_has_its_scores(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, SCORES, title="A & B", limit=4)
    names = [line.strip().partition(" & ")[0] for line in lines if line.endswith(r"\\")]
    assert names == ["Method", r"100 \% \& more\_\textbackslash{}", "high"]
    text = "\n".join(lines)
    assert r"& 25.0 {\scriptsize [4.6, 69.9]} & \textbf{75.0} {\scriptsize [30.1, 95.4]} & " in text
    assert r"high & \textbf{100.0} {\scriptsize [51.0, 100.0]} & 0.0 {\scriptsize [0.0, 49.0]} & " in text
    assert r"\begin{tabular}{lrrr}" in text
    assert r"\caption{A \& B. Last-number, per cent, with 95\,\% intervals; $^{*}$ differs from high at 5\,\% (" in text
    assert text.count("{") == text.count("}")


def test_a_star_is_a_difference_and_a_missing_cell_a_dash(tmp_path: Path) -> None:
    scores = {
        ("low", "zh"): [[0.0] * 20],
        ("low", "es"): [None],
        ("high", "zh"): [[1.0] * 20],
        ("high", "es"): [[1.0] * 20],
    }
    text = "\n".join(lines_of(tmp_path, scores, limit=20))
    assert re.search(r"low & 0\.0\$\^\{\*\}\$ \{\\scriptsize \[.*\]\} & -- ", text)
    assert "; 1 cells are not finished.}" in text


@given(st.text())
def test_text_stays_text(text: str) -> None:
    shown = escaped(text)
    # Every special character is behind a backslash or in a command of ours.
    rest = re.sub(r"\\text[a-z]+\{\}|\\[&%$#_{}]", "", shown)
    assert not set(rest) & set('\\&%$#_{}~^<>|"')
    assert "\n" not in shown

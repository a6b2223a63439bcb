"""A table as LaTeX, for the paper itself: it needs the package `booktabs`, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraflow.evaluation.compare.table import SIGNIFICANT, Row, Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex(table: Table, columns: Sequence[str], number: Callable[[Row, float], str]) -> str:
    r"""The scores of a table: each with its interval, the best of a column in bold, a star where it differs.

    Args:
        table: what was measured.
        columns: its tasks, and the average where there is one.
        number: a score of a row as text.

    Returns:
        A `table` environment, to be read in with `\input{report}`.
    """
    best = {column: _best(table, column) for column in columns}
    lines = []
    for name in table.contenders:
        rows = {column: table.row(name, column) for column in columns}
        cells = ["--" if row is None else _cell(row, number, bold=row.mean == best[at]) for at, row in rows.items()]
        lines.append(" & ".join([escaped(name), *cells]) + r" \\")
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{escaped(table.title)}. {_caption(table)}}}",
            f"  \\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"    \toprule",
            "    " + " & ".join(["Method", *map(escaped, columns)]) + r" \\",
            r"    \midrule",
            *(f"    {line}" for line in lines),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escaped(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return " ".join("".join(_SPECIAL.get(character, character) for character in text).split())


def _best(table: Table, column: str) -> float | None:
    rows = [row for name in table.contenders if (row := table.row(name, column))]
    if not rows:
        return None
    means = [row.mean for row in rows]
    return max(means) if rows[0].higher_is_better else min(means)


def _cell(row: Row, number: Callable[[Row, float], str], *, bold: bool) -> str:
    mean = number(row, row.mean)
    if bold:
        mean = f"\\textbf{{{mean}}}"
    interval = ", ".join(number(row, end) for end in row.interval)
    star = r"$^{*}$" if row.significant else ""
    return f"{mean}{star} {{\\scriptsize [{interval}]}}"


def _caption(table: Table) -> str:
    metrics = escaped(", ".join(sorted({row.metric for row in table.rows})))
    unit = ", per cent" if all(row.share for row in table.rows) else ""
    parts = [f"{metrics[:1].upper()}{metrics[1:]}{unit}, with 95\\,\\% intervals"]
    if lower := sorted({row.task for row in table.rows if not row.higher_is_better}):
        parts.append(f"lower is better: {escaped(', '.join(lower))}")
    if tests := sorted({row.test for row in table.rows if row.test is not None}):
        count = sum(row.p is not None for row in table.rows)
        parts.append(
            f"$^{{*}}$ differs from {escaped(table.reference)} at {100 * SIGNIFICANT:.0f}\\,\\% "
            f"({' or '.join(tests)} test, two-sided, Holm's correction for {count} comparisons)"
        )
    if table.missing:
        parts.append(f"{len(table.missing)} cells are not finished")
    return "; ".join(parts) + "."

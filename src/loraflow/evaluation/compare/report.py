"""A table as files: Markdown for a paper's appendix, LaTeX, CSV and JSON for other programs, HTML for people."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import peft
import torch
import transformers

import loraflow
from loraflow.evaluation.compare.comparison import Comparison
from loraflow.evaluation.compare.latex import latex
from loraflow.evaluation.compare.store import Cell, Store
from loraflow.evaluation.compare.table import AVERAGE, SIGNIFICANT, Row, Table, make_table, table_json
from loraflow.files import write_atomically

TEMPLATE = Path(__file__).with_name("report.html")
# Problems of each task whose answers the HTML report shows: those on which the methods differ come first.
SHOWN_PROBLEMS = 40


def write_report(comparison: Comparison, store: Store, wanted: Mapping[Cell, Mapping[str, Any]] | None = None) -> Table:
    """Write `report.md`, `.tex`, `.csv`, `.json` and `.html` beside a run's cells; cells count as `make_table` says."""
    table = make_table(comparison, store, wanted)
    settings = run_settings(comparison)
    files = {
        "report.md": markdown(table, settings),
        "report.tex": latex(table, _columns(table), number),
        "report.csv": table_csv(table),
        "report.json": json.dumps({**table_json(table), "settings": settings}, ensure_ascii=False, indent=1),
        "report.html": html(table, settings, _shown_answers(comparison, store)),
    }
    for name, text in files.items():
        write_atomically(store.root / name, text.encode())
    return table


def run_settings(comparison: Comparison) -> dict[str, str]:
    """What the figures depend on, for people."""
    setting = comparison.setting
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    limit = "all" if comparison.plan.limit is None else f"the first {comparison.plan.limit} of each task"
    return {
        "setting": comparison.plan.setting if isinstance(comparison.plan.setting, str) else setting.base,
        "adapters": ", ".join(setting.adapters),
        "precision": setting.quantization or setting.dtype,
        "seeds": ", ".join(map(str, comparison.plan.seeds)),
        "problems": limit + (", dev examples" if comparison.plan.problems == "dev" else ""),
        "machine": gpu or f"{_processor()}, {os.cpu_count()} cores",
        "versions": f"loraflow {loraflow.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}, Python {platform.python_version()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# Numbers as text.


def number(row: Row, value: float, sign: str = "") -> str:
    """A score of a row: shares in per cent, others as they are."""
    return f"{100 * value:{sign}.1f}" if row.share else f"{value:{sign}.4g}"


def score(row: Row) -> str:
    """A row's score with its interval."""
    return f"{number(row, row.mean)} [{', '.join(number(row, end) for end in row.interval)}]"


def difference(row: Row) -> str:
    """A row's difference to the reference with its interval; empty where there is none."""
    if row.difference is None or row.difference_interval is None:
        return ""
    return f"{number(row, row.difference, '+')} [{', '.join(number(row, e, '+') for e in row.difference_interval)}]"


def p_text(p: float | None) -> str:
    """A p-value, as far as it means anything."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def cost_texts(row: Row) -> list[str]:
    """What a row cost: learned values, examples, seconds to fit, tokens a second, memory."""
    return [
        f"{row.learned_parameters:,}" if row.learned_parameters else "",
        "" if row.examples is None else str(row.examples),
        "" if row.examples is None else f"{row.fit_s:.0f}",
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        "" if row.memory_mib is None else f"{row.memory_mib:,.0f}",
    ]


OWN_CHOSEN = "own adapter chosen"
# Of so many adapters' mean weights a table can be read; those of more are in `report.json`.
MOST_WEIGHTS = 12
COSTS = ("values learned", "examples", "fit, s", "tokens/s", "memory, MiB")


def own_chosen(row: Row) -> str:
    """In how many answers the adapter made for the problem has the most weight, in per cent; empty where unknown."""
    return "" if row.own_chosen is None else f"{100 * row.own_chosen:.1f}"


def _columns(table: Table) -> list[str]:
    """The tasks, and the average where there is one."""
    return [*table.tasks, *([AVERAGE] if any(row.task == AVERAGE for row in table.rows) else [])]


def _note(table: Table) -> str:
    metrics = sorted({row.metric for row in table.rows})
    tests = sorted({row.test for row in table.rows if row.test is not None})
    count = sum(row.p is not None for row in table.rows)
    note = (
        f"Score: {', '.join(metrics)}; shares in per cent, with 95 % intervals (Wilson's for one run of right or wrong "
        "answers and where all are alike, else by bootstrap over problems and runs)."
    )
    lower = sorted({row.task for row in table.rows if not row.higher_is_better})
    if lower:
        note += f" Lower is better: {', '.join(lower)}."
    if count:
        note += (
            f" A star: differs from {table.reference} at {100 * SIGNIFICANT:.0f} % ({' or '.join(tests)} test, "
            f"two-sided, corrected by Holm's method for {count} comparisons)."
        )
    once = sorted({row.contender for row in table.rows if row.seeds == 1 and row.seeded})
    if once and count:
        note += (
            f" {', '.join(once)}: learned with one seed only; tests and intervals know nothing of what another seed "
            "would give."
        )
    return " ".join([note, *dict.fromkeys(row.notice for row in table.rows if row.notice)])


# Markdown.


def markdown(table: Table, settings: Mapping[str, str]) -> str:
    """The scores, and what they cost with the comparison with the reference; for one task all in one table."""
    columns = _columns(table)
    parts = [f"# {table.title}", table.description.strip(), _missing(table)]
    scores = [["seeds", *columns], *(_scores(table, name, columns) for name in table.contenders)]
    names = ["method", *table.contenders]
    last = {name: row for name in table.contenders if (row := table.row(name, columns[-1]))}
    of = f", {columns[-1]}" if len(columns) > 1 else ""
    costs = [list(COSTS), *map(cost_texts, last.values())]
    against = [[f"difference to {table.reference}{of}", "p", "p, corrected"], *map(_against, last.values())]
    blocks = [against, costs] if any(row.difference is not None for row in last.values()) else [costs]
    if any(row.own_chosen is not None for row in last.values()):
        blocks.insert(0, [[OWN_CHOSEN], *([own_chosen(row)] for row in last.values())])
    if len(columns) == 1:
        parts += [_markdown_table(names, scores, *blocks), _note(table)]
    else:
        parts += [_markdown_table(names, scores), _note(table), _markdown_table(["method", *last], *blocks)]
    parts.append(_weights(table))
    parts.append("\n".join(f"- {key}: {value}" for key, value in settings.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _missing(table: Table) -> str:
    if not table.missing:
        return ""
    return f"**{len(table.missing)} cells are not finished**; run the same command again to measure them."


def _scores(table: Table, contender: str, columns: Sequence[str]) -> list[str]:
    rows = [table.row(contender, task) for task in columns]
    seeds = sorted({row.seeds for row in rows if row is not None and row.task != AVERAGE})
    cells = ["" if row is None else score(row) + "*" * row.significant for row in rows]
    return ["-".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))), *cells]


def _against(row: Row) -> list[str]:
    return [difference(row), p_text(row.p), p_text(row.p_corrected)]


def _weights(table: Table) -> str:
    rows = [row for row in table.rows if row.weights]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row.weights))
    if len(names) > MOST_WEIGHTS:
        return f"The mean fusion weights of {len(names)} adapters are in `report.json`."
    lines = [
        [row.task, *(f"{row.weights[n][0]:.3f} ± {row.weights[n][1]:.3f}" if n in row.weights else "" for n in names)]
        for row in rows
    ]
    heading = "Mean fusion weight of the answers' tokens, with its standard deviation between answers:"
    contenders = ["method", *(row.contender for row in rows)]
    return f"{heading}\n\n{_markdown_table(contenders, [['task', *names], *lines])}"


def _markdown_table(names: Sequence[str], *blocks: Sequence[Sequence[str]]) -> str:
    """A line for each name, with what each block of columns has for it; the first of all is the heading."""
    lines = [[name, *(cell for part in parts for cell in part)] for name, *parts in zip(names, *blocks, strict=True)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    escaped.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


# CSV.


def table_csv(table: Table) -> str:
    """One line for each row and task."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["contender", "task", "metric", "seeds", "problems", "mean", "low", "high", "difference", "difference_low",
            "difference_high", "test", "p", "p_corrected", "learned_parameters", "examples", "fit_s", "tokens_per_s",
            "memory_mib", "fitted_on", "own_chosen"]  # fmt: skip
    writer.writerow(head)
    for row in table.rows:
        differences = [row.difference, *(row.difference_interval or (None, None))]
        writer.writerow(
            [row.contender, row.task, row.metric, row.seeds, row.problems, row.mean, *row.interval, *differences,
             row.test, row.p, row.p_corrected, row.learned_parameters, row.examples, row.fit_s, row.tokens_per_s,
             row.memory_mib, row.fitted_on, row.own_chosen]
        )  # fmt: skip
    return text.getvalue()


# HTML.


def html(table: Table, settings: Mapping[str, str], answers: Mapping[str, Any]) -> str:
    """One page that needs nothing else: the table, a picture of it, what it cost, and answers to look at."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    columns = _columns(table)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    # A closing tag inside an answer must not end the page's script.
    data = json.dumps(answers, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    return template.render(
        table=table,
        columns=columns,
        note=_note(table),
        missing=_missing(table).replace("*", ""),
        settings=settings,
        costs=COSTS,
        number=number,
        difference=difference,
        p_text=p_text,
        cost_texts=cost_texts,
        own_heading=OWN_CHOSEN if any(row.own_chosen is not None for row in table.rows) else "",
        own_chosen=own_chosen,
        forests=[_forest(table, column) for column in columns],
        data=jinja2.utils.markupsafe.Markup(data.replace("\u2029", "\\u2029")),
    )


def _forest(table: Table, task: str) -> dict[str, Any]:
    """Where a task's dots and lines go, in per cent of the plot's width."""
    rows = [row for name in table.contenders if (row := table.row(name, task))]
    low, high = min(row.interval[0] for row in rows), max(row.interval[1] for row in rows)
    margin = 0.04 * (high - low) or 0.01
    low, high = low - margin, high + margin
    if rows[0].share:
        low, high = max(0.0, low), min(1.0, high)

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    reference = table.row(table.reference, task)
    return {
        "task": task,
        "low": number(rows[0], low),
        "high": number(rows[0], high),
        "reference": None if reference is None else place(reference.mean),
        "lines": [
            {"row": row, "mean": place(row.mean), "from": place(row.interval[0]), "to": place(row.interval[1])}
            for row in rows
        ],
    }


def _shown_answers(comparison: Comparison, store: Store) -> dict[str, Any]:
    """Some problems of each task with every method's answer of its first seed."""
    shown: dict[str, Any] = {}
    for task in dict.fromkeys(cell.task for cell in comparison.cells):
        found = {}
        for name in comparison.rows:
            cells = [cell for cell in comparison.cells if (cell.task, cell.method) == (task, name)]
            finished: list[Cell] = [cell for cell in cells if store.read(cell) is not None]
            if finished:
                record = store.read(finished[0])
                assert record is not None
                found[name] = (record.metric, store.read_items(finished[0]))
        if found:
            shown[task] = _problems(found)
    return shown


def _problems(found: Mapping[str, tuple[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    count = min(len(items) for _, items in found.values())

    def disagreement(position: int) -> float:
        scores = [items[position].scores[metric] for metric, items in found.values()]
        mean = sum(scores) / len(scores)
        return -sum((score - mean) ** 2 for score in scores)

    chosen = sorted(sorted(range(count), key=disagreement)[:SHOWN_PROBLEMS])
    first = next(iter(found.values()))[1]
    return [
        {
            "id": first[position].id,
            "prompt": first[position].prompt,
            "reference": first[position].reference,
            "answers": [
                {"method": name, "score": items[position].scores[metric], "text": _text(items[position].answer)}
                for name, (metric, items) in found.items()
            ],
        }
        for position in chosen
    ]


def _text(answer: Any) -> str:
    """An answer for people; of lm-evaluation-harness's responses the only one, where there is one text."""
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)

"""`loraflow advise`: its table is that of the pages, its choice the best measured row that is allowed."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from loraflow.cli import advise, app
from loraflow.cli.advice import FINETUNE, Situation, advise_on, read_table, ways
from loraflow.errors import LoraflowError
from loraflow.methods import get_method
from tests.test_docs import unknown_words

ROOT = Path(__file__).parents[2]
WAYS = {way.row: way for way in ways()}
PLACES = advise.Places("BASE", {"zh": "user/zh", "math": "user/math lora"})


def rows(page):
    """Every row of every table of a page, by its first cell: cells by column."""
    found, head = {}, None
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = [cell.strip() for cell in line.strip("|").split("|")]
        elif set(line) - set("|- "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(cells[0], []).append(dict(zip(head, cells, strict=True)))
    return found


def cell(page, row, column):
    (value,) = [found[column] for found in rows(page)[row] if column in found]
    return value


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_figures_are_those_of_the_pages(way):
    if way.answers is None:
        assert way.row not in rows("docs/world.md")
    else:
        assert cell("docs/world.md", way.row, "average") == way.answers
    if way.cost is not None:
        for column in ("prompt", "token"):
            assert cell("docs/methods/README.md", way.cost.row, column) == getattr(way.cost, column)


def test_other_rows_are_those_of_the_pages():
    served = read_table()["serving"]
    for column, value in served["columns"].items():
        assert cell(served["page"], served["row"], column) == value
    for machine in read_table()["machines"]:
        assert f"{machine['gib']} GiB" in machine["row"]
        for column in ("base that fits", "how"):
            assert cell("docs/scale.md", machine["row"], column) == machine[column]


@pytest.mark.parametrize("name", read_table()["quotes"])
def test_quotes_are_those_of_the_pages(name):
    quote = read_table()["quotes"][name]
    assert quote["text"] in " ".join((ROOT / quote["page"]).read_text(encoding="utf-8").split())


def test_what_was_measured_is_quoted():
    measured, quotes = read_table()["measured"], read_table()["quotes"]
    assert f"each {measured['examples']} training" in quotes["examples"]["text"]
    assert measured["adapters"] == 2
    assert "two adapters" in quotes["adapters"]["text"]


def test_no_other_figure_is_said():
    # Text of the command itself; figures come from the table and from what was asked.
    allowed = {"`adapters` (={situation.adapters}) must be at least 1: there is nothing to fuse."}
    for name in ("advise", "advice"):
        source = (ROOT / "src" / "loraflow" / "cli" / f"{name}.py").read_text(encoding="utf-8")
        said = re.findall(r'f?"((?:[^"\\]|\\.)*)"', re.sub(r'""".*?"""', "", source, flags=re.DOTALL))
        assert len(said) > 20
        assert {text for text in said if re.search(r"\d", re.sub(r"\{[^}]*\}", "", text))} <= allowed


def test_every_row_of_the_world_is_a_way():
    plan = yaml.safe_load((ROOT / "benchmarks" / "world.yaml").read_text(encoding="utf-8"))
    # What is compared with, and no way to a fusion.
    planned = {row: spec or {"method": row} for row, spec in plan["methods"].items()}
    planned = {row: spec for row, spec in planned.items() if row != "base" and "adapter" not in spec}
    measured = rows("docs/world.md").keys()
    assert planned.keys() & measured <= WAYS.keys() <= planned.keys()
    for row, way in WAYS.items():
        spec = planned[row]
        if "finetune" in spec:
            assert way.method == FINETUNE
            assert way.adapter == (None if spec["finetune"] == "new" else spec["finetune"])
        else:
            assert way.method == spec["method"]
            assert dict(option.split("=") for option in way.options) == {
                key: str(value) for key, value in spec.get("options", {}).items()
            }


@pytest.mark.parametrize("way", [way for way in WAYS.values() if way.method != FINETUNE], ids=lambda way: way.row)
def test_what_a_way_needs_is_what_its_method_learns_from(way):
    options = {key: int(value) if value.isdigit() else value for key, value in (o.split("=") for o in way.options)}
    method = get_method(way.method, ["zh", "math"], options)
    learns = {None: "nothing", "samples": "adapter data", "experts": "adapter data"}
    assert way.needs == learns.get(method.learns, "examples"), method.learns


@pytest.mark.parametrize(
    ("situation", "row", "equal"),
    [
        (Situation(2), "arrow", []),
        (Situation(2, adapter_data=True), "phatgoose", ["arrow"]),
        (Situation(2, examples=200), "adapter-core", []),
        (Situation(2, examples=200, may_change=True), "adapter-core", ["skill adapter, tuned"]),
        (Situation(2, examples=200, one_adapter=True), "adapter-core", []),
        (Situation(2, examples=200, token_cost=1.2), "module, normalised input", ["lora-flow, module", "new LoRA"]),
        (Situation(2, examples=200, token_cost=1.05), "lora-flow", ["lora-flow, step"]),
        (Situation(2, prompt_cost=1.13), "average", []),
    ],
)
def test_the_best_measured_row_that_is_allowed_is_advised(situation, row, equal):
    found = advise_on(situation)
    assert found.way.row == row
    assert [way.row for way in found.equal] == equal
    allowed = {way.row for way in [found.way, *found.equal, *found.unmeasured]}
    assert not allowed & found.left_out.keys()
    for way in WAYS.values():
        if way.row not in found.left_out and way.answers:
            assert way.interval[0] <= found.way.interval[0] or way in found.equal


@pytest.mark.parametrize(
    ("situation", "said"),
    [
        (Situation(3, examples=200), "Measured with 2 adapters, and there are 3: the order may be another."),
        (Situation(1), "With one adapter there is nothing to weigh"),
        (Situation(2, examples=20), "Measured with 200 examples, and there are 20: with so few, no page says"),
        (Situation(2, examples=2000), "Measured with 200 examples: no page says what more of them change."),
        (Situation(2, examples=200, may_change=True, token_cost=1.2), "models fusing is ahead of training weights"),
        (Situation(2, token_cost=1.0), "can be merged into the base by PEFT"),
    ],
)
def test_what_the_evidence_does_not_decide_is_said(situation, said):
    assert any(said in line for line in advise_on(situation).undecided)


def test_a_measured_case_is_not_doubted():
    found = advise_on(Situation(2))
    assert (found.undecided, found.equal, found.unmeasured) == ([], [], [])


def test_a_cost_that_was_not_measured_meets_no_limit():
    found = advise_on(Situation(2, examples=200, token_cost=9))
    assert found.left_out["adapter-core"] == (
        "has no row in docs/methods/README.md, so --token-cost cannot be answered for"
    )


@pytest.mark.parametrize("tasks", advise.Tasks)
def test_commands_exist_in_every_situation(tasks):
    lines = set()
    choices = ((1, 2, 5), (0, 20, 200), (False, True), (False, True), (None, 1.0, 1.05, 1.2), (False, True))
    for adapters, examples, data, change, token, one in itertools.product(*choices):
        situation = Situation(adapters, examples, data, change, None, token, one_adapter=one)
        lines.update(advise.commands(advise_on(situation), situation, PLACES, tasks))
    run = [shlex.split(line, comments=True) for line in lines]
    for words in run:
        assert words[0] == "loraflow"
        assert not unknown_words(words[1:]), words
    wanted = {"advise", "compare", "finetune", "fit", "info", "serve"} | ({"export"} if tasks == "one" else set())
    assert {words[1] for words in run} >= wanted


@pytest.mark.parametrize("way", ways(many=True), ids=lambda way: way.row)
def test_rows_of_many_adapters_are_those_of_their_page(way):
    assert cell(way.page, way.row, way.column) == way.answers
    method = get_method(way.method, ["zh", "math", "code"], dict(o.split("=") for o in way.options if "top_k" not in o))
    assert way.needs == {None: "nothing", "samples": "adapter data"}[method.learns]
    assert read_table()["measured"]["adapters"] < read_table()["many"]["above"] < read_table()["many"]["adapters"]


def test_among_many_adapters_samples_of_their_data_decide_and_their_folder_is_named():
    shown = CliRunner().invoke(app, ["advise", "--adapters", "50", "--adapter-data", "--base", "B"]).output.splitlines()
    assert shown[0].startswith("centroid, top 1: learns from each adapter's own data")
    assert "  docs/many.md: centroid, top 1: average of 16 tasks 89.7 [85.6, 93.4]*" in shown
    (fit,) = (line for line in shown if line.startswith("  loraflow fit"))
    assert fit.startswith("  loraflow fit --base B --adapters FOLDER --method centroid --method-option top_k=1 ")
    assert "  loraflow serve fusion --adapters FOLDER" in shown
    without = CliRunner().invoke(app, ["advise", "--adapters", "50"]).output
    assert "no method that looks at weights alone was worth its place here" in " ".join(without.split())
    assert advise_on(Situation(50, examples=200)).way.row == "adapter-core"


def test_it_prints_the_advice_its_evidence_and_its_commands():
    arguments = ["--lora-modules", "zh=user/zh", "math=user/math", "--base", "user/base", "--examples", "200"]
    shown = CliRunner().invoke(
        app, ["advise", *arguments, "--memory-gib", "30", "--token-cost", "1.2", "--tasks", "many"]
    )
    assert shown.exit_code == 0, shown.output
    for line in (
        "module, normalised input: learns from examples of the task; looks at the input",
        "  docs/world.md: module, normalised input: average 50.8 [48.6, 53.0]*",
        "  docs/methods/README.md: lora-flow, module: prompt 1.11, token 1.11",
        "  docs/scale.md: one GPU of 24 GiB: 7B in bfloat16 with gradient checkpointing; 13B in 4-bit; "
        "`--quantization bnb-4bit`",
        "  Its interval overlaps with those of: lora-flow, module; new LoRA. The table does not tell them apart.",
        "  trains an adapter further (--may-change-adapters): language adapter, tuned; skill adapter, tuned",
        "  loraflow fit --base user/base --lora-modules zh=user/zh math=user/math --method lora-flow --method-option "
        "granularity=module reads=normalized --data task-a-train.jsonl --dev task-a-dev.jsonl --output task-a",
        "  loraflow serve task-a task-b",
        "  docs/serving.md: every adapter costs every request its part of the low-rank pass.",
    ):
        assert line in shown.output.splitlines()


def test_less_memory_than_any_row_has_is_said():
    shown = CliRunner().invoke(app, ["advise", "--adapters", "2", "--memory-gib", "8", "--token-cost", "1"])
    assert "docs/scale.md: begins at 16 GiB; `loraflow info` says what yours takes" in shown.output
    assert shown.output.startswith("No measured method is left.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "How many adapters there are is missing. Give --adapters or --lora-modules."),
        (["--adapters", "0"], "(=0) must be at least 1: there is nothing to fuse."),
        (
            ["--adapters", "3", "--lora-modules", "a=b"],
            "`--adapters` (=3) and `--lora-modules` (=1) count differently.",
        ),
    ],
)
def test_what_is_wrong_is_said(arguments, said):
    result = CliRunner().invoke(app, ["advise", *arguments])
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())


def test_the_library_says_the_same():
    with pytest.raises(LoraflowError, match=r"`adapters` \(=0\) must be at least 1"):
        advise_on(Situation(0))


def test_the_page_of_many_adapters_names_what_was_not_run():
    study = ROOT / "src" / "loraflow" / "evaluation" / "studies" / "many.yaml"
    text = (ROOT / "docs" / "many.md").read_text(encoding="utf-8")
    (unmeasured,) = (part for part in text.split("\n\n") if part.startswith("Not measured: "))
    for method in ("spectr", "norm-max", "lag", "lora-retriever", "ramole"):
        assert method in study.read_text(encoding="utf-8")
        assert not any(row.startswith(method) for row in rows("docs/many.md"))
        assert f"`{method}`" in unmeasured

"""The example that README and docs show is the one that `scripts/showcase.py` has recorded, and its sums are right."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest

from loraflow.demo.tasks import in_language, load_task
from loraflow.evaluation import get_scorer
from tests.test_docs import PAGES, ROOT

spec = importlib.util.spec_from_file_location("showcase", ROOT / "scripts" / "showcase.py")
showcase = importlib.util.module_from_spec(spec)
spec.loader.exec_module(showcase)

RECORD = json.loads(showcase.RECORD.read_text(encoding="utf-8"))


def good(answer, problem):
    right = get_scorer("last-number")(answer, {"answer": problem.answer}) == 1
    return right and in_language(answer, problem.language)


def test_pages_say_what_is_recorded():
    marked = 0
    for page in showcase.pages():
        text = page.read_text(encoding="utf-8")
        assert showcase.filled(text, RECORD) == text, f"{page.name}: run `python scripts/showcase.py --only-text`"
        marked += text.count("<!-- showcase: ")
        assert text.count("<!-- showcase: ") == text.count("<!-- end of showcase -->")
    assert marked >= len(showcase.BLOCKS)


@pytest.mark.parametrize("kind", [showcase.SOLVED, showcase.FAILED])
def test_the_problems_are_those_of_the_rule(kind):
    shown = RECORD[kind]
    problem = load_task(RECORD["task"]).test[shown["index"]]
    assert (shown["prompt"], shown["reference"]) == (problem.prompt, problem.completion)
    assert good(shown["answers"]["lora-flow"], problem) is (kind == showcase.SOLVED)
    assert good(shown["reference"], problem)


def test_the_first_two_of_a_demo_are_taken(tmp_path, monkeypatch):
    task = load_task("zh-math")
    verdicts = [False, False, True, True]
    (tmp_path / "answers").mkdir()
    for method in ("base", "lora-flow"):
        lines = [
            {"prompt": p.prompt, "answer": method, "in_language": v} for p, v in zip(task.test, verdicts, strict=False)
        ]
        text = "\n".join(map(json.dumps, lines))
        (tmp_path / "answers" / f"{method}.jsonl").write_text(text, encoding="utf-8")
    results = {"seed": 3, "results": [{"method": name, "seconds": 1.0} for name in ("base", "lora-flow")]}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    monkeypatch.setattr(showcase, "marked_answer", lambda model, prompt: f"[a] {prompt}")
    record = showcase.make_record(tmp_path, model=None)
    assert (record[showcase.SOLVED]["index"], record[showcase.FAILED]["index"]) == (2, 0)
    assert record[showcase.SOLVED]["answers"] == {"base": "base", "lora-flow": "lora-flow"}
    assert record["results"] == [{"method": "base"}, {"method": "lora-flow"}]


def test_no_shown_sum_is_wrong():
    # But where a page says that it is: in the answers of the record, which are marked.
    for page in PAGES:
        text = showcase._MARKED.sub("", page.read_text(encoding="utf-8"))
        for left, sign, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text):
            assert int(result) == int(left) + (int(right) if sign == "+" else -int(right)), f"{page.name}: {left}"

"""The paper's problems, prompts and scores, as its task files want them.

The texts are those of the official evaluation, [thunlp/LoRAFlow](https://github.com/thunlp/LoRAFlow); the data is the
folder `data/` of that repository, and stays where it is.
"""

from __future__ import annotations

import ast
import json
import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraflow.errors import DataError
from loraflow.evaluation.paper.answers import official_answer, official_gold
from loraflow.evaluation.sandbox import run_tests
from loraflow.evaluation.scoring import extract_code, same_number

if TYPE_CHECKING:
    from datasets import Dataset

DATA_VARIABLE = "LORAFLOW_PAPER_DATA"
_IMPORT = re.compile(r"^(?:from\s+\S+\s+import\s.+|import\s.+)$", re.MULTILINE)
_INDENT = "    "

Record = dict[str, Any]


def load_math(language: str, **metadata: Any) -> dict[str, Dataset]:
    """The translated MGSM problems of a language: `prompt`, `question`, `answer`; 250 to test, 100 for dev.

    Args:
        language: "zh", "ru" or "es".
        metadata: of the task; `loraflow_paper_data` names the folder, and goes before the environment variable.
    """
    folder = _folder(metadata)
    system = _instruction(folder, f"{language}_math")
    return _splits(folder, f"{language}_math", lambda record: math_problem(record, system))


def load_code(language: str, **metadata: Any) -> dict[str, Dataset]:
    """The translated HumanEval problems of a language, 164 to test, and 20 of MBPP for dev.

    Fields: `prompt`; `stub`, the function to complete; `setup`, what it takes for granted; `entry_point`; `tests`;
    `solution`.
    """
    folder = _folder(metadata)
    instruction = _instruction(folder, f"{language}_code")

    def problem(record: Record) -> Record:
        make = humaneval_problem if "entry_point" in record else mbpp_problem
        return make(record, instruction)

    return _splits(folder, f"{language}_code", problem)


def math_problem(record: Record, system: str) -> Record:
    """A word problem and its official prompt."""
    prompt = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{record['question']} [/INST]"
    return {"prompt": prompt, "question": record["question"], "answer": str(record["answer"])}


def humaneval_problem(record: Record, instruction: str) -> Record:
    """A problem of HumanEval and its official prompt: no system block, and tabs for four spaces each."""
    stub = record["prompt"]
    shown = stub.strip().replace(_INDENT, "\t")
    return {
        "id": record["task_id"],
        "prompt": f"[INST]{instruction}:\n{shown}\n\n[/INST]",
        "stub": stub,
        "setup": setup_of(stub, record["entry_point"]),
        "entry_point": record["entry_point"],
        "tests": [record["test"], f"check({record['entry_point']})"],
        "solution": record["canonical_solution"],
    }


def mbpp_problem(record: Record, instruction: str) -> Record:
    """A problem of MBPP and its official prompt."""
    tests = "\n".join(record["test_list"])
    return {
        "id": str(record["task_id"]),
        "prompt": f'"""[INST]{instruction}: {record["text"]}[/INST]\n{tests}"""',
        "stub": "",
        "setup": record["test_setup_code"],
        "entry_point": "",
        "tests": record["test_list"],
        "solution": record["code"],
    }


def setup_of(stub: str, entry_point: str) -> str:
    """What a stub lets its function take for granted: its imports, and the helpers beside that function.

    Some translated stubs are no Python any more; of those, the import lines that still are.
    """
    try:
        tree = ast.parse(stub)
    except SyntaxError:
        return "\n".join(line for line in _IMPORT.findall(stub) if _parses(line))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    # Where translation has renamed the function, the one to write is the last.
    asked = [node for node in functions if node.name == entry_point] or functions[-1:]
    kept = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)]
    return "\n".join(ast.unparse(node) for node in kept if node not in asked)


def program_of(answer: str, stub: str, entry_point: str) -> str:
    """The program in an answer: by itself where it defines the function, else what it adds to the stub.

    Tabs become four spaces, as in the official evaluation: the prompt shows tabs.
    """
    text = answer.replace("\r", "").replace("\t", _INDENT)
    code = extract_code(text)
    if not stub or re.search(rf"^(?:(?:async )?def {entry_point}\b|{entry_point} *=)", code, re.MULTILINE):
        return code
    # A body by itself may begin with a function inside, which looks like a program.
    body = code if "```" in text else text.strip("\n")
    # It may come without the indentation of all its lines, or of its first.
    layouts = [body] if body[:1].isspace() else [textwrap.indent(body, _INDENT), _INDENT + body]
    programs = [extract_code(f"{stub.rstrip()}\n{layout}") for layout in layouts]
    return max(programs, key=lambda program: len(program.splitlines()))


def score_math(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the last number is the answer's (the paper's text), and whether the official code's number is."""
    return {
        "exact_match": float(same_number(results[0], doc["answer"])),
        "official_exact_match": float(official_answer(results[0]) == official_gold(doc["answer"])),
    }


def score_code(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the program passes its problem's tests, in the sandbox."""
    program = program_of(results[0], doc["stub"], doc["entry_point"])
    return {"pass@1": float(run_tests(f"{doc['setup']}\n{program}", doc["tests"]).passed)}


def _folder(metadata: Mapping[str, Any]) -> Path:
    """Where the paper's data is.

    Raises:
        DataError: if that is not known, or there is none.
    """
    named = metadata.get("loraflow_paper_data") or os.environ.get(DATA_VARIABLE)
    remedy = (
        f"Clone https://github.com/thunlp/LoRAFlow and set {DATA_VARIABLE} to its folder `data` (the one with `test`, "
        "`dev` and `system_prompts.json`)."
    )
    if not named:
        raise DataError(f"The paper's tasks need its data, and {DATA_VARIABLE} is not set. {remedy}")
    if not (Path(named) / "system_prompts.json").is_file():
        raise DataError(f"{DATA_VARIABLE} (={str(named)!r}) has no `system_prompts.json` in it. {remedy}")
    return Path(named)


def _instruction(folder: Path, name: str) -> str:
    return str(json.loads((folder / "system_prompts.json").read_text(encoding="utf-8"))[name])


def _splits(folder: Path, name: str, problem: Any) -> dict[str, Dataset]:
    from datasets import Dataset

    return {
        split: Dataset.from_list(list(map(problem, _records(folder / split / f"{name}_{split}.jsonl"))))
        for split in ("test", "dev")
    }


def _records(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        DataError: if there is no such file.
    """
    if not path.is_file():
        raise DataError(f"The paper's data has no file {path}. Clone https://github.com/thunlp/LoRAFlow anew.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _parses(line: str) -> bool:
    try:
        ast.parse(line)
    except SyntaxError:
        return False
    return True

"""Scoring one generated answer against its example.

A `Scorer` is any function of the generated text and the example; it returns a
number between 0 and 1. The built-in ones:

| name | fields of the example | score |
|---|---|---|
| `exact-match` | `completion` | 1 if equal, but for white space |
| `last-number` | `answer`, or else `completion` | 1 if the last number is the answer's: the rule of MGSM |
| `code-tests` | `tests`, and `setup` if there is one | 1 if the code passes all tests in the sandbox |

To add one, put it in `SCORERS`. One that is slow, or runs code, can have a method `check` of the example, which raises
what the scorer would if the example lacks what it reads; before training, this is asked of every example.
"""

from __future__ import annotations

import ast
import re
import textwrap
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import Any, Protocol, TypeVar

from loraflow.errors import DataError, SandboxError, did_you_mean
from loraflow.evaluation.sandbox import DEFAULT_LIMITS, Limits, check_tests, run_tests

Record = Mapping[str, Any]
"""An example as it was given, whose fields the scorers read."""


_S = TypeVar("_S", bound=Callable[..., float])


class Scorer(Protocol):
    """Says how good one answer is."""

    def __call__(self, generated: str, example: Record) -> float:
        """Score `generated`, the model's answer without the prompt, from 0 (wrong) to 1 (right)."""


# ---------------------------------------------------------------------------------------------------------- numbers

# Full-width forms, the minus sign and LaTeX's ways to write a thousands separator. The full-width comma stays: in
# Chinese it separates clauses, not digits.
_PLAIN_CHARACTERS = str.maketrans("０１２３４５６７８９．－−", "0123456789.--")
_LATEX_SEPARATORS = ((re.compile(r"(?<=\d)\{,\}(?=\d)"), ","), (re.compile(r"(?<=\d)\\[,; ](?=\d{3})"), "\u2009"))

_SPACES = " \u00a0\u2009\u202f"
_MINUS = r"(?:(?<![0-9A-Za-z)\]}%])-[$€£¥₽]?)?"
_NUMBER = re.compile(
    rf"(?P<sign>{_MINUS})"
    r"(?P<body>"
    rf"[1-9]\d{{0,2}}(?P<space>[{_SPACES}])\d{{3}}(?:(?P=space)\d{{3}})*(?![{_SPACES}]?\d)(?:[.,]\d+)?"  # 80 000,50
    r"|\d+(?:[.,]\d+)*"  # 80,000.50 and 80.000,50
    r"|(?<![\w.])\.\d+"  # .5
    r")"
    rf"(?:[{_SPACES}]?(?P<unit>万|亿|тыс|млн|миллион|mil\b|mill[oó]n|thousand\b|million))?"
)
_UNITS = {
    "万": 10**4,
    "亿": 10**8,
    **dict.fromkeys(("тыс", "mil", "thousand"), 10**3),
    **dict.fromkeys(("млн", "миллион", "millon", "millón", "million"), 10**6),
}
# What an exponent of a unit stands behind: `cm^2`, `\\text{ m}^{3}`.
_BEFORE_EXPONENT = re.compile(r"[^\W\d_]\}?\^\{?$")
_COMMA_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_DOT_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+(?:,\d+)?")
_SPLIT_RUN = re.compile(r"\d+(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number in a text: the answer of a worked solution, by the rule of MGSM's scoring; None if there is none.

    Units, currency and percent signs, `\\boxed{}` and a closing full stop do not matter. `80,000`, `80 000` and
    `80.000.000` have thousands separators; `3,5` and `0,125` have decimal commas; `70.000` is read as 70, see
    `same_number`; `7万`, `70 тыс.` and `70 mil` are 70000. A fraction `1/2` ends in the number 2, but an area `18 cm^2`
    in the number 18.
    """
    readings = _last_readings(text)
    return readings[0] if readings else None


def same_number(text: str, answer: str) -> bool:
    """Whether the last number of a generated text is the last number of the right answer.

    Spanish and Russian texts may write seventy thousand as `70.000`. What a single dot before three digits means cannot
    be known, so either reading of it counts as right.

    Raises:
        DataError: if the answer has no number.
    """
    expected = last_number(answer)
    if expected is None:
        raise DataError(f"The right answer (={answer!r}) has no number in it. Score it with 'exact-match'.")
    return expected in _last_readings(text)


def _last_readings(text: str) -> tuple[Decimal, ...]:
    """The last number as it reads, most likely reading first; empty if there is none."""
    text = text.translate(_PLAIN_CHARACTERS)
    for pattern, plain in _LATEX_SEPARATORS:
        text = pattern.sub(plain, text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return ()
    starts = ((number, number.start()) for number in reversed(numbers))
    last = next((n for n, at in starts if not _BEFORE_EXPONENT.search(text, max(0, at - 4), at)), numbers[-1])
    readings = _readings("".join(last["body"].split()), spaced=last["space"] is not None)
    if last["unit"]:
        readings = tuple(reading * _UNITS[last["unit"]] for reading in readings)
    return tuple(reading.copy_negate() for reading in readings) if last["sign"] else readings


def _readings(body: str, spaced: bool) -> tuple[Decimal, ...]:
    """The values of digits with dots and commas between them; `spaced` if white space has already parted thousands."""
    if spaced:
        return (Decimal(body.replace(",", ".")),)
    if _COMMA_THOUSANDS.fullmatch(body):
        return (Decimal(body.replace(",", "")),)
    if _DOT_THOUSANDS.fullmatch(body):
        whole = Decimal(body.replace(".", "").replace(",", "."))
        return (whole,) if body.count(".") > 1 or "," in body else (Decimal(body), whole)
    if re.fullmatch(r"\d*[.,]\d+|\d+", body):
        return (Decimal(body.replace(",", ".")),)
    # A list without spaces, `1,2,3`, or a date: its last item.
    return (Decimal(_SPLIT_RUN.findall(body)[-1]),)


# ------------------------------------------------------------------------------------------------------------- code

_FENCE = re.compile(r"```[ \t]*(?P<language>[\w+-]*)[^\n`]*\n(?P<code>.*?)(?:```|\Z)", re.DOTALL)
_PYTHON_NAMES = ("python", "python3", "py")
_CODE_START = re.compile(r"^(?:(?:async def|def|import|from|class)\s|@\w)", re.MULTILINE)


def extract_code(text: str) -> str:
    """The Python program in a model's answer.

    That is the first fenced block marked as Python, else the first fenced block, else the lines from the first that
    looks like code to the last with which they parse. A text in which none of this is found is returned as it is. The
    last fence may be missing, as when the model ran out of tokens.
    """
    text = text.replace("\r\n", "\n")
    fences = [(fence["language"].lower(), fence["code"]) for fence in _FENCE.finditer(text)]
    if fences:
        marked = [code for language, code in fences if language in _PYTHON_NAMES]
        return textwrap.dedent((marked or [fences[0][1]])[0]).strip("\n")
    starts = [match.start() for match in _CODE_START.finditer(text)]
    for start in starts:
        code = _longest_program(text[start:].splitlines())
        if code:
            return code
    return text[starts[0] :].strip("\n") if starts else text.strip("\n")


def _longest_program(lines: list[str]) -> str:
    """As many of the first lines as parse together, less the prose at their end; empty if not even one does."""
    while lines:
        try:
            tree = ast.parse("\n".join(lines))
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            # Lines from the first bad one on cannot belong to the program.
            bad_line = getattr(error, "lineno", None) or len(lines)
            lines = lines[: max(0, min(len(lines), bad_line) - 1)]
        else:
            while tree.body and _may_be_prose(tree.body[-1]):
                tree.body.pop()
            return "\n".join(lines[: tree.body[-1].end_lineno]) if tree.body else ""
    return ""


def _may_be_prose(statement: ast.stmt) -> bool:
    """Whether a statement only names things without doing any, as "Done" and "Result: five" happen to."""
    if isinstance(statement, ast.AnnAssign):
        return statement.value is None
    return isinstance(statement, ast.Expr) and not any(isinstance(node, ast.Call) for node in ast.walk(statement))


# ---------------------------------------------------------------------------------------------------------- scorers


def _field(example: Record, *names: str) -> Any:
    """The first of these fields that the example has.

    Raises:
        DataError: if it has none of them.
    """
    for name in names:
        if name in example:
            return example[name]
    wanted = " or ".join(f"`{name}`" for name in names)
    raise DataError(f"The example has no field {wanted}, which its scorer needs. Its fields: {', '.join(example)}.")


def _quick(scorer: _S) -> _S:
    """Make the score of an empty answer, which costs nothing, a scorer's check of an example."""
    vars(scorer)["check"] = partial(scorer, "")
    return scorer


@_quick
def exact_match(generated: str, example: Record) -> float:
    """1 if the text is the field `completion`, white space and Unicode's ways to compose a letter aside."""
    return float(_plain(generated) == _plain(str(_field(example, "completion"))))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


@_quick
def last_number_match(generated: str, example: Record) -> float:
    """1 if the last number is that of the field `answer` or, without one, of `completion`."""
    return float(same_number(generated, str(_field(example, "answer", "completion"))))


@dataclass(frozen=True)
class CodeTests:
    """Scores 1 if the generated program passes the example's `tests`; calls may run in several threads.

    The field `setup`, if there is one, is code that runs before the program, such as imports that the prompt
    promised. For HumanEval, `tests` is `[test, f"check({entry_point})"]`.

    Attributes:
        allow_code: the caller's word that generated code may run on this machine, in the sandbox.
        limits: what each program may use.
    """

    allow_code: bool = False
    limits: Limits = DEFAULT_LIMITS

    def require_permission(self) -> None:
        """Refuse unless the caller has opted in.

        Raises:
            SandboxError: if they have not.
        """
        if not self.allow_code:
            raise SandboxError(
                "The scorer 'code-tests' runs programs that a model wrote. If you want that on this machine, in a "
                "sandbox, say so: `allow_code=True`."
            )

    def check(self, example: Record) -> None:
        """Check the caller's word and the example's fields, and run nothing.

        Raises:
            DataError: if `tests` is not a list of statements, or `setup` not a text.
        """
        self.require_permission()
        check_tests(_field(example, "tests"))
        if not isinstance(example.get("setup", ""), str):
            raise DataError(f"`setup` (={example['setup']!r}) must be a text: Python that runs before the program.")

    def __call__(self, generated: str, example: Record) -> float:
        """Run the program in `generated` against the example's tests."""
        self.require_permission()
        tests = _field(example, "tests")
        code = f"{example.get('setup', '')}\n{extract_code(generated)}"
        return float(run_tests(code, tests, self.limits).passed)


SCORERS: dict[str, Scorer] = {
    "code-tests": CodeTests(),
    "exact-match": exact_match,
    "last-number": last_number_match,
}


def get_scorer(name: str, allow_code: bool = False) -> Scorer:
    """Look a scorer up.

    Raises:
        DataError: if there is none of that name.
    """
    if name not in SCORERS:
        raise DataError(f"There is no scorer {name!r}. {did_you_mean(name, SCORERS)}")
    scorer = SCORERS[name]
    if isinstance(scorer, CodeTests):
        scorer = replace(scorer, allow_code=allow_code)
        scorer.require_permission()
    return scorer

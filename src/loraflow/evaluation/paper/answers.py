"""The final number of an answer, by the rule of the paper's official code."""

from __future__ import annotations

import re

_STATED = (re.compile(r"The answer is: (-?[\d.,]+)", re.ASCII), re.compile(r"#### (-?[\d.,]+)", re.ASCII))
_NOT_A_DIGIT = re.compile(r"[^0-9]")


def official_answer(text: str) -> str:
    """What the official evaluation ([thunlp/LoRAFlow](https://github.com/thunlp/LoRAFlow)) takes from an answer.

    The first of these that is there:

    1. the number after the first `The answer is: `, in English whatever the answer's language;
    2. the number after the first `#### `;
    3. the first word after the last `>>`;
    4. the first word after the last `=`;
    5. the last word, between white space, that is all digits;
    6. the first word.

    Then everything but the digits 0 to 9 is dropped. Hence its quirks: -3 becomes 3, 2.5 becomes 25, and 18.00 becomes
    1800; `18。答案` after a `=` is read well, but in `9 * 2 = 18. 答案是：36` the 18 counts, not the 36; without any of
    the marks a number with its unit or full stop, `18.`, is passed over for an earlier one that stands alone.

    Returns:
        Digits; empty if the word that was taken has none.
    """
    found = _marked(text, _STATED)
    if found is None:
        found = next((word for word in reversed(text.split()) if word.isdigit()), None)
        if found is not None:
            return found
        found = next(iter(text.split()), "")
    return _NOT_A_DIGIT.sub("", found)


def official_gold(answer: str) -> str:
    """What the official evaluation compares with: the same without rule 1, and without dropping anything.

    So a gold answer such as `2,125` keeps its comma, and no model's answer equals it.
    """
    found = _marked(answer, _STATED[1:])
    if found is None:
        words = answer.split()
        found = next((word for word in reversed(words) if word.isdigit()), words[0] if words else "")
    return found.strip()


def _marked(text: str, stated: tuple[re.Pattern[str], ...]) -> str | None:
    """The word at the first mark that is there, less its currency signs and separators."""
    for pattern in stated:
        match = pattern.search(text)
        if match is not None:
            return match[1].replace(",", "")
    for mark in (">>", "="):
        _, found, rest = text.rpartition(mark)
        if found and rest.split():
            return rest.split()[0].strip("$").replace(",", "").rstrip(".")
    return None

"""What `loraflow advise` says: a table of measured rows, filtered by what somebody has and ordered by its figures.

The table is `advice.yaml`; nothing is estimated here. Where two rows are not told apart, or a case has not been
measured, that is a part of the advice.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraflow.errors import LoraflowError
from loraflow.training.recipes import read_yaml

TABLE = Path(__file__).with_name("advice.yaml")
ANSWERS_PAGE, COST_PAGE, SCALE_PAGE = "docs/world.md", "docs/methods/README.md", "docs/scale.md"
FINETUNE = "finetune"


@dataclass(frozen=True)
class Cost:
    """A row of the table of costs, in times the base's.

    Attributes:
        prompt: a prompt with its first answer token.
        token: each further token.
    """

    row: str
    prompt: str
    token: str


@dataclass(frozen=True)
class Way:
    """One way to a fusion, and what was measured of it.

    Attributes:
        row: its row in the page.
        method: the method's name, or `finetune`.
        options: parameters as `--method-option` takes them.
        needs: what it learns from.
        constant: its weights do not look at the input.
        adapter: which of the adapters it trains further, if it does.
        answers: mean and interval over the page's tasks, per cent, as it has them.
        page: docs/world.md, or docs/many.md.
        column: what that calls the mean.
    """

    row: str
    method: str
    needs: Literal["nothing", "adapter data", "examples"]
    options: tuple[str, ...] = ()
    constant: bool = False
    adapter: int | None = None
    answers: str | None = None
    cost: Cost | None = None
    page: str = ANSWERS_PAGE
    column: str = "average"

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean, lower and upper end of `answers`."""
        mean, low, high = (float(number) for number in re.findall(r"[\d.]+", self.answers or ""))
        return mean, low, high

    def overlaps(self, other: Way) -> bool:
        """Whether the two intervals have a value in common."""
        (_, low, high), (_, other_low, other_high) = self.interval, other.interval
        return low <= other_high and other_low <= high


@dataclass(frozen=True)
class Situation:
    """What somebody has and wants.

    Attributes:
        adapters: how many.
        examples: of the task.
        adapter_data: whether there are examples of each adapter's own data.
        may_change: whether an adapter may be trained further.
        prompt_cost: a prompt may take so many times the base's time; None for any.
        token_cost: the same for each further token.
        one_adapter: whether the result has to be a single adapter.
    """

    adapters: int
    examples: int = 0
    adapter_data: bool = False
    may_change: bool = False
    prompt_cost: float | None = None
    token_cost: float | None = None
    one_adapter: bool = False


@dataclass(frozen=True)
class Advice:
    """What the table says of a situation.

    Attributes:
        way: what is recommended; None where nothing is left.
        equal: ways whose intervals overlap with its, best first.
        unmeasured: ways that the situation allows and that have no row.
        left_out: the other ways, each with the reason.
        undecided: what the evidence does not say about this situation.
    """

    way: Way | None
    equal: list[Way] = field(default_factory=list)
    unmeasured: list[Way] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    undecided: list[str] = field(default_factory=list)


@functools.cache
def read_table() -> Mapping[str, Any]:
    """The whole table, as its file has it."""
    return read_yaml(TABLE)


def ways(*, many: bool = False) -> list[Way]:
    """Every way of the table, or every one of many adapters."""
    table = read_table()["many"] if many else read_table()
    place = {"page": table["page"], "column": table["column"]} if many else {}
    found = []
    for row, fields in table["ways"].items():
        cost = Cost(**fields["cost"]) if "cost" in fields else None
        found.append(Way(**{**fields, **place, "row": row, "options": tuple(fields.get("options", ())), "cost": cost}))
    return found


def are_many(situation: Situation) -> bool:
    """Whether one of many adapters is to be chosen, and nothing is known of the task."""
    return situation.adapters > read_table()["many"]["above"] and not situation.examples


def advise_on(situation: Situation) -> Advice:
    """The way with the highest measured mean among those that a situation allows; of equal ones, one that fuses.

    Raises:
        LoraflowError: if there is no adapter.
    """
    if situation.adapters < 1:
        raise LoraflowError(f"`adapters` (={situation.adapters}) must be at least 1: there is nothing to fuse.")
    left_out, allowed = {}, []
    for way in ways(many=are_many(situation)):
        if reason := _why_not(way, situation):
            left_out[way.row] = reason
        else:
            allowed.append(way)
    measured = sorted((way for way in allowed if way.answers), key=lambda way: -way.interval[0])
    unmeasured = [way for way in allowed if not way.answers]
    if not measured:
        return Advice(None, unmeasured=unmeasured, left_out=left_out, undecided=_undecided(None, situation))
    equal = [way for way in measured if way.overlaps(measured[0])]
    # What the table does not tell apart, another page does: on the paper's models fusing is ahead of training weights.
    equal.sort(key=lambda way: way.method == FINETUNE)
    best, *equal = equal
    return Advice(best, equal, unmeasured, left_out, _undecided(best, situation))


def _why_not(way: Way, situation: Situation) -> str:
    """Why a situation does not allow a way; empty where it does."""
    if way.needs == "examples" and not situation.examples:
        return "needs examples of the task (--examples)"
    if way.needs == "adapter data" and not situation.adapter_data:
        return "needs examples of each adapter's own data (--adapter-data)"
    if way.adapter is not None and not situation.may_change:
        return "trains an adapter further (--may-change-adapters)"
    if situation.one_adapter and not way.constant:
        return "looks at the input, so it is no single adapter (--one-adapter)"
    for limit, flag, part in (
        (situation.prompt_cost, "--prompt-cost", "prompt"),
        (situation.token_cost, "--token-cost", "token"),
    ):
        if limit is None:
            continue
        if way.cost is None:
            return f"has no row in {COST_PAGE}, so {flag} cannot be answered for"
        if float(getattr(way.cost, part)) > limit:
            return f"takes {getattr(way.cost, part)} times the base for a {part} ({flag} {limit:g})"
    return ""


def _undecided(best: Way | None, situation: Situation) -> list[str]:
    """What the evidence does not say: the situation is another one than was measured."""
    measured = read_table()["many"] if are_many(situation) else read_table()["measured"]
    found = []
    if situation.adapters == 1:
        found.append("With one adapter there is nothing to weigh but how loud it is; no page has measured that.")
    elif situation.adapters != measured["adapters"]:
        found.append(
            f"Measured with {measured['adapters']} adapters, and there are {situation.adapters}: the order may be "
            "another."
        )
    if not situation.examples:
        pass
    elif situation.examples < measured["examples"]:
        found.append(
            f"Measured with {measured['examples']} examples, and there are {situation.examples}: with so few, no page "
            "says whether what learns from them is ahead of what learns nothing."
        )
    elif situation.examples > measured["examples"]:
        found.append(f"Measured with {measured['examples']} examples: no page says what more of them change.")
    if best is not None and best.method == FINETUNE:
        found.append("On the paper's models fusing is ahead of training weights, as quoted; here it is not.")
    if best is None:
        found.append(
            "A constant fusion, exported, can be merged into the base by PEFT (`merge_and_unload`); then it costs what "
            "the base does. No page has measured it."
        )
    return found

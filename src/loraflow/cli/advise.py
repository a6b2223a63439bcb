"""`loraflow advise`: which method, by what was measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from loraflow.cli import advice
from loraflow.cli.groups import panel
from loraflow.cli.values import parse_adapters, parse_method_options
from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from rich.console import Console

_have = panel("What you have")
_want = panel("What you want")


class Tasks(StrEnum):
    """How many tasks are to be answered at once."""

    ONE = "one"
    MANY = "many"


@dataclass(frozen=True)
class Places:
    """What commands call the base and its adapters."""

    base: str
    adapters: dict[str, str]
    folder: str | None = None

    def words(self) -> str:
        """The options that name them; where there are many, the folder that they are in."""
        if self.folder is not None:
            return f"--base {shlex.quote(self.base)} --adapters {self.folder}"
        modules = " ".join(shlex.quote(f"{name}={path}") for name, path in self.adapters.items())
        return f"--base {shlex.quote(self.base)} --lora-modules {modules}"


def advise(
    adapters: Annotated[
        int | None,
        _have("--adapters", help="How many adapters.  [default: those of --lora-modules]", show_default=False),
    ] = None,
    lora_modules: Annotated[
        list[str],
        _have("--lora-modules", help="Adapters, as `name=path`; only named in the commands.", show_default=False),
    ] = [],  # noqa: B006 (typer reads the default)
    base: Annotated[str, _have("--base", help="Base model; only named in the commands.")] = "BASE",
    examples: Annotated[int, _have("--examples", min=0, help="How many examples of the task.")] = 0,
    adapter_data: Annotated[
        bool, _have("--adapter-data", help="There are examples of each adapter's own data too.")
    ] = False,
    may_change: Annotated[bool, _have("--may-change-adapters", help="An adapter may be trained further.")] = False,
    prompt_cost: Annotated[
        float | None,
        _want("--prompt-cost", min=0, help="A prompt may take so many times the base's time.  [default: any]"),
    ] = None,
    token_cost: Annotated[
        float | None, _want("--token-cost", min=0, help="The same for each further token.  [default: any]")
    ] = None,
    memory_gib: Annotated[
        float | None, _want("--memory-gib", min=0, help="Memory of the machine or GPU.  [default: not looked at]")
    ] = None,
    one_adapter: Annotated[
        bool, _want("--one-adapter", help="The result has to be a single PEFT adapter, for any program.")
    ] = False,
    tasks: Annotated[Tasks, _want("--tasks", help="Whether one task is to be served, or many at once.")] = Tasks.ONE,
) -> None:
    """Say which method to try, the measured rows that speak for it, and the commands to run.

    There is no model in it: it reads a table of what docs/ has measured, leaves out what your situation does not allow,
    and takes the highest mean. Where the evidence does not decide, it says so. Nothing is loaded or looked up.

    Example: loraflow advise --adapters 2 --examples 200 --token-cost 1.1
    """  # noqa: DOC501 (it is the --help text)
    named = parse_adapters(lora_modules)
    if adapters is not None and named and adapters != len(named):
        raise LoraflowError(
            f"`--adapters` (={adapters}) and `--lora-modules` (={len(named)}) count differently. Give one of them."
        )
    if adapters is None and not named:
        raise LoraflowError("How many adapters there are is missing. Give --adapters or --lora-modules.")
    count = len(named) if adapters is None else adapters
    situation = advice.Situation(
        count, examples, adapter_data, may_change, prompt_cost, token_cost, one_adapter=one_adapter
    )
    found = advice.advise_on(situation)
    folder = "FOLDER" if not named and advice.are_many(situation) else None
    places = Places(base, named or {f"adapter-{i}": f"PATH-{i}" for i in range(1, count + 1)}, folder)

    from rich.console import Console

    console = Console(highlight=False)
    _say_way(found, console)
    _say("evidence", _evidence(found, memory_gib), console)
    _say("in the pages' own words", [_quoted(name) for name in _quotes(found, tasks)], console)
    _say("not decided", _undecided(found), console)
    _say("left out", _left_out(found), console)
    _say("commands", commands(found, situation, places, tasks), console)


def _say(title: str, lines: list[str], console: Console) -> None:
    if not lines:
        return
    console.print(f"\n[bold]{title}[/]")
    for line in lines:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _say_way(found: advice.Advice, console: Console) -> None:
    if found.way is None:
        console.print("[bold]No measured method is left.[/]")
        return
    console.print(f"[bold]{found.way.row}[/]: {_description(found.way)}", soft_wrap=True)
    if found.equal or found.undecided:
        console.print("The evidence does not decide alone: see what is not decided.", soft_wrap=True)


def _description(way: advice.Way) -> str:
    learns = {"nothing": "nothing is learned", "adapter data": "learns from each adapter's own data"}
    said = learns.get(way.needs, "learns from examples of the task")
    return f"{said}; one PEFT adapter at the end" if way.constant else f"{said}; looks at the input"


def _evidence(found: advice.Advice, memory_gib: float | None) -> list[str]:
    lines = [line for way in [found.way, *found.equal] if way is not None for line in _rows(way)]
    served = advice.read_table()["serving"]
    columns = ", ".join(f"{name} {cell.strip('*')}" for name, cell in served["columns"].items())
    lines.append(f"{served['page']}: {served['row']}: {columns}")
    if memory_gib is not None:
        lines.append(f"{advice.SCALE_PAGE}: {_machine(memory_gib)}")
    return lines


def _rows(way: advice.Way) -> Iterator[str]:
    yield f"{way.page}: {way.row}: {way.column} {way.answers}"
    if way.cost:
        yield f"{advice.COST_PAGE}: {way.cost.row}: prompt {way.cost.prompt}, token {way.cost.token}"


def _quotes(found: advice.Advice, tasks: Tasks) -> list[str]:
    near = [way for way in [found.way, *found.equal] if way is not None]
    names = ["built", "scatter"]
    if any(way.method == advice.FINETUNE for way in near):
        names.append("paper")
    if any(way.method == "lora-flow" for way in near):
        names.append("real")
    if any(way.method == "adapter-core" for way in near):
        names.append("core")
    if any(way.page != advice.ANSWERS_PAGE for way in near):
        names.append("many")
    if found.way is not None and found.way.constant and found.way.method != advice.FINETUNE:
        names.append("one")
    return [*names, "served"] if tasks is Tasks.MANY else names


def _quoted(name: str) -> str:
    quote = advice.read_table()["quotes"][name]
    return f"{quote['page']}: {quote['text']}"


def _machine(memory_gib: float) -> str:
    machines = advice.read_table()["machines"]
    fitting = [machine for machine in machines if machine["gib"] <= memory_gib]
    if not fitting:
        return f"begins at {machines[0]['gib']} GiB; `loraflow info` says what yours takes"
    return f"{fitting[-1]['row']}: {fitting[-1]['base that fits']}; {fitting[-1]['how']}"


def _undecided(found: advice.Advice) -> list[str]:
    lines = list(found.undecided)
    if found.way is not None and found.equal:
        rows = "; ".join(way.row for way in found.equal)
        lines.append(f"Its interval overlaps with those of: {rows}. The table does not tell them apart.")
        if any(way.method == advice.FINETUNE for way in found.equal):
            lines.append("Of equal rows one that fuses is named: that is ahead on the paper's models, as quoted.")
    return lines + [f"{way.row}: allowed, and in no table of docs/." for way in found.unmeasured]


def _left_out(found: advice.Advice) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row, reason in found.left_out.items():
        reasons.setdefault(reason, []).append(row)
    return [f"{reason}: {'; '.join(rows)}" for reason, rows in reasons.items()]


def commands(found: advice.Advice, situation: advice.Situation, places: Places, tasks: Tasks) -> list[str]:
    """What to run, in order."""
    lines = [f"loraflow info {places.words()}  # what fits, and the memory that it takes"]
    way = found.way or next(iter(found.unmeasured), None)
    if way is None:
        return [*lines, "loraflow advise --help  # loosen a limit"]
    # What learns nothing of a task is the same for all of them.
    several = tasks is Tasks.MANY and way.needs == "examples"
    names = ["task-a", "task-b"] if several else ["tuned" if way.method == advice.FINETUNE else "fusion"]
    for name in names:
        lines += _making(way, places, name, exported=tasks is Tasks.ONE)
    lines += _serving(way, situation, places, names)
    measured = advice.read_table()["measured"]
    studies = ["methods"] if situation.examples else []
    studies += ["examples"] if 0 < situation.examples < measured["examples"] else []
    if situation.adapters > measured["adapters"]:
        studies.append("many" if advice.are_many(situation) else "adapters")
    # What decides on one's own task; docs/compare.md has the fields of a setting.
    return lines + [f"loraflow compare {study} --setting mine.yaml --output runs/{study}" for study in studies]


def _making(way: advice.Way, places: Places, name: str, *, exported: bool) -> list[str]:
    """The commands that make a fusion, or an adapter, of that name."""
    own = "" if name in ("fusion", "tuned") else f"{name}-"
    data = f"--data {own}train.jsonl --dev {own}dev.jsonl"
    base = shlex.quote(places.base)
    if way.method == advice.FINETUNE:
        further = ""
        if way.adapter is not None:
            paths = list(places.adapters.values())
            further = f" --adapter {shlex.quote(paths[min(way.adapter, len(paths) - 1)])}"
        return [f"loraflow finetune --base {base}{further} {data} --output {name}"]
    chosen = f"--method {way.method}" + (f" --method-option {' '.join(way.options)}" if way.options else "")
    if way.needs == "nothing":
        if not exported:
            return []
        made = [f'loraflow generate {places.words()} {chosen} --prompt "..."']
        return [*made, f"loraflow export {places.words()} {chosen} --output {name}-adapter"] if way.constant else made
    if way.needs == "adapter data":
        adapters = list(places.adapters) if places.folder is None else [*list(places.adapters)[:2], "..."]
        data = "--adapter-data " + " ".join(
            adapter if adapter == "..." else shlex.quote(f"{adapter}={adapter}.jsonl") for adapter in adapters
        )
    made = [f"loraflow fit {places.words()} {chosen} {data} --output {name}"]
    return [*made, f"loraflow export {name} --output {name}-adapter"] if way.constant else made


def _serving(way: advice.Way, situation: advice.Situation, places: Places, names: list[str]) -> list[str]:
    """The command that serves what was made."""
    if way.method == advice.FINETUNE or situation.one_adapter:
        kept = "" if way.method == advice.FINETUNE else "-adapter"
        modules = " ".join(f"{name}={name}{kept}" for name in names)
        return [f"loraflow serve --base {shlex.quote(places.base)} --lora-modules {modules}"]
    if way.needs == "nothing":
        asked: dict[str, object] = {"method": way.method}
        if way.options:
            asked["options"] = parse_method_options(way.options)
        return [f'loraflow serve {places.words()}  # requests say "fusion": {json.dumps(asked)}']
    # Else those of a folder would all be loaded at the start.
    return [f"loraflow serve {' '.join(names)}" + ("" if places.folder is None else f" --adapters {places.folder}")]

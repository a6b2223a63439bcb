"""What a comparison is to do: a setting (base, adapters, tasks), rows, seeds; read from YAML and checked whole.

```yaml
setting: small-world          # a built-in one, a file, or written out here
methods:                      # the rows of the table, by the name that each gets there
  base: base                  # a method, or an adapter's name
  layer: lora-flow
  module: {method: lora-flow, options: {granularity: module}}
  merged: {merge: knots-ties, options: {scale: 0.5}}
  oracle: {adapter: own}      # the one that the task names as its own
  unseen: {method: arrow, without: own}
  task LoRA, tuned: {finetune: 1}
seeds: [0, 1, 2]
reference: layer
```
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loraflow.errors import DataError, did_you_mean
from loraflow.examples import Source
from loraflow.prompts import PromptFormat
from loraflow.training.recipes import read_yaml

STUDIES = Path(__file__).parents[1] / "studies"
EVERY_TASK = "every"
NEW_LORA = "new"
OWN = "own"


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FieldNames(_Spec):
    """Which fields of a data file's records are prompt and completion."""

    prompt: str
    completion: str


class MixSpec(_Spec):
    """A task whose questions are those of another one with sentences of a third one's between them.

    Attributes:
        task: the task whose questions, answers, adapters and training data it has.
        other: a task with the same problems in another language.
        how: "alternate" takes every second sentence from the other, "question" the last sentence only.
    """

    task: str
    other: str
    how: Literal["alternate", "question"] = "alternate"


class TaskSpec(_Spec):
    """One task: where its problems are, and how answers are scored.

    Attributes:
        adapters: names of the adapters to fuse, in order; all of the setting's by default.
        own: the one of them that was made for this task, where it is a question which of many serves.
        test: examples, as `loraflow.examples.Source` reads them, answered by `generate` and scored by `scorer`.
        harness: instead, the name of a task of lm-evaluation-harness.
        mixed: instead, a mixture of two other tasks.
        together: instead, the problems of several other tasks in turns, so that one batch has some of each.
        train: examples for what learns.
        more_train: further ones, for rows that want more `examples` than `train` has.
        dev: examples on which its checkpoints are chosen.
        fields: prompt and completion in `train`, and where they say nothing else in `dev` and `test`.
        dev_fields: prompt and completion in `dev`.
        test_fields: prompt and completion in `test`.
        scorer: one of `loraflow.evaluation.SCORERS`.
        prompt: how test questions become prompts.
        train_prompt: how training questions do; by default the same.
        max_new_tokens: longest answer.
        stop: an answer ends before the first of these strings.
        problems: tasks with the same name here have the same problems in the same order, as translations have, and are
            resampled together.
        metric: which of a harness task's metrics decides; by default its first.
        num_fewshot: examples in a harness task's prompts; by default its own number.
        chat: put a harness task's prompts into the fusion's prompt format.
        include_path: folder with a harness task's file, where it is not one of lm-eval's own.
    """

    adapters: list[str] | None = None
    own: str | None = None
    test: str | None = None
    harness: str | None = None
    mixed: MixSpec | None = None
    together: list[str] | None = Field(None, min_length=2)
    train: str | None = None
    more_train: str | None = None
    dev: str | None = None
    fields: FieldNames | None = None
    dev_fields: FieldNames | None = None
    test_fields: FieldNames | None = None
    scorer: str | None = None
    prompt: PromptFormat | None = None
    train_prompt: PromptFormat | None = None
    max_new_tokens: int = Field(512, ge=1)
    stop: list[str] = []
    problems: str | None = None
    metric: str | None = None
    num_fewshot: int | None = Field(None, ge=0)
    chat: bool = False
    include_path: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TaskSpec:
        if sum(source is not None for source in (self.test, self.harness, self.mixed, self.together)) != 1:
            raise ValueError("give exactly one of `test`, `harness`, `mixed` and `together`")
        if self.test is not None and self.scorer is None:
            raise ValueError("`test` needs a `scorer`")
        if self.mixed is not None and self.model_fields_set != {"mixed"}:
            more = sorted(self.model_fields_set - {"mixed"})
            raise ValueError(f"a `mixed` task is as the task that it mixes; leave `{more[0]}` out")
        if self.together is not None and self.model_fields_set != {"together"}:
            more = sorted(self.model_fields_set - {"together"})
            raise ValueError(f"tasks that are `together` stay as they are; leave `{more[0]}` out")
        if self.own is not None and self.adapters is not None and self.own not in self.adapters:
            raise ValueError(f"`own` (={self.own!r}) is not among the task's `adapters`; name it there too")
        for name in ("metric", "num_fewshot", "chat", "include_path"):
            if self.harness is None and getattr(self, name):
                raise ValueError(f"`{name}` is of a `harness` task; leave it out")
        return self


class SettingSpec(_Spec):
    """What there is to compare on.

    Attributes:
        base: the base model: Hub id or directory.
        quantization: bnb-4bit or bnb-8bit.
        adapter_data: examples of each adapter's own data, for methods that learn from those.
        prompt: how questions become prompts, where a task says nothing else.
        stop: an answer to any task ends before the first of these strings.
        recipes: settings of `FitConfig` by method's name, and of `LoraSettings` too under `finetune`.
    """

    base: str
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    adapters: dict[str, str] = Field(min_length=1)
    adapter_data: dict[str, str] = {}
    prompt: PromptFormat = PromptFormat()
    stop: list[str] = []
    recipes: dict[str, dict[str, Any]] = {}
    tasks: dict[str, TaskSpec] = Field(min_length=1)


class RowSpec(_Spec):
    """One row of the table: exactly one of `method`, `adapter`, `fusion`, `merge` and `finetune` says what it is.

    Attributes:
        method: a method's name, or an adapter's.
        options: its parameters, or the merge's.
        merge: the adapters merged into one by one of `loraflow.merging.MERGES`.
        rank: the rank that a merge is compressed to; by default none.
        adapter: one of the task's adapters alone, by name or position, or "own": the one made for the task.
        finetune: train a LoRA on the task instead of fusing: "new", or one of the task's adapters further.
        on_top_of: what a new LoRA is trained on: one of the task's adapters, by name or position, or a method's name,
            which is fitted first where it learns; by default the base.
        adapters: what is fused: the task's adapters, all of the setting's, or these.
        without: adapters to leave out of those, by name; "own" is the one made for the task.
        fit: settings of `FitConfig` (and of `LoraSettings` for `finetune`) that differ from the recipe.
        search: choose learning rate and batch size on the dev examples, by the paper's grid.
        examples: how many training examples it gets, the first ones; all by default. In a plan's file it may be a list:
            the row is then one for each number, `NAME, 20` say, and all of them are one curve.
        curve: rows with the same name here are one line of `loraflow plot curves`.
        fitted_on: learn on this task, whatever task is answered; "every" makes one row for each task.
        if_possible: leave it out of tasks that lack the examples or adapters that it wants, and say so.
    """

    method: str | None = None
    options: dict[str, Any] = {}
    merge: str | None = None
    rank: int | None = Field(None, ge=1)
    adapter: int | str | None = None
    fusion: str | None = None
    finetune: int | str | None = None
    on_top_of: int | str | None = None
    adapters: Literal["task", "all"] | list[str] = "task"
    without: list[str] = []
    fit: dict[str, Any] = {}
    search: bool = False
    examples: int | None = Field(None, ge=1)
    curve: str | None = None
    fitted_on: str | None = None
    if_possible: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> RowSpec:
        kinds = (self.method, self.adapter, self.fusion, self.merge, self.finetune)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of `method`, `adapter`, `fusion`, `merge` and `finetune`")
        if self.on_top_of is not None and self.finetune != NEW_LORA:
            raise ValueError(f"`on_top_of` is what a new LoRA is trained on; say `finetune: {NEW_LORA}`")
        if self.options and self.method is None and self.merge is None:
            raise ValueError("`options` are parameters of a `method` or a `merge`")
        if self.rank is not None and self.merge is None:
            raise ValueError("`rank` is what a `merge` is compressed to; leave it out")
        for name in ("adapters", "without"):
            if self.fusion is not None and name in self.model_fields_set:
                raise ValueError(f"a `fusion` has its own adapters; leave `{name}` out")
        return self

    @field_validator("without", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def short(self) -> dict[str, Any]:
        """Only what was said, as JSON values."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude={"if_possible", "curve"})


class Plan(_Spec):
    """A whole comparison.

    Attributes:
        description: what it is to find out, for the report.
        setting: a built-in one by name, or written out.
        methods: the rows of the table, by name.
        tasks: which of the setting's tasks; by default all but the mixed ones.
        seeds: of everything that draws at random while it learns; what does not is run once.
        reference: the row that the others are tested against; the last one by default.
        limit: only the first so many problems of each task.
        problems: which are answered: those of the test, or the dev examples, on which recipes are chosen.
        weights: also record the mean fusion weights of the answers.
    """

    title: str = "Comparison"
    description: str = ""
    setting: str | SettingSpec
    methods: dict[str, RowSpec] = Field(min_length=1)
    tasks: list[str] | None = None
    seeds: list[int] = Field([0], min_length=1)
    reference: str | None = None
    limit: int | None = Field(None, ge=1)
    problems: Literal["test", "dev"] = "test"
    batch_size: int = Field(16, ge=1)
    weights: bool = False

    @field_validator("methods", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, list):
            names = [str(name) for name in value]
            if any(isinstance(name, list | dict) for name in value):
                raise ValueError("a list of methods holds names only; give `name: {...}` pairs instead")
            if len(set(names)) < len(names):
                raise ValueError(f"`methods` names one twice: {names}")
            value = dict.fromkeys(names)
        if not isinstance(value, dict):
            return value
        rows: dict[str, Any] = {}
        for name, spec in value.items():
            for row, long in _rows_of(str(name), _long_form(str(name), spec)):
                if row in rows:
                    raise ValueError(f"two rows have the name {row!r}")
                rows[row] = long
        return rows

    @model_validator(mode="after")
    def _known_names(self) -> Plan:
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(
                f"`reference`: there is no row {self.reference!r}. {did_you_mean(self.reference, self.methods)}"
            )
        if self.reference is not None and self.methods[self.reference].fitted_on == EVERY_TASK:
            raise ValueError(f"`reference`: {self.reference!r} is a row for every task; name one that is one row")
        for kind, values in (("seeds", self.seeds), ("tasks", self.tasks or [])):
            if len(set(values)) < len(values):
                raise ValueError(f"`{kind}` names one twice: {values}")
        return self


def _long_form(name: str, spec: Any) -> Any:
    """A row written out; where it does not say what it is, its name does."""
    if spec is None or isinstance(spec, str):
        return {"method": name if spec is None else spec}
    kinds = ("method", "adapter", "fusion", "merge", "finetune")
    if isinstance(spec, dict) and not any(kind in spec for kind in kinds):
        return {"method": name, **spec}
    return spec


def _rows_of(name: str, spec: Any) -> Iterator[tuple[str, Any]]:
    """The rows that one entry of a plan stands for: one for each number of examples, where it lists several."""
    counts = spec.get("examples") if isinstance(spec, dict) else None
    if not isinstance(counts, list):
        yield name, spec
        return
    if not counts or len(set(map(repr, counts))) < len(counts):
        raise ValueError(f"`methods.{name}.examples` (={counts}) must list different numbers")
    for count in counts:
        yield f"{name}, {count}", {"curve": name, **spec, "examples": count}


def study_names() -> list[str]:
    """The studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def read_plan(source: str | Path, **changes: Any) -> Plan:
    """Read a plan from a file, or a study by its name.

    Args:
        source: a YAML file, or one of `study_names()`.
        changes: fields of the plan that differ from what is written there; those that are None do not.

    Raises:
        DataError: if there is no such plan, or something in it is wrong; the message says where.
    """
    path = STUDIES / f"{source}.yaml" if str(source) in study_names() else Path(source).expanduser()
    if not path.is_file():
        raise DataError(
            f"There is no plan {str(source)!r}: neither a file nor a study. {did_you_mean(str(source), study_names())}"
        )
    content = read_yaml(path)
    content.update({key: value for key, value in changes.items() if value is not None})
    return make_plan(content, path)


def make_plan(content: Mapping[str, Any], origin: Path) -> Plan:
    """Check a plan that is in memory; paths in it are relative to the folder of `origin`.

    Raises:
        DataError: if something in it is wrong.
    """
    content = dict(content)
    if "setting" not in content:
        raise DataError(f"{origin}: there is no `setting`. Name one there or with `setting='small-world'`.")
    setting = content["setting"]
    # A setting named on the command line is relative to where the command runs, as any file there is.
    if isinstance(setting, str) and setting.endswith((".yaml", ".yml")):
        file = Path(os.path.expandvars(setting)).expanduser()
        file = file if file.is_file() else origin.parent / file
        content["setting"] = _resolved(read_yaml(file), file)
    elif isinstance(setting, Mapping):
        content["setting"] = _resolved(dict(setting), origin)
    for name, spec in (content.get("methods") or {}).items() if isinstance(content.get("methods"), dict) else ():
        if isinstance(spec, dict) and isinstance(spec.get("fusion"), str):
            content["methods"] = {**content["methods"], name: {**spec, "fusion": _place(spec["fusion"], origin)}}
    return _checked(Plan, content, origin)


def _checked(kind: type[Any], content: Any, origin: Path) -> Any:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # A setting is a name or written out, and each way to read it has errors of its own.
        unread = ("setting", "str" if isinstance(content.get("setting"), Mapping) else "SettingSpec")
        found = [one for one in error.errors() if one["loc"][:2] != unread]
        # A misspelt key explains the one that is missing.
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        where = ".".join(str(part) for i, part in enumerate(first["loc"]) if i != 1 or first["loc"][0] != "setting")
        remedy = ""
        if first["type"] == "extra_forbidden":
            remedy = f" {did_you_mean(str(first['loc'][-1]), _fields_at(first['loc'][:-1]))}"
        raise DataError(
            f"{origin}: `{where or 'plan'}`: {first['msg'].removeprefix('Value error, ')}.{remedy}"
        ) from error


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """The fields that are known at a place of a plan."""
    for part, kind in (("tasks", TaskSpec), ("methods", RowSpec), ("setting", SettingSpec)):
        if part in location:
            return list(kind.model_fields)
    return list(Plan.model_fields)


def _resolved(setting: dict[str, Any], origin: Path) -> dict[str, Any]:
    """A setting with absolute paths; Hub ids stay as they are."""
    setting = dict(setting)
    if isinstance(setting.get("base"), str):
        setting["base"] = _place(setting["base"], origin)
    for key, place in (("adapters", _place), ("adapter_data", _data_place)):
        if isinstance(setting.get(key), dict):
            setting[key] = {name: place(str(path), origin) for name, path in setting[key].items()}
    if isinstance(setting.get("tasks"), dict):
        setting["tasks"] = {name: _resolved_task(spec, origin) for name, spec in setting["tasks"].items()}
    return setting


def _resolved_task(spec: Any, origin: Path) -> Any:
    if not isinstance(spec, dict):
        return spec
    places = {**dict.fromkeys(("train", "more_train", "dev", "test"), _data_place), "include_path": _place}
    return {
        **spec,
        **{key: place(spec[key], origin) for key, place in places.items() if isinstance(spec.get(key), str)},
    }


def _data_place(text: str, origin: Path) -> str:
    """The place of examples, with what is picked of them."""
    source = Source.parse(text)
    return str(dataclasses.replace(source, path=_place(source.path, origin)))


def _place(path: str, origin: Path) -> str:
    """A path relative to the file that names it; what is no path there, such as a Hub id, as it is.

    Raises:
        DataError: if it names an environment variable that is not set.
    """
    expanded = os.path.expandvars(path)
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        raise DataError(f"{origin}: {path!r} needs the environment variable {unset[1]}, which is not set.")
    place = origin.parent / Path(expanded).expanduser()
    return str(place.resolve()) if place.exists() or expanded.startswith(("./", "../")) else expanded

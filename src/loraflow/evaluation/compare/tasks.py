"""What a comparison runs on: tasks with their problems in memory, the base, and the adapters."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from loraflow.adapters import load_adapter
from loraflow.bases import read_beside
from loraflow.errors import DataError, did_you_mean
from loraflow.evaluation.compare.plan import FieldNames, MixSpec, SettingSpec, TaskSpec
from loraflow.evaluation.scoring import Scorer, get_scorer
from loraflow.examples import Example, Fields, parse_examples, read_examples
from loraflow.prompts import PromptFormat

ENTRY_POINTS = "loraflow.settings"


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness.

    Attributes:
        metric: the one that decides; None takes its first.
        num_fewshot: examples in its prompts; None takes its own number.
        chat: put its prompts into the fusion's prompt format.
        include_path: folder with its task file, where it is not one of lm-eval's own.
    """

    name: str
    metric: str | None = None
    num_fewshot: int | None = None
    chat: bool = False
    include_path: str | None = None

    @property
    def folder(self) -> Path | None:
        """`include_path` as a path."""
        return None if self.include_path is None else Path(self.include_path)


@dataclass(frozen=True)
class Task:
    """A task that methods are compared on.

    Attributes:
        name: what the table calls it.
        adapters: names of the adapters to fuse, in order.
        own: the one that was made for all of its problems, or the one for each of them; empty where nothing says so.
        test: the problems to answer; empty for a task of lm-evaluation-harness.
        scorers: scores of an answer by name; the first decides.
        harness: that task, where it is one.
        train: examples for what learns.
        more_train: gives further ones, for what wants more than `train` has.
        dev: examples on which its checkpoints are chosen.
        prompt: how test questions become prompts.
        train_prompt: how training questions do.
        stop: an answer ends before the first of these strings.
        problems: tasks with the same name here have the same problems in the same order.
        learns_as: the name of the task whose training data it shares; its own where it shares none.
        runs_code: whether scoring runs what the model wrote.
    """

    name: str
    adapters: tuple[str, ...]
    test: tuple[Example, ...]
    scorers: Mapping[str, Scorer]
    own: tuple[str, ...] = ()
    harness: HarnessTask | None = None
    train: tuple[Example, ...] = ()
    more_train: Callable[[], Sequence[Example]] = tuple
    dev: tuple[Example, ...] = ()
    prompt: PromptFormat = field(default_factory=PromptFormat)
    train_prompt: PromptFormat | None = None
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    problems: str = ""
    learns_as: str = ""
    runs_code: bool = False

    @property
    def metric(self) -> str:
        """The name of the score that decides."""
        if self.harness is not None:
            return self.harness.metric or ""
        return next(iter(self.scorers))

    def score(self, answers: Sequence[str]) -> list[dict[str, float]]:
        """All scores of answers to the first test problems, in order."""

        def one(pair: tuple[str, Example]) -> dict[str, float]:
            record = {**pair[1].record, "completion": pair[1].completion}
            return {name: scorer(pair[0], record) for name, scorer in self.scorers.items()}

        pairs = list(zip(answers, self.test, strict=False))
        if not self.runs_code:
            return [one(pair) for pair in pairs]
        # Programs have real time: no more of them at once than this process, of several perhaps, has threads for.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(one, pairs))

    def test_digest(self, limit: int | None) -> str:
        """What makes answers and scores comparable: problems, prompt, lengths and scorers, as a SHA-256."""
        what = [
            [[list(e.messages), e.completion, _plain(e.record)] for e in self.test[:limit]],
            None if self.harness is None else [dataclasses.asdict(self.harness), _harness_digest(self.harness)],
            list(self.scorers),
            self.prompt.model_dump(),
            self.max_new_tokens,
            list(self.stop),
        ]
        return _digest(what)

    def on_dev(self) -> Task:
        """The same task with its dev examples to be answered.

        Raises:
            DataError: if it has none.
        """
        if not self.dev:
            raise DataError(f"The task {self.name!r} has no dev examples to answer. Leave it out, or give it a `dev`.")
        return dataclasses.replace(self, test=self.dev, problems=f"{self.problems or self.name}, dev")

    def training(self, count: int | None) -> tuple[Example, ...]:
        """The first `count` training examples, of `train` and then of `more_train`; those of `train` by default."""
        if count is None or count <= len(self.train):
            return self.train[:count]
        return (*self.train, *self.more_train())[:count]

    def train_digest(self, count: int | None) -> str:
        """SHA-256 of what is learned from, training and dev examples."""
        prompt = self.train_prompt or self.prompt
        examples = (*self.training(count), *self.dev)
        return _digest([_contents(examples), prompt.model_dump()])


def _harness_digest(task: HarnessTask) -> str:
    """What a task's name stands for: the files beside it, or lm-evaluation-harness's version."""
    if task.folder is None:
        return version("lm_eval") if find_spec("lm_eval") else ""
    files = sorted(path for path in task.folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py"))
    return _digest([[str(path.relative_to(task.folder)), path.read_text(encoding="utf-8")] for path in files])


def _contents(examples: Sequence[Example]) -> list[Any]:
    return [[list(e.messages), e.completion] for e in examples]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(record), default=str))


@dataclass(frozen=True)
class Setting:
    """What there is to compare on.

    Attributes:
        recipes: settings of `FitConfig` by method's name, and of `LoraSettings` too under `finetune`.
        adapter_examples: gives an adapter's own examples, for methods that learn from those.
    """

    base: str
    adapters: Mapping[str, str]
    tasks: Mapping[str, Task]
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adapter_examples: Callable[[str], Sequence[Any]] = lambda adapter: ()
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None

    @functools.cached_property
    def weights_digest(self) -> Callable[[str], str]:
        """SHA-256 of an adapter as it was on disk when this was first asked, and of how it has questions asked."""

        def digest(name: str) -> str:
            adapter = load_adapter(name, self.adapters[name])
            beside = read_beside(adapter.source)
            if not beside.templates and not beside.tokens:
                return adapter.digest
            return _digest(
                [
                    adapter.digest,
                    dict(beside.templates),
                    {text: one.model_dump() for text, one in beside.tokens.items()},
                ]
            )

        return functools.cache(digest)

    @functools.cached_property
    def examples_digest(self) -> Callable[[str], str]:
        """SHA-256 of an adapter's own examples."""
        return functools.cache(lambda adapter: _digest(_contents(parse_examples(self.adapter_examples(adapter)))))

    def base_identity(self) -> list[Any]:
        """What tells the base from others: where it is on the Hub, or what its files look like."""
        directory = Path(self.base).expanduser()
        place = _files_digest(directory) if directory.is_dir() else self.base
        return [place, self.revision, self.dtype, self.quantization]


def _files_digest(directory: Path) -> str:
    """The configuration, and a sample of each file of weights; whole ones may take minutes to read."""
    digest = hashlib.sha256((directory / "config.json").read_bytes() if (directory / "config.json").is_file() else b"")
    for path in sorted((*directory.glob("*.safetensors"), *directory.glob("*.bin"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(16):
                file.seek(size * place // 16)
                digest.update(file.read(4096))
    return f"sha256:{digest.hexdigest()}"


def load_setting(
    setting: str | SettingSpec, *, tasks: Sequence[str] | None = None, allow_code: bool = False
) -> Setting:
    """A setting with the problems of its tasks.

    Args:
        setting: a built-in one or one of another package by name, or one that is written out.
        tasks: the tasks that are wanted; by default all but the mixed ones.
        allow_code: whether scorers may run what a model wrote, in the sandbox.

    Raises:
        DataError: if there is no such setting or task, or a file of it is wrong.
        SandboxError: if a wanted task runs code, and that is not allowed.
    """
    if isinstance(setting, str):
        return _named(setting, tasks, allow_code)
    for name in tasks or ():
        if name not in setting.tasks:
            raise DataError(f"The setting has no task {name!r}. {did_you_mean(name, setting.tasks)}")
    names = tasks or [name for name, spec in setting.tasks.items() if spec.mixed is None and spec.together is None]
    loaded = {name: _load_task(name, setting.tasks[name], setting, allow_code) for name in names}
    return Setting(
        base=setting.base,
        adapters=setting.adapters,
        tasks=loaded,
        recipes=setting.recipes,
        adapter_examples=lambda adapter: _own_examples(setting, adapter),
        revision=setting.revision,
        dtype=setting.dtype,
        quantization=setting.quantization,
    )


def _named(name: str, tasks: Sequence[str] | None, allow_code: bool) -> Setting:
    """A setting that a package names as an entry point.

    Raises:
        DataError: if there is none of that name, or the entry point cannot be imported or gives something else.
    """
    # The library's own come first: no other package can take their names.
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: not point.value.startswith("loraflow."))
    point = next((point for point in points if point.name == name), None)
    if point is None:
        known = did_you_mean(name, {point.name for point in points})
        raise DataError(f"There is no setting {name!r}. {known} Or give a file that ends in .yaml.")
    package = point.dist and point.dist.name
    try:
        make = point.load()
    except Exception as error:
        raise DataError(f"The setting {name!r} of the package {package!r} cannot be imported: {error}.") from error
    setting = make(tasks, allow_code)
    if not isinstance(setting, Setting):
        raise DataError(
            f"The entry point {name!r} of the package {package!r} is {point.value}, which gave {setting!r}. It must be "
            f"a function of `tasks` and `allow_code` that returns a `{Setting.__module__}.Setting`."
        )
    return setting


def _own_examples(setting: SettingSpec, adapter: str) -> list[Example]:
    if adapter not in setting.adapter_data:
        raise DataError(
            f"A method learns from the data of the adapter {adapter!r}, and the setting's `adapter_data` has none. "
            f"{did_you_mean(adapter, setting.adapter_data)}"
        )
    return read_examples(setting.adapter_data[adapter])


def _load_task(name: str, spec: TaskSpec, setting: SettingSpec, allow_code: bool) -> Task:
    if spec.mixed is not None:
        return _mixed(name, spec.mixed, setting, allow_code)
    if spec.together is not None:
        return _together(name, spec.together, setting, allow_code)
    adapters = tuple(spec.adapters or setting.adapters)
    own = () if spec.own is None else (spec.own,)
    for adapter in (*adapters, *own):
        if adapter not in setting.adapters:
            raise DataError(
                f"The task {name!r} wants the adapter {adapter!r}. {did_you_mean(adapter, setting.adapters)}"
            )
    fields = _fields(spec.fields)
    scorers = {} if spec.scorer is None else {spec.scorer: get_scorer(spec.scorer, allow_code=allow_code)}
    harness = None
    if spec.harness is not None:
        harness = HarnessTask(spec.harness, spec.metric, spec.num_fewshot, spec.chat, spec.include_path)
    return Task(
        name=name,
        adapters=adapters,
        test=_read(name, "test", spec.test, _fields(spec.test_fields) or fields),
        scorers=scorers,
        own=own,
        harness=harness,
        train=_read(name, "train", spec.train, fields),
        more_train=functools.partial(_read, name, "more_train", spec.more_train, fields),
        dev=_read(name, "dev", spec.dev, _fields(spec.dev_fields) or fields),
        prompt=spec.prompt or setting.prompt,
        train_prompt=spec.train_prompt,
        max_new_tokens=spec.max_new_tokens,
        stop=tuple(dict.fromkeys((*setting.stop, *spec.stop))),
        problems=spec.problems or name,
        learns_as=name,
        runs_code=spec.scorer == "code-tests",
    )


def _read(task: str, key: str, path: str | None, fields: Fields | None) -> tuple[Example, ...]:
    if path is None:
        return ()
    try:
        return tuple(read_examples(path, fields))
    except DataError as error:
        raise DataError(f"The task {task!r}, `{key}`: {error}") from error


def _fields(names: FieldNames | None) -> Fields | None:
    return None if names is None else Fields(names.prompt, names.completion)


# Several tasks in one.

_OF_TASK = "of_task"


def _together(name: str, sources: Sequence[str], setting: SettingSpec, allow_code: bool) -> Task:
    plain = [task for task, spec in setting.tasks.items() if spec.mixed is None and spec.together is None]
    for source in sources:
        if source not in plain:
            raise DataError(f"The task {name!r} puts {source!r} together with others. {did_you_mean(source, plain)}")
    return join_tasks(name, [_load_task(source, setting.tasks[source], setting, allow_code) for source in sources])


def join_tasks(name: str, tasks: Sequence[Task]) -> Task:
    """A task with the problems of several in turns, each scored as where it comes from; nothing is learned on it.

    Raises:
        DataError: if a task has no problems of its own, or they differ in adapters, prompts, endings or metric.
    """
    first = tasks[0]
    if names := [task.name for task in tasks if not task.test]:
        raise DataError(f"The task {name!r} needs problems in memory, and {names[0]!r} has none. Leave it out.")
    for what in ("adapters", "prompt", "stop", "metric"):
        for task in tasks:
            if getattr(task, what) != getattr(first, what):
                raise DataError(
                    f"The task {name!r} puts {first.name!r} and {task.name!r} together, which differ in `{what}`: "
                    f"{getattr(first, what)!r} and {getattr(task, what)!r}. Join tasks that have it in common."
                )
    turns = [(task, at) for at in range(max(len(t.test) for t in tasks)) for task in tasks if at < len(task.test)]
    test = [dataclasses.replace(one := task.test[at], record={**one.record, _OF_TASK: task.name}) for task, at in turns]
    own = [task.own[at % len(task.own)] if task.own else "" for task, at in turns]
    scorers = {task.name: task.scorers[task.metric] for task in tasks}
    return Task(
        name=name,
        adapters=first.adapters,
        test=tuple(test),
        scorers={first.metric: lambda generated, record: scorers[record[_OF_TASK]](generated, record)},
        own=tuple(own) if all(own) else (),
        prompt=first.prompt,
        max_new_tokens=max(task.max_new_tokens for task in tasks),
        stop=first.stop,
        problems=name,
        learns_as=name,
        runs_code=any(task.runs_code for task in tasks),
    )


# Mixed-language questions.

# The point of a decimal, as in 3.5, ends no sentence.
_SENTENCE = re.compile(r"(?:[^.!?。！？]|\.(?=\d))*(?:[.!?。！？]+|\Z)\s*")


def _mixed(name: str, spec: MixSpec, setting: SettingSpec, allow_code: bool) -> Task:
    for source in (spec.task, spec.other):
        if source not in setting.tasks or setting.tasks[source].mixed is not None:
            plain = [task for task, other in setting.tasks.items() if other.mixed is None]
            raise DataError(f"The task {name!r} mixes {source!r}. {did_you_mean(source, plain)}")
    first, other = (
        _load_task(source, setting.tasks[source], setting, allow_code) for source in (spec.task, spec.other)
    )
    return mix_tasks(name, first, other, spec.how)


def mix_tasks(name: str, task: Task, other: Task, how: str) -> Task:
    """A task whose questions have sentences of another language between their own.

    Args:
        name: of the mixed task.
        task: whose answers, scorers, adapters and training data it has.
        other: has the same problems in the same order, in another language.
        how: "alternate" takes every second sentence from the other, "question" the last sentence only.

    Raises:
        DataError: if the two have not the same number of problems, or one is of lm-evaluation-harness.
    """
    if not task.test or len(task.test) != len(other.test):
        raise DataError(
            f"The task {name!r} mixes {task.name!r} ({len(task.test)} problems of its own) and {other.name!r} "
            f"({len(other.test)}). Give two tasks with `test` files of the same problems in the same order."
        )
    mixed = []
    for example, foreign in zip(task.test, other.test, strict=True):
        text = mix_sentences(example.messages[-1]["content"], foreign.messages[-1]["content"], how)
        messages = (*example.messages[:-1], {"role": "user", "content": text})
        mixed.append(dataclasses.replace(example, messages=messages))
    return dataclasses.replace(task, name=name, test=tuple(mixed))


def mix_sentences(text: str, other: str, how: str) -> str:
    """A text with some of its sentences replaced by those at the same place of its translation."""
    mine, theirs = (_SENTENCE.findall(t) for t in (text.strip(), other.strip()))
    mine, theirs = ([s for s in sentences if s.strip()] for sentences in (mine, theirs))
    replaced = range(1, len(mine), 2) if how == "alternate" else [len(mine) - 1]
    pieces = list(mine)
    for index in replaced:
        # Translations may have more or fewer sentences; the same share of the way, and the last for the last.
        place = index if len(mine) == len(theirs) else round(index * (len(theirs) - 1) / max(1, len(mine) - 1))
        pieces[index] = theirs[place]
    return " ".join(piece.strip() for piece in pieces)

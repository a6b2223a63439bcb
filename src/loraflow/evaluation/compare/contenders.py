"""What is compared, made ready to answer: methods as they are, fitted or saved, single adapters, fine-tuned LoRAs."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraflow.adapters import load_adapter
from loraflow.bases import BaseOptions, load_base, load_tokenizer
from loraflow.errors import DataError, MethodError, did_you_mean
from loraflow.evaluation.compare.plan import NEW_LORA, ContenderSpec
from loraflow.evaluation.compare.tasks import Setting, Task
from loraflow.files import write_atomically
from loraflow.methods import Method, get_method
from loraflow.model import FusedModel
from loraflow.prompts import PromptFormat
from loraflow.saved.fusion import SavedFusion
from loraflow.training import FitConfig, LoraSettings, finetune, fit, search
from loraflow.training.checkpoints import complete_checkpoints
from loraflow.training.config import LEARNING_RATE
from loraflow.training.learners import Learner, learner_of

FIT_FILE = "fit.json"
IDENTITY_FILE = "identity.json"
SECONDS_FILE = "seconds.txt"
TUNED = "tuned"


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: what the table calls it.
        spec: what it is.
        setting: what it is compared on.
    """

    name: str
    spec: ContenderSpec
    setting: Setting

    def adapters(self, task: Task) -> list[str]:
        """The adapters that it fuses on a task.

        Raises:
            DataError: if the setting lacks one of them.
        """
        if self.spec.adapters == "task":
            return list(task.adapters)
        if self.spec.adapters == "all":
            return list(self.setting.adapters)
        for name in self.spec.adapters:
            if name not in self.setting.adapters:
                raise DataError(
                    f"The row {self.name!r} wants the adapter {name!r}. {did_you_mean(name, self.setting.adapters)}"
                )
        return list(self.spec.adapters)

    def method(self, task: Task) -> Method | None:
        """The method that it uses on a task; None where it is not given by one.

        Raises:
            MethodError: if there is no such method, or a parameter of it is wrong.
        """
        if self.spec.adapter is not None:
            return get_method({self._adapter(self.spec.adapter, task): 1.0}, self.adapters(task))
        if self.spec.method is None:
            return None
        return get_method(self.spec.method, self.adapters(task), self.spec.options)

    def learner(self, task: Task) -> Learner | None:
        """How its method learns, where it does."""
        method = self.method(task)
        return None if method is None or method.learns is None else learner_of(method)

    def learns(self, task: Task) -> bool:
        """Whether it learns anything."""
        return self.spec.finetune is not None or self.learner(task) is not None

    def reads_adapters(self, task: Task) -> bool:
        """Whether it learns from its adapters' own data, and not from the task's."""
        learner = self.learner(task)
        return learner is not None and learner.reads == "adapters"

    def seeded(self, task: Task) -> bool:
        """Whether seeds make a difference to it."""
        learner = self.learner(task)
        return self.spec.finetune is not None or (learner is not None and learner.seeded)

    def fit_task(self, task: Task) -> Task:
        """The task that it learns on when a task is answered.

        Raises:
            DataError: if the setting lacks it, or what was learned there cannot be used here.
        """
        if self.spec.fitted_on is None:
            return task
        source = self.setting.tasks.get(self.spec.fitted_on)
        if source is None:
            raise DataError(
                f"The row {self.name!r} learns on the task {self.spec.fitted_on!r}. "
                f"{did_you_mean(self.spec.fitted_on, self.setting.tasks)}"
            )
        here, there = len(self.adapters(task)), len(self.adapters(source))
        if here != there:
            raise DataError(
                f"The row {self.name!r} learns on {source.name!r} with {there} adapters, and {task.name!r} has {here}. "
                "Leave one of the tasks out."
            )
        return source

    def config(self, task: Task, seed: int | None) -> tuple[FitConfig, LoraSettings | None]:
        """The recipe of its fit, and the LoRA that it trains, if it does.

        Raises:
            DataError: if a setting of either is unknown.
        """
        method = self.method(task)
        kind = "finetune" if self.spec.finetune is not None else cast(Method, method).name
        settings = {**self.setting.recipes.get(kind, {}), **self.spec.fit}
        known = [f.name for f in dataclasses.fields(FitConfig)]
        of_lora = [f.name for f in dataclasses.fields(LoraSettings)] if self.spec.finetune is not None else []
        for name in settings:
            if name not in (*known, *of_lora):
                raise DataError(
                    f"The row {self.name!r} has the unknown setting {name!r} of its fit. "
                    f"{did_you_mean(name, [*known, *of_lora])}"
                )
        for name, value in settings.items():
            if isinstance(value, str) and name != "target_modules":
                raise DataError(f"The row {self.name!r}: `fit.{name}` (={value!r}) is text, and must be a number.")
        of_fit = {name: value for name, value in settings.items() if name in known} | {"seed": seed or 0}
        if self.spec.finetune is None:
            return FitConfig.for_method(cast(Method, method), **of_fit), None
        lora = None
        if self.spec.finetune == NEW_LORA:
            lora = LoraSettings(**{name: value for name, value in settings.items() if name in of_lora})
        return FitConfig(**{"learning_rate": LEARNING_RATE, **of_fit}), lora

    def fit_identity(self, task: Task, seed: int | None) -> dict[str, Any]:
        """What makes two fits the same one, as JSON values; empty where nothing is learned."""
        if not self.learns(task):
            return {}
        source = self.fit_task(task)
        config, lora = self.config(source, seed)
        identity = {
            "kind": self.spec.short() | {"fitted_on": None},
            "adapters": self.adapters(source),
            "config": dataclasses.asdict(config),
            "lora": None if lora is None else dataclasses.asdict(lora),
            "data": [self.setting.adapter_digest(name) for name in self.adapters(source)]
            if self.reads_adapters(source)
            else source.train_digest(self.spec.examples),
        }
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    def check(self, task: Task) -> None:
        """Find out what can be wrong before anything is loaded.

        Raises:
            DataError: if data that it learns from are missing.
            MethodError: if it is given `search` or `fitted_on` and cannot use it.
        """
        source = self.fit_task(task)
        if self.spec.fusion is not None:
            SavedFusion.open(self.spec.fusion)
        if isinstance(self.spec.finetune, int | str) and self.spec.finetune != NEW_LORA:
            self._adapter(self.spec.finetune, source)
        if not self.learns(task):
            for name in ("fit", "search", "examples", "fitted_on"):
                if getattr(self.spec, name):
                    raise MethodError(f"The row {self.name!r} learns nothing here. Leave `{name}` out.")
            return
        self.config(source, 0)
        learner = self.learner(task)
        if self.spec.search and (learner is None or not learner.has_grid):
            raise MethodError(f"The row {self.name!r} does not learn by gradient on a task. Leave `search` out.")
        if self.spec.finetune is not None and self.spec.fitted_on is not None:
            raise MethodError(
                f"The row {self.name!r} is fine-tuned. `fitted_on` is for gates, which fit any adapters; leave it out."
            )
        if self.reads_adapters(source):
            if self.spec.examples is not None:
                raise MethodError(f"The row {self.name!r} learns from its adapters' own data. Leave `examples` out.")
            for adapter in self.adapters(source):
                assert self.setting.adapter_examples is not None
                self.setting.adapter_examples(adapter)
        elif not source.train:
            raise DataError(
                f"The row {self.name!r} learns on the task {source.name!r}, which has no `train` examples. "
                "Name them in the setting, or leave the row out."
            )
        elif (wanted := self.spec.examples) is not None and wanted > len(source.training(wanted)):
            raise DataError(
                f"The row {self.name!r} wants {wanted} examples, and {source.name!r} has "
                f"{len(source.training(wanted))}. Name further ones as `more_train` in the setting, or want fewer."
            )
        if self.spec.search and not source.dev:
            raise DataError(f"The row {self.name!r} searches a grid, and {source.name!r} has no `dev` examples.")

    def _adapter(self, which: int | str, task: Task) -> str:
        """An adapter by name, or by its position among the task's.

        Raises:
            DataError: if there is none such.
        """
        names = self.adapters(task)
        if isinstance(which, int) and -len(names) <= which < len(names):
            return names[which]
        if which not in names:
            raise DataError(
                f"The row {self.name!r} wants the adapter {which!r}, and {task.name!r} has "
                f"{', '.join(map(repr, names))}. Give one of them, or a position from 0 to {len(names) - 1}."
            )
        return str(which)

    def adapter_of(self, task: Task) -> str | None:
        """The adapter that is trained further; None for a new one."""
        which = cast(int | str, self.spec.finetune)
        return None if which == NEW_LORA else self._adapter(which, task)


@dataclass(frozen=True)
class Prepared:
    """A contender that is ready to answer.

    Attributes:
        model: it.
        learned_parameters: how many values it learned.
        examples: how many examples it learned them from.
        fit_s: how long that took.
        details: what else is worth keeping.
    """

    model: FusedModel
    learned_parameters: int = 0
    examples: int | None = None
    fit_s: float = 0.0
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Bench:
    """The base model of a setting, loaded once, with whatever adapters the contender at hand needs.

    Attributes:
        setting: what is compared on.
    """

    setting: Setting

    def __init__(self, setting: Setting, device: str | None = None) -> None:
        self.setting = setting
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._options = BaseOptions(setting.revision, setting.dtype, device, setting.quantization)
        self._base: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model: FusedModel | None = None
        self._attached: dict[str, str] = {}
        self._digests: dict[str, str] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.setting.base, self._options)
        return self._tokenizer

    def bare(self) -> PreTrainedModel:
        """The base model with nothing attached."""
        if self._base is None:
            self._base = load_base(self.setting.base, self._options)
        if self._model is not None:
            self._model.unload()
            self._model, self._attached = None, {}
        return self._base

    def fused(self, adapters: Mapping[str, str | Path], method: str | Method) -> FusedModel:
        """The base with these adapters and a method whose gates are as made."""
        wanted = {name: str(path) for name, path in adapters.items()}
        # Two orders of the same adapters are two fusions.
        if self._model is None or list(self._attached.items()) != list(wanted.items()):
            self._model = FusedModel.from_adapters(self.bare(), wanted, method, tokenizer=self.tokenizer)
            self._attached = wanted
        else:
            self._model.set_method(method)
        return self._model

    def digests(self, adapters: Sequence[str]) -> list[Any]:
        """What tells this base and these adapters from others of the same names, as JSON values."""
        setting = self.setting
        for name in adapters:
            if name not in self._digests:
                self._digests[name] = load_adapter(name, setting.adapters[name]).digest
        return [setting.base_identity(), *(self._digests[name] for name in adapters)]

    def saved(self, path: str) -> FusedModel:
        """A saved fusion on the same base."""
        model = FusedModel.from_pretrained(path, base=self.bare(), tokenizer=self.tokenizer)
        self._model, self._attached = model, {"": path}
        return model


def prepare(
    bench: Bench,
    contender: Contender,
    task: Task,
    seed: int | None,
    directory: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Make a contender ready for a task, learning what it learns unless that is kept in the directory.

    Args:
        bench: the base model.
        contender: the contender.
        task: what it is to answer.
        seed: of what is drawn at random while it learns.
        directory: where what it learns is kept, and where an interrupted fit goes on.
        say: hears how the learning goes on, line by line.

    Returns:
        The contender, its model set to the task's prompt format.
    """
    if contender.spec.fusion is not None:
        model = bench.saved(contender.spec.fusion)
        if task.prompt != PromptFormat():
            model.prompt = task.prompt.resolve(bench.tokenizer)
        return Prepared(model, model.num_learned_parameters())
    if not contender.learns(task):
        model = bench.fused(_paths(bench, contender.adapters(task)), cast(Method, contender.method(task)))
        model.prompt = task.prompt.resolve(bench.tokenizer)
        return Prepared(model)
    source = contender.fit_task(task)
    _keep_only(directory, {**contender.fit_identity(task, seed), "fitted": bench.digests(contender.adapters(source))})
    if not (directory / FIT_FILE).is_file():
        stopwatch = _Stopwatch(directory / SECONDS_FILE)

        def tell(text: str) -> None:
            stopwatch.keep()
            say(text)

        before = complete_checkpoints(directory / "checkpoints")
        tell("learning" if not before else f"learning goes on from {before[-1].name}")
        prompt = (source.train_prompt or source.prompt).resolve(bench.tokenizer)
        learn = _fit if contender.spec.finetune is None else _finetune
        facts = learn(bench, contender, source, seed, prompt, directory, _console(tell))
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        facts["fit_s"] = stopwatch.seconds()
        write_atomically(directory / FIT_FILE, json.dumps(facts).encode())
        stopwatch.forget()
    facts = json.loads((directory / FIT_FILE).read_text(encoding="utf-8"))
    if contender.spec.finetune is not None:
        model = bench.fused({TUNED: directory / "adapter"}, TUNED)
    else:
        model = bench.fused(_paths(bench, contender.adapters(task)), cast(Method, contender.method(task)))
        model.load_state_dict(SavedFusion.open(directory / "fusion").tensors)
    model.prompt = task.prompt.resolve(bench.tokenizer)
    return Prepared(model, facts["parameters"], facts["examples"], facts["fit_s"], facts["details"])


class _Stopwatch:
    """Seconds of a fit, those before it was interrupted included, as far as they were kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def keep(self) -> None:
        write_atomically(self._path, repr(self.seconds()).encode())

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)


class _Lines(io.TextIOBase):
    """A file that hands on every line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                self._say(line.strip())
        return len(text)


def _console(say: Callable[[str], None]) -> Console:
    return Console(file=cast(IO[str], _Lines(say)), force_terminal=False, width=200)


def _keep_only(directory: Path, identity: Mapping[str, Any]) -> None:
    """Forget what another fit left in the directory; an interrupted one of this very fit goes on."""
    path = directory / IDENTITY_FILE
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == identity:
        return
    shutil.rmtree(directory, ignore_errors=True)
    write_atomically(path, json.dumps(identity).encode())


def _paths(bench: Bench, adapters: Sequence[str]) -> dict[str, str]:
    return {name: bench.setting.adapters[name] for name in adapters}


def _fit(
    bench: Bench,
    contender: Contender,
    task: Task,
    seed: int | None,
    prompt: PromptFormat,
    directory: Path,
    console: Console,
) -> dict[str, Any]:
    """Fit a method on a task and save the fusion."""
    model = bench.fused(_paths(bench, contender.adapters(task)), cast(Method, contender.method(task)))
    model.prompt = prompt
    config, _ = contender.config(task, seed)
    train, dev = list(task.training(contender.spec.examples)), list(task.dev) or None
    shared: dict[str, Any] = {
        "config": config,
        "checkpoints": directory / "checkpoints",
        "resume": True,
        "console": console,
    }
    if contender.spec.search:
        assert dev is not None
        result = search(model, train, dev=dev, **shared)
        examples = len(train)
    elif contender.reads_adapters(task):
        own = {name: list(cast(Any, bench.setting).adapter_examples(name)) for name in model.adapter_names}
        result = fit(model, own, **shared)
        examples = sum(map(len, own.values()))
    else:
        result = fit(model, train, dev=dev, **shared)
        examples = len(train)
    model.save_pretrained(directory / "fusion")
    details = {
        "start": dict(result.start),
        "dev_loss": result.dev_loss,
        "kept_step": result.kept_step,
        "steps": result.steps,
        "search": result.search,
    }
    return {"parameters": model.num_learned_parameters(), "examples": examples, "details": details}


def _finetune(
    bench: Bench,
    contender: Contender,
    task: Task,
    seed: int | None,
    prompt: PromptFormat,
    directory: Path,
    console: Console,
) -> dict[str, Any]:
    """Train a LoRA on a task and save it."""
    config, lora = contender.config(task, seed)
    adapter = contender.adapter_of(task)
    train = list(task.training(contender.spec.examples))
    result = finetune(
        bench.bare(),
        train,
        directory / "adapter",
        adapter=None if adapter is None else bench.setting.adapters[adapter],
        lora=lora,
        dev=list(task.dev) or None,
        config=config,
        tokenizer=bench.tokenizer,
        prompt=prompt,
        checkpoints=directory / "checkpoints",
        resume=True,
        console=console,
    )
    details = {"dev_loss": result.dev_loss, "kept_step": result.kept_step, "steps": result.steps}
    return {"parameters": result.parameters, "examples": len(train), "details": details}

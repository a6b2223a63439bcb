"""A row made ready to answer: a method as it is, fitted or saved, an adapter alone, a fine-tuned LoRA."""

from __future__ import annotations

import functools
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraflow.adapters import AdapterSource, load_adapter, match_adapter
from loraflow.bases import BaseOptions, choose, load_base, load_tokenizer, with_tokens
from loraflow.evaluation.compare.rows import PlannedRow
from loraflow.evaluation.compare.tasks import Setting, Task
from loraflow.files import write_atomically
from loraflow.merging import Loss, Merge, merge_adapters
from loraflow.methods import Method
from loraflow.model import FusedModel
from loraflow.prompts import PromptFormat
from loraflow.saved.fusion import SavedFusion
from loraflow.training import finetune, fit, search
from loraflow.training.checkpoints import can_resume, complete_checkpoints
from loraflow.training.data import note_endings

FIT_FILE = "fit.json"
IDENTITY_FILE = "identity.json"
SECONDS_FILE = "seconds.txt"
TUNED = "tuned"
MERGED = "merged"


class Bench:
    """The base model of a setting, loaded once, with whatever adapters the row at hand needs."""

    def __init__(self, setting: Setting, device: str | None = None) -> None:
        self.setting = setting
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._options = BaseOptions(setting.revision, setting.dtype, device, setting.quantization)
        self._model: FusedModel | None = None
        self._attached: list[tuple[str, str]] = []

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return load_tokenizer(self.setting.base, self._options)

    @functools.cached_property
    def _base(self) -> PreTrainedModel:
        return load_base(self.setting.base, self._options)

    def bare(self) -> PreTrainedModel:
        """The base model with nothing attached."""
        if self._model is not None:
            self._model.unload()
            self._model = None
        return self._base

    def fused(self, adapters: Mapping[str, str], method: str | Method, prompt: PromptFormat) -> FusedModel:
        """The base with these adapters and a method whose gates are as made, asked in a format, which is resolved."""
        # Two orders of the same adapters are two fusions.
        if self._model is None or self._attached != list(adapters.items()):
            self._model = FusedModel.from_adapters(
                self.bare(), adapters, method, tokenizer=self.tokenizer, prompt=prompt
            )
            self._attached = list(adapters.items())
        else:
            self._model.set_method(method)
        return self._model

    def of_row(self, row: PlannedRow, task: Task) -> FusedModel:
        """The base with the adapters and the method that a row has on a task."""
        adapters = {name: self.setting.adapters[name] for name in row.adapters(task)}
        _, prompt = self.manner(task, task.prompt)
        return self.fused(adapters, cast(Method, row.method(task)), prompt)

    def merged(self, row: PlannedRow, task: Task, seed: int | None) -> tuple[FusedModel, Loss]:
        """The base with the adapters of a row merged into one, and what that loses of their sum."""
        base = self.bare()
        _, prompt = self.manner(task, task.prompt)
        adapters = [match_adapter(load_adapter(n, self.setting.adapters[n]), base) for n in row.adapters(task)]
        merge = cast(Merge, row.merge(task, seed))
        merged = merge_adapters(adapters, merge, rank=row.spec.rank, name=MERGED)
        one = {MERGED: merged.adapter}
        self._model = FusedModel.from_adapters(base, one, MERGED, tokenizer=self.tokenizer, prompt=prompt)
        self._attached = [("", merge.name)]
        return self._model, merged.from_sum

    def manner(self, task: Task, prompt: PromptFormat) -> tuple[PreTrainedTokenizerBase, PromptFormat]:
        """How all rows are asked on a task: with its adapters' tokenizer and chat template, where they bring one."""
        sources = {name: AdapterSource.parse(self.setting.adapters[name]) for name in task.adapters}
        rows = self._base.config.get_text_config(decoder=True).vocab_size
        choice = choose(prompt, self.tokenizer, sources, rows)
        tokenizer = with_tokens(self.tokenizer, choice.tokens)
        return tokenizer, choice.prompt.resolve(tokenizer)

    def saved(self, path: str) -> FusedModel:
        """A saved fusion on the same base."""
        self._model = FusedModel.from_pretrained(path, base=self.bare(), tokenizer=self.tokenizer)
        self._attached = [("", path)]
        return self._model


def prepare(
    bench: Bench, row: PlannedRow, task: Task, seed: int | None, directory: Path, say: Callable[[str], None]
) -> tuple[FusedModel, dict[str, Any]]:
    """Make a row ready for a task, learning what it learns unless that is kept in the directory.

    Args:
        bench: the base model.
        row: the row.
        task: what it is to answer.
        seed: of what is drawn at random while it learns.
        directory: where what it learns is kept, and where an interrupted fit goes on.
        say: hears how the learning goes on, line by line.

    Returns:
        The model, and what a `Record` says of how it learned.
    """
    facts: dict[str, Any] = {"learned_parameters": 0, "examples": None, "fit_s": 0.0}
    if row.spec.fusion is not None:
        model = bench.saved(row.spec.fusion)
        facts["learned_parameters"] = model.num_learned_parameters()
    elif row.spec.merge is not None:
        model, loss = bench.merged(row, task, seed)
        facts["details"] = {"from_sum": loss.error}
    elif row.learns(task):
        facts = _learned(bench, row, task, seed, directory, say)
        if row.spec.on_top_of is not None:
            model = bench.saved(str(directory / "fusion"))
        elif row.spec.finetune is not None:
            model = bench.fused({TUNED: str(directory / "adapter")}, TUNED, bench.manner(task, task.prompt)[1])
        else:
            model = bench.of_row(row, task)
            model.load_state_dict(SavedFusion.open(directory / "fusion").tensors)
    else:
        model = bench.of_row(row, task)
    if row.spec.fusion is None:
        model.tokenizer, prompt = bench.manner(task, task.prompt)
        model.set_prompt(prompt)
    elif task.prompt not in (PromptFormat(), model.prompt):
        # Else a saved fusion has a format of its own.
        model.prompt = task.prompt
    model.endings = model.endings.and_stop(task.stop, model.tokenizer)
    note_endings(model, task.test)
    return model, facts


def _learned(
    bench: Bench, row: PlannedRow, task: Task, seed: int | None, directory: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Learn, unless this very fit is in the directory, and give the facts of the fit."""
    source, setting = row.fit_task(task), bench.setting
    fitted = [setting.base_identity(), *map(setting.weights_digest, row.adapters(source))]
    _keep_only(directory, {**row.fit_identity(task, seed), "fitted": fitted})
    if not (directory / FIT_FILE).is_file():
        stopwatch = _Stopwatch(directory / SECONDS_FILE)

        def tell(text: str) -> None:
            stopwatch.keep()
            say(text)

        before = complete_checkpoints(directory / "checkpoints")
        tell("learning" if not before else f"learning goes on from {before[-1].name}")
        console = Console(file=cast(IO[str], _Lines(tell)), force_terminal=False, width=200)
        facts = _learn(bench, row, source, seed, directory, console)
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        facts["fit_s"] = stopwatch.seconds()
        write_atomically(directory / FIT_FILE, json.dumps(facts).encode())
        stopwatch.forget()
    facts = json.loads((directory / FIT_FILE).read_text(encoding="utf-8"))
    return {"learned_parameters": facts.pop("parameters"), **facts}


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


def _keep_only(directory: Path, identity: Mapping[str, Any]) -> None:
    """Forget what another fit left in the directory; an interrupted one of this very fit goes on."""
    path = directory / IDENTITY_FILE
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == identity:
        return
    shutil.rmtree(directory, ignore_errors=True)
    write_atomically(path, json.dumps(identity).encode())


def _below(
    bench: Bench, row: PlannedRow, task: Task, seed: int | None, directory: Path, console: Console
) -> tuple[FusedModel, int]:
    """What a LoRA is trained on top of, fitted unless that is kept, and its number of learned values."""
    if not row.learns(task):
        return bench.of_row(row, task), 0
    fitted = directory / FIT_FILE
    if not fitted.is_file():
        facts = _learn(bench, row, task, seed, directory, console)
        write_atomically(fitted, json.dumps(facts).encode())
    model = bench.of_row(row, task)
    model.load_state_dict(SavedFusion.open(directory / "fusion").tensors)
    return model, json.loads(fitted.read_text(encoding="utf-8"))["parameters"]


def _learn(
    bench: Bench, row: PlannedRow, task: Task, seed: int | None, directory: Path, console: Console
) -> dict[str, Any]:
    """Fit a method on a task and save the fusion, or train a LoRA and save that."""
    config, lora = row.config(task, seed)
    tokenizer, prompt = bench.manner(task, task.train_prompt or task.prompt)
    train, dev = list(task.training(row.spec.examples)), list(task.dev) or None
    examples, result = len(train), cast(Any, None)
    details: dict[str, Any]
    checkpoints = directory / "checkpoints"
    resume = can_resume(checkpoints)
    run: dict[str, Any] = {
        "config": config,
        "checkpoints": checkpoints,
        "resume": resume,
        # One that was interrupted before there was anything to go on from.
        "overwrite": not resume,
        "console": console,
    }
    below = row.below(task)
    if below is not None:
        model, learned = _below(bench, below, task, seed, directory / "below", console)
        model.tokenizer = tokenizer
        model.set_prompt(prompt, task.stop)
        result = model.finetune(train, directory / "fusion", name=TUNED, lora=lora, dev=dev, **run)
        details, parameters = {}, result.parameters + learned
    elif row.spec.finetune is not None:
        result = finetune(
            bench.bare(),
            train,
            directory / "adapter",
            adapter=row.tuned_from(task),
            lora=lora,
            dev=dev,
            tokenizer=tokenizer,
            prompt=prompt,
            **run,
        )
        details, parameters = {}, result.parameters
    else:
        model = bench.of_row(row, task)
        model.tokenizer = tokenizer
        model.set_prompt(prompt, task.stop)
        if row.reads_adapters(task):
            own = {name: list(bench.setting.adapter_examples(name)) for name in model.adapter_names}
            result, examples = fit(model, own, **run), sum(map(len, own.values()))
        else:
            result = (search if row.spec.search else fit)(model, train, dev=cast(Any, dev), **run)
        model.save_pretrained(directory / "fusion")
        details = {"start": dict(result.start), "search": result.search}
        parameters = model.num_learned_parameters()
    details |= {"dev_loss": result.dev_loss, "kept_step": result.kept_step, "steps": result.steps}
    return {"parameters": parameters, "examples": examples, "details": details}

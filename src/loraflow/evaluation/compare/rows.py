"""A row of a plan: its adapters and method on a task, where and how it learns, and what can be wrong with it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, cast

from loraflow.errors import DataError, LoraflowError, MethodError, did_you_mean
from loraflow.evaluation.compare.plan import NEW_LORA, OWN, RowSpec
from loraflow.evaluation.compare.tasks import Setting, Task
from loraflow.merging import Merge, make_merge
from loraflow.methods import Method, get_method
from loraflow.methods.on_top import put_on_top
from loraflow.saved.fusion import SavedFusion
from loraflow.training import FitConfig, LoraSettings
from loraflow.training.config import LEARNING_RATE
from loraflow.training.learners import Learner, learner_of


@dataclass(frozen=True)
class PlannedRow:
    """One row of the table."""

    name: str
    spec: RowSpec
    setting: Setting

    def adapters(self, task: Task) -> list[str]:
        """The adapters that it fuses on a task.

        Raises:
            DataError: if the setting lacks one of them, one is to be left out that is not there, or none is left.
        """
        whole = {"task": task.adapters, "all": tuple(self.setting.adapters)}
        names = whole[self.spec.adapters] if isinstance(self.spec.adapters, str) else tuple(self.spec.adapters)
        for name in names:
            if name not in self.setting.adapters:
                raise DataError(
                    f"The row {self.name!r} wants the adapter {name!r}. {did_you_mean(name, self.setting.adapters)}"
                )
        absent = {self._own(task) if name == OWN else name for name in self.spec.without}
        for name in sorted(absent - set(names)):
            raise DataError(f"The row {self.name!r} is `without` {name!r}. {did_you_mean(name, names)}")
        left = [name for name in names if name not in absent]
        if not left:
            raise DataError(f"The row {self.name!r} leaves out all adapters of {task.name!r}. Keep one of them.")
        return left

    def uses_own(self, task: Task) -> str | None:
        """The adapter made for a task, where this row is told of it; another one there makes another row.

        Raises:
            DataError: if it is, and the task has none or several.
        """
        told = OWN in (self.spec.adapter, self.spec.finetune, self.spec.on_top_of, *self.spec.without)
        return self._own(task) if told else None

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

    def below(self, task: Task) -> PlannedRow | None:
        """The row that a new LoRA is trained on top of; None where that is the base.

        Raises:
            DataError: if there is no such adapter.
            MethodError: if there is no such method, or nothing can be on top of it.
        """
        on, among = self.spec.on_top_of, {"adapters": self.spec.adapters, "without": self.spec.without}
        if on is None:
            return None
        if isinstance(on, int) or on == OWN or on in self.adapters(task):
            return dataclasses.replace(self, spec=_row_spec(adapter=self._adapter(on, task), **among))
        row = dataclasses.replace(self, spec=_row_spec(method=on, **among))
        put_on_top(cast(Method, row.method(task)), self.name)
        if row.learns(task) and not row.reads_adapters(task):
            return dataclasses.replace(row, spec=row.spec.model_copy(update={"examples": self.spec.examples}))
        return row

    def merge(self, task: Task, seed: int | None = None) -> Merge | None:
        """The merge that makes one adapter of its adapters on a task, by this seed; None where it is no merge.

        Raises:
            MethodError: if there is no such merge, or an option of it is wrong.
        """
        if self.spec.merge is None:
            return None
        drawn = {} if seed is None else {"seed": seed}
        merge = make_merge(self.spec.merge, {**drawn, **self.spec.options})
        merge.check(self.adapters(task))
        return merge

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
        learner, merge = self.learner(task), self.merge(task)
        if merge is not None:
            return merge.draws and "seed" not in self.spec.options
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
        if settings.get("report_to"):
            raise DataError(
                f"The row {self.name!r}: `fit.report_to` (={settings['report_to']!r}) is for one fit, and a comparison "
                "keeps its own records. Leave it out."
            )
        of_fit = {name: value for name, value in settings.items() if name in known} | {"seed": seed or 0}
        try:
            if self.spec.finetune is None:
                return FitConfig.for_method(cast(Method, method), **of_fit), None
            lora = None
            if self.spec.finetune == NEW_LORA:
                lora = LoraSettings(**{name: value for name, value in settings.items() if name in of_lora})
            return FitConfig(**{"learning_rate": LEARNING_RATE, **of_fit}), lora
        except LoraflowError as error:
            raise DataError(f"The row {self.name!r}, `fit`: {error}") from error

    def fit_identity(self, task: Task, seed: int | None) -> dict[str, Any]:
        """What makes two fits the same one, as JSON values; empty where nothing is learned."""
        if not self.learns(task):
            return {}
        source = self.fit_task(task)
        config, lora = self.config(source, seed)
        identity = {
            "kind": self.spec.short() | {"fitted_on": None},
            "adapters": self.adapters(source),
            "config": config.identity(),
            "lora": None if lora is None else dataclasses.asdict(lora),
            "data": [self.setting.examples_digest(name) for name in self.adapters(source)]
            if self.reads_adapters(source)
            else source.train_digest(self.spec.examples),
        }
        below = self.below(source)
        if below is not None:
            identity["below"] = below.fit_identity(source, seed)
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    def check(self, task: Task) -> None:
        """Find out what can be wrong before anything is loaded.

        Raises:
            DataError: if data that it learns from are missing.
            MethodError: if it is given `search` or `fitted_on` and cannot use it.
        """
        source = self.fit_task(task)
        self.merge(task)
        if self.spec.fusion is not None:
            SavedFusion.open(self.spec.fusion)
        if isinstance(self.spec.finetune, int | str) and self.spec.finetune != NEW_LORA:
            self._adapter(self.spec.finetune, source)
        below = self.below(source)
        if below is not None:
            below.check(source)
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
        which = self._own(task) if which == OWN else which
        if isinstance(which, int) and -len(names) <= which < len(names):
            return names[which]
        if which not in names:
            raise DataError(
                f"The row {self.name!r} wants the adapter {which!r}, and {task.name!r} has "
                f"{', '.join(map(repr, names))}. Give one of them, or a position from 0 to {len(names) - 1}."
            )
        return str(which)

    def _own(self, task: Task) -> str:
        """The one adapter that was made for a task.

        Raises:
            DataError: if there is none, or its problems have several.
        """
        if OWN in self.setting.adapters:
            raise DataError(
                f"The row {self.name!r} says {OWN!r}, which is a task's own adapter, and one adapter has that name. "
                "Give that one another name in the setting."
            )
        if len(set(task.own)) != 1:
            found = "has problems with adapters of their own" if task.own else "does not say which adapter is its own"
            raise DataError(
                f"The row {self.name!r} wants the task's own adapter, and {task.name!r} {found}. Say `own` in the "
                "setting's task, or `if_possible: true` in the row."
            )
        return task.own[0]

    def tuned_from(self, task: Task) -> str | None:
        """Where the adapter is that is trained further; None for a new one."""
        which = cast(int | str, self.spec.finetune)
        return None if which == NEW_LORA else self.setting.adapters[self._adapter(which, task)]


def _row_spec(**fields: Any) -> RowSpec:
    return RowSpec.model_validate(fields)

"""Evaluating one task of lm-evaluation-harness: found, loaded, run with the sandbox in place, and its scores collected.

A metric's name is lm-eval's, with its filter's if that has one: `exact_match`, `exact_match,flexible-extract`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from loraflow.core.fusion import Fusion
from loraflow.errors import DataError, LoraflowError
from loraflow.evaluation.harness.code_check import check_code_task
from loraflow.evaluation.harness.code_eval import announce, require_permission, sandboxed_code_eval
from loraflow.evaluation.harness.finding import cannot, find_task, load_task
from loraflow.evaluation.harness.models import Progress, changed_problem, lm_classes

_SEED = 1234
# lm-eval's own 100,000 resamples, of the few metrics that are no means, take minutes.
_RESAMPLES = 1000


@dataclass(frozen=True)
class HarnessItem:
    """One problem of a task, as it was answered and scored.

    Attributes:
        id: its number in the task's data.
        prompt: what the model read.
        responses: for each request, its responses, as JSON values: texts, or pairs of a log-likelihood and whether the
            continuation is the greedy one. A generated answer is `responses[0][0]`.
        target: the right answer, or its number among the choices.
        scores: by metric; metrics that only exist for all items together are not among them.
        tokens: how many tokens were generated; None for log-likelihoods.
        digest: lm-eval's hash of the problem, by which rescoring knows it again.
    """

    id: str
    prompt: str
    responses: list[Any]
    target: str
    scores: dict[str, float]
    tokens: int | None = None
    digest: str = ""


@dataclass(frozen=True)
class HarnessResult:
    """How a fusion did on a task.

    Attributes:
        metric: the metric that decides: a key of `aggregate`.
        higher_is_better: what is good for that metric.
        aggregate: lm-eval's results, and for each its `..._stderr`, None where it has none.
        notice: what a reader of the scores has to know, such as that code ran in another place than lm-eval's.
    """

    task: str
    metric: str
    higher_is_better: bool
    items: list[HarnessItem]
    aggregate: dict[str, float | None]
    notice: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HarnessResult:
        """What `to_json` gave.

        Raises:
            DataError: if it is something else.
        """
        try:
            return cls(**{**value, "items": [HarnessItem(**item) for item in value["items"]]})
        except (KeyError, TypeError) as error:
            raise DataError(f"This is no stored result of a task: {error}. Give what `to_json` returned.") from error


def evaluate_task(
    model: Fusion,
    task: str,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    allow_code: bool = False,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    metric: str | None = None,
    on_progress: Progress = lambda done, total: None,
) -> HarnessResult:
    """Run one task of lm-eval on a fusion, as it is.

    Args:
        model: the fusion, with a tokenizer.
        task: name of a task: lm-eval's, one of the paper's six (`loraflow_zh_math`, ...), or your own.
        limit: only this many problems, the first ones.
        batch_size: how many are answered together.
        allow_code: the caller's word that a task which runs generated code may do so, in the sandbox.
        include_path: a folder with task files of your own.
        num_fewshot: examples in each prompt; by default the task's own number.
        chat: put each prompt into the fusion's own prompt format, with the token ids that its other runs have.
        metric: the metric that decides; by default the task's first.
        on_progress: called as requests are answered.

    Raises:
        DataError: if the task's data is missing.
        LoraflowError: if the task is unknown, or is several, cannot be loaded, or has no such metric or setting.
        SandboxError: if it runs generated code and may not, or not in the sandbox.
    """
    _check_positive("limit", limit)
    _check_positive("batch_size", batch_size)
    classes = lm_classes()
    # Chat templates can hold examples as turns of their own; a plain template has one place for a question.
    multiturn = chat and model.prompt.chat_template is not None
    with model.evaluating(), _quiet(), _seeded(model):
        lm = classes.FusionLM(model, chat=chat, batch_size=batch_size, on_progress=on_progress)
        options = {"limit": limit, "apply_chat_template": chat, "fewshot_as_multiturn": multiturn}
        result = _run(lm, task, allow_code, include_path, num_fewshot, metric, options)
    if lm.shortened:
        said = f"{lm.shortened} prompts are longer than the model reads, and lost their beginnings, as in lm-eval."
        result = dataclasses.replace(result, notice=" ".join(filter(None, (result.notice, said))))
    items = [dataclasses.replace(item, tokens=lm.tokens.get(int(item.id))) for item in result.items]
    return dataclasses.replace(result, items=items)


def rescore_task(
    stored: HarnessResult, *, allow_code: bool = False, include_path: Path | None = None, metric: str | None = None
) -> HarnessResult:
    """Score stored responses anew, by the task as it is now; needs the task's data, but no model.

    The metric that decides is by default the one that did.

    Raises:
        DataError: if the problems of the task are no longer those that were answered.
        LoraflowError: as `evaluate_task`.
        SandboxError: as `evaluate_task`.
    """
    if not stored.items:
        raise DataError(f"The stored result of the task {stored.task!r} has no items. Give one that has.")
    old = {int(item.id): item for item in stored.items}
    lm = lm_classes().StoredLM([old[number].responses for number in sorted(old)])
    with _quiet():
        options = {"samples": sorted(old)}
        result = _run(lm, stored.task, allow_code, include_path, None, metric or stored.metric, options)
    for item in result.items:
        if item.digest != old[int(item.id)].digest:
            raise DataError(changed_problem(stored.task, item.id))
    items = [
        dataclasses.replace(item, prompt=old[int(item.id)].prompt, tokens=old[int(item.id)].tokens)
        for item in result.items
    ]
    return dataclasses.replace(result, items=items)


def check_task(task: str, *, allow_code: bool = False, include_path: Path | None = None) -> bool:
    """Find out whether there is such a task and whether it may run, without loading its data.

    Returns:
        Whether it says that it runs generated code.

    Raises:
        LoraflowError: if it is unknown, or is several, or lm-eval is not installed.
        SandboxError: if it runs generated code and may not.
    """
    lm_classes()
    _, entry = find_task(task, include_path)
    runs_code = bool(entry.cfg.get("unsafe_code"))
    if runs_code:
        require_permission(task, allow_code)
    return runs_code


def _check_positive(name: str, value: int | None) -> None:
    """Check a number.

    Raises:
        LoraflowError: if it is less than 1.
    """
    if value is not None and value < 1:
        raise LoraflowError(f"`{name}` (={value}) must be at least 1.")


# ------------------------------------------------------------------------------------------------------------ running


def _run(
    lm: Any,
    task: str,
    allow_code: bool,
    include_path: Path | None,
    num_fewshot: int | None,
    metric: str | None,
    options: dict[str, Any],
) -> HarnessResult:
    """Load the task, let lm-eval evaluate it with `lm`, and collect what it found."""
    from lm_eval.evaluator import evaluate

    manager, entry = find_task(task, include_path)
    if entry.cfg.get("unsafe_code"):
        require_permission(task, allow_code)
    notice = None
    with sandboxed_code_eval(task, allow_code=allow_code) as replacement:
        loaded = load_task(manager, task, entry.cfg)
        if replacement.asked or getattr(loaded, "UNSAFE_CODE", False):
            require_permission(task, allow_code)
            check_code_task(task, [vars(loaded.config), type(loaded)], replacement)
            notice = announce(task)
        _set_fewshot(loaded, task, num_fewshot)
        if "samples" in options:
            if options["samples"][-1] >= len(loaded.eval_docs):
                raise DataError(changed_problem(task, options["samples"][-1]))
            options = {**options, "samples": {task: options["samples"]}}
        try:
            found = evaluate(
                lm,
                {"tasks": {task: loaded}},
                bootstrap_iters=_RESAMPLES,
                # Permission was asked for above, and the code runs in the sandbox.
                confirm_run_unsafe_code=True,
                **options,
            )
        except (OSError, ImportError) as error:
            raise LoraflowError(cannot("finish", task, entry.cfg, error)) from error
    return _collect(task, cast(Mapping[str, Any], found), metric, notice)


def _set_fewshot(loaded: Any, task: str, num_fewshot: int | None) -> None:
    """Fix the number of examples in a prompt, and which they are, as `lm_eval.simple_evaluate` does.

    Raises:
        LoraflowError: if the task says that it has none, or the number is negative.
    """
    own = loaded.get_config("num_fewshot")
    if num_fewshot is not None and num_fewshot < 0:
        raise LoraflowError(f"`num_fewshot` (={num_fewshot}) must be at least 0.")
    if num_fewshot and own == 0:
        raise LoraflowError(f"`num_fewshot` (={num_fewshot}) must be 0: the task {task!r} is one without examples.")
    loaded.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
    loaded.set_fewshot_seed(seed=_SEED)


def _collect(task: str, found: Mapping[str, Any], metric: str | None, notice: str | None) -> HarnessResult:
    items: dict[int, HarnessItem] = {}
    names: list[str] = []
    for sample in found["samples"][task]:
        item = HarnessItem(
            id=str(sample["doc_id"]),
            prompt=str(sample["arguments"][0][0]),
            responses=_plain(sample["resps"]),
            target=str(sample["target"]),
            scores={},
            digest=sample["doc_hash"],
        )
        item = items.setdefault(sample["doc_id"], item)
        for name in sample["metrics"]:
            full = _metric_name(name, sample["filter"])
            if full not in names:
                names.append(full)
            with contextlib.suppress(TypeError, ValueError):
                item.scores[full] = float(sample[name])
    chosen = _choose_metric(task, names, metric)
    return HarnessResult(
        task=task,
        metric=chosen,
        higher_is_better=found["higher_is_better"][task].get(chosen.partition(",")[0]) is not False,
        items=list(items.values()),
        aggregate=_aggregate(found["results"][task]),
        notice=notice,
    )


def _aggregate(results: Mapping[str, Any]) -> dict[str, float | None]:
    """lm-eval's results by metric; what is not a number, such as "N/A", becomes None."""
    aggregate: dict[str, float | None] = {}
    for key, value in results.items():
        name, _, filter_name = key.partition(",")
        if filter_name:
            number = isinstance(value, float | int) or hasattr(value, "__float__")
            aggregate[_metric_name(name, filter_name)] = float(value) if number else None
    return aggregate


def _metric_name(metric: str, filter_name: str) -> str:
    # lm-eval calls a task's only filter "none".
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _choose_metric(task: str, names: list[str], metric: str | None) -> str:
    """The metric of that name, or the first.

    Raises:
        LoraflowError: if the task has no such metric, or several.
    """
    fits = names if metric is None else [name for name in names if metric in (name, name.partition(",")[0])]
    if metric in fits:
        return metric
    if not fits or (metric is not None and len(fits) > 1):
        fault = "several metrics" if fits else "no metric"
        raise LoraflowError(f"The task {task!r} has {fault} {metric!r}. Give one of {', '.join(map(repr, names))}.")
    return fits[0]


def _plain(value: Any) -> Any:
    """The same as JSON values."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") else value


# ------------------------------------------------------------------------------------------------------- surroundings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No logs and progress bars of lm-eval's in a `with` block; errors are still raised."""
    import datasets
    import lm_eval.api.task as tasks

    log = logging.getLogger("lm_eval")
    level, bar, bars = log.level, tasks.tqdm, datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    tasks.tqdm = functools.partial(bar, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        tasks.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _seeded(model: Fusion) -> Iterator[None]:
    """The same draws in every run, where a task samples; the caller's own generators go on as they were."""
    state = random.getstate()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        random.seed(_SEED)
        try:
            yield
        finally:
            random.setstate(state)

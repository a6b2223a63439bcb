"""lm-eval's metric `code_eval`, with its contract, but in the sandbox.

The stock metric is downloaded and runs what a model wrote as the user who called it. While lm-eval loads and runs a
task, `sandboxed_code_eval` puts another in its place, wherever the task asks for it by `evaluate.load("code_eval")`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from loraflow.errors import SandboxError
from loraflow.evaluation.sandbox import Limits, check_available, run_many

logger = logging.getLogger(__name__)

METRIC = "code_eval"
TIMEOUT_S = 3.0
"""The stock metric's."""

NOTICE = (
    "The task {task!r} runs code that a model wrote, in loraflow's sandbox. lm-eval's stock `code_eval`, which has no "
    "sandbox, was replaced."
)


class SandboxedCodeEval:
    """What `evaluate.load("code_eval")` gives meanwhile."""

    name = METRIC

    def compute(
        self,
        *,
        predictions: Sequence[Sequence[str]],
        references: Sequence[str],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int | None = None,
        timeout: float = TIMEOUT_S,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Run every candidate against its problem's tests, each in a sandbox of its own.

        Args:
            predictions: the candidates of each problem.
            references: the tests of each problem.
            k: for which k to estimate pass@k; those above a problem's number of candidates are left out.
            num_workers: how many run at the same time; by default one per CPU.
            timeout: seconds that each may take.

        Returns:
            pass@k by name; and each problem's outcomes as pairs of the candidate's number and its record.
        """
        programs = [
            (candidate, [reference])
            for candidates, reference in zip(predictions, references, strict=True)
            for candidate in candidates
        ]
        verdicts = iter(run_many(programs, Limits(wall_s=timeout, cpu_s=timeout), num_workers))
        outcomes: dict[int, list[tuple[int, dict[str, Any]]]] = {number: [] for number in range(len(predictions))}
        for number, candidates in enumerate(predictions):
            for candidate in range(len(candidates)):
                verdict = next(verdicts)
                text = {"passed": "passed", "timeout": "timed out"}.get(verdict.reason, f"failed: {verdict.detail}")
                record = {"task_id": number, "passed": verdict.passed, "result": text, "completion_id": candidate}
                outcomes[number].append((candidate, record))
        counts = [(len(row), sum(record["passed"] for _, record in row)) for row in outcomes.values()]
        return {
            f"pass@{size}": sum(pass_at_k(*count, size) for count in counts) / len(counts)
            for size in k
            if all(total >= size for total, _ in counts)
        }, outcomes


def pass_at_k(total: int, correct: int, k: int) -> float:
    r"""The share of draws of k candidates with a right one among them.

    $$1 - \binom{n - c}{k} / \binom{n}{k}$$

    for n candidates of which c are right: the unbiased estimate of
    [Chen et al. 2021, eq. 1](https://arxiv.org/abs/2107.03374).
    """
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


@dataclass
class Replacement:
    """What happened while the metric was replaced."""

    asked: bool = False


@contextlib.contextmanager
def sandboxed_code_eval(task: str, *, allow_code: bool) -> Iterator[Replacement]:
    """Replace the stock `code_eval` inside a `with` block, and in task modules that are loaded in it.

    lm-eval keeps the modules of its tasks, so those loaded before, which may hold the stock metric, are put aside, and
    those loaded inside are forgotten at the end.

    Yields:
        Whether the metric was asked for.
    """
    import evaluate

    replacement = Replacement()
    places: list[Any] = [module for module in (evaluate, sys.modules.get("evaluate.loading")) if module is not None]
    stock = [module.load for module in places]

    @functools.wraps(stock[0])
    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        if Path(str(path)).stem != METRIC:
            return stock[0](path, *args, **kwargs)
        replacement.asked = True
        require_permission(task, allow_code)
        return SandboxedCodeEval()

    kept = _task_modules()
    for name in kept:
        del sys.modules[name]
    try:
        for module in places:
            module.load = load
        yield replacement
    finally:
        for module, original in zip(places, stock, strict=True):
            module.load = original
        for name in _task_modules():
            del sys.modules[name]
        sys.modules.update(kept)


def _task_modules() -> dict[str, ModuleType]:
    """The modules that lm-eval loaded from the files of tasks: it marks them."""
    return {name: module for name, module in sys.modules.items() if "__mtime__" in getattr(module, "__dict__", ())}


def require_permission(task: str, allow_code: bool) -> None:
    """Refuse a task that runs code unless the caller has opted in, and the sandbox works.

    Raises:
        SandboxError: if they have not.
    """
    if not allow_code:
        raise SandboxError(
            f"The task {task!r} runs programs that a model wrote. If you want that on this machine, in a sandbox, say "
            "so: `allow_code=True`."
        )
    _check_available()


# Once a process: it starts an interpreter.
_check_available = functools.cache(check_available)


@functools.cache
def announce(task: str) -> str:
    """Say once a process that the task's code runs in the sandbox; return what was said."""
    notice = NOTICE.format(task=task)
    logger.warning(notice)
    return notice

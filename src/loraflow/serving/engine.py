"""Many requests at once, each with a fusion of its own, in transformers' continuous batching.

Requests join and leave the running batch as they come. A step lays the tokens of all requests one behind the other in
one row; each of them is weighed by its own request's fusion (`core.lanes.Lanes`), and sampled by its own settings.

Requests that begin with the same tokens share pages of the cache only where their weights are the same
(`serving.prefixes`): under others, the same tokens have other keys and values.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Collection

import torch

from loraflow.core.fusion import Fusion
from loraflow.errors import ArchitectureError, LoraflowError
from loraflow.serving.batching import Manager
from loraflow.serving.config import EngineLimits
from loraflow.serving.jobs import Failure, Job, Sampling, Token, Weigher


class Engine:
    """Answers requests until it is closed; other calls of the model wait for their turn between its steps.

    Raises:
        ArchitectureError: if the base cannot be batched so.
        LoraflowError: if the base's attention cannot be shared with other calls.
    """

    def __init__(self, model: Fusion, limits: EngineLimits | None = None) -> None:
        self.model = model
        self.limits = limits or EngineLimits()
        attention = model.base_model.config._attn_implementation
        if attention == "eager":
            raise LoraflowError(
                "Continuous batching changes eager attention for everybody. Load the base with "
                '`BaseOptions(model_kwargs={"attn_implementation": "sdpa"})`, or a flash implementation.'
            )
        self._check_rows()
        model.eval()
        self._closed = False
        self._jobs: dict[str, Job] = {}
        self._manager = Manager(model, self.limits, self._jobs)
        self._manager.start()
        self._try()

    def _try(self) -> None:
        """Answer one token, so that a base which cannot be batched so is refused before anybody asks.

        Raises:
            ArchitectureError: if it cannot.
        """
        heard: queue.SimpleQueue[Token | Failure] = queue.SimpleQueue()
        trial = Job("trial", [0, 0], Weigher(), Sampling(), 1, (), wants_weights=False, listener=heard.put)
        self.submit(trial)
        found = heard.get()
        if isinstance(found, Failure) and not found.asked_for:
            self.close(finish=False)
            raise ArchitectureError(
                f"{type(self.model.base_model).__name__} cannot be answered in transformers' continuous batching: "
                f"{found.message}. Call `generate`, which takes several prompts at once."
            )

    def _check_rows(self) -> None:
        """Check that every linear reads the tokens of a step.

        Raises:
            LoraflowError: if one reads cached positions too.
        """
        if self.model.attachment.keeps:
            raise LoraflowError(
                f"Linears of {type(self.model.base_model).__name__} read all cached positions, whose weights "
                "continuous batching has no place for. Leave the adapters of those out, or call `generate`."
            )

    def submit(self, job: Job) -> None:
        """Take a request in; its listener hears of what follows.

        Raises:
            LoraflowError: if it can never be answered, or the engine has ended.
        """
        longest = len(job.prompt) + job.max_new_tokens
        if not job.prompt:
            raise LoraflowError("The prompt has no tokens. Give at least one.")
        self._check_rows()
        if longest > self.limits.cache_tokens:
            raise LoraflowError(
                f"The prompt ({len(job.prompt)} tokens) and its answer (up to {job.max_new_tokens}) do not fit the "
                f"cache ({self.limits.cache_tokens} tokens). Give a shorter one, or a larger `cache_tokens`."
            )
        if not job.sampling.greedy:
            job.generator = torch.Generator(device=self.model.device)
            if job.sampling.seed is None:
                job.generator.seed()
            else:
                job.generator.manual_seed(job.sampling.seed)
        self._jobs[job.id] = job
        if self._closed or not self._manager.submit(job):
            self._jobs.pop(job.id, None)
            raise LoraflowError(f"The engine has ended: {self.failure or 'it was closed'}.")

    def cancel(self, request_id: str) -> None:
        """Forget a request; its listener hears nothing more."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self._manager.give_up(job)

    @property
    def running(self) -> int:
        """How many requests are in the engine."""
        return len(self._jobs)

    @property
    def batched(self) -> int:
        """How many of them were in its last step."""
        return min(self._manager.batched, sum(job.begun is not None for job in list(self._jobs.values())))

    @property
    def cache_usage(self) -> float:
        """The used part of the cache; 1 is all of it."""
        return self._manager.cache_usage

    def adapters_in_use(self) -> tuple[list[str], list[str]]:
        """Names of the adapters of requests that have begun, and of those that wait."""
        found: tuple[set[str], set[str]] = (set(), set())
        for job in list(self._jobs.values()):
            names = job.weigher.adapters
            found[job.begun is None].update(self.model.adapter_names if names is None else names)
        return sorted(found[0]), sorted(found[1])

    def uses(self, adapters: Collection[str]) -> bool:
        """Whether a request that is not answered yet needs one of these adapters."""
        jobs = list(self._jobs.values())
        return any(job.weigher.adapters is None or not set(adapters).isdisjoint(job.weigher.adapters) for job in jobs)

    @property
    def failure(self) -> str | None:
        """Why the engine has ended by itself; None while it runs."""
        error = self._manager.background_thread_status.fatal_error
        return None if error is None else f"{type(error).__name__}: {error}"

    def close(self, *, finish: bool = True, timeout_s: float | None = None) -> None:
        """End the engine; requests that are not answered then fail.

        Args:
            finish: answer what is in it first.
            timeout_s: how long to wait for that at most.
        """
        self._closed = True
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while finish and self._jobs and self._manager.is_running() and time.monotonic() < until:
            time.sleep(0.01)
        if self._manager.is_running():
            # The manager's own flushing cannot be given up: it ends the running step with an error.
            self._manager.stop(block=True, hard_stop=True)
        self._manager.destroy()

"""Many requests at once, each with a fusion of its own, in transformers' continuous batching.

Requests join and leave the running batch as they come. A step lays the tokens of all requests one behind the other in
one row; each of them is weighed by its own request's fusion (`layers.Lanes`), and sampled by its own settings.

Blocks of the cache are never shared between requests: two requests with the same tokens may have different weights, and
so different keys and values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from loraflow.core.lanes import Gates, Lane, Lanes
from loraflow.errors import LoraflowError
from loraflow.methods import Method
from loraflow.serving.config import EngineLimits
from loraflow.serving.overflow import finite

if TYPE_CHECKING:
    from loraflow.model import FusedModel

FinishReason = Literal["stop", "length"]

# Below, draws are as good as always the likeliest, and dividing by it may overflow.
_COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with this probability.
        seed: of the draws; None draws anew every time.
        logprobs: how many of the likeliest tokens are told at each position, with the chosen one; None tells nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < _COLDEST


@dataclass(frozen=True)
class Weigher:
    """Who weighs a request's tokens: a method with its gates, or weights that are given.

    Attributes:
        method: the method; None where weights are given.
        gates: its gates, by site.
        weights: the weights of every layer.
        adapters: names of the adapters that these are for, in order; None for all in the model. Others may come into
            the model and leave it while a request runs.
    """

    method: Method | None = None
    gates: Gates = field(default_factory=dict)
    weights: Float[Tensor, "layers adapters"] | None = None
    adapters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Token:
    """One generated token, as soon as it is there.

    Attributes:
        id: the token.
        logprob: its log-probability under the model, before temperature; None where it was not asked for.
        top: the likeliest tokens with theirs.
        weights: the fusion weights that produced it, those of the position before, by layer, for the adapters of its
            `Weigher`; None where they were not asked for.
        finish: why it is the last; None where it is not.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    weights: Float[Tensor, "layers adapters"] | None = None
    finish: FinishReason | None = None


@dataclass(frozen=True)
class Failure:
    """The end of a request that could not be answered.

    Attributes:
        message: why.
        asked_for: whether the request itself is the cause, and others go on.
    """

    message: str
    asked_for: bool = False


Listener = Callable[[Token | Failure], None]
"""Hears of every token, in the engine's own thread: it must return at once, and raise nothing."""


@dataclass
class Job:
    """A request on its way through the engine.

    Attributes:
        id: its name.
        prompt: its token ids.
        weigher: who weighs it.
        sampling: how its tokens are chosen.
        max_new_tokens: the longest answer.
        ends: token ids that end an answer.
        wants_weights: whether tokens come with their fusion weights.
        listener: who hears of its tokens.
        told: how many tokens it has heard of.
        sampled: its new token with all that is known of it, until the listener hears of it.
    """

    id: str
    prompt: Sequence[int]
    weigher: Weigher
    sampling: Sampling
    max_new_tokens: int
    ends: Sequence[int]
    wants_weights: bool
    listener: Listener
    generator: torch.Generator | None = None
    told: int = 0
    sampled: Token | None = None


class Engine:
    """Answers requests until it is closed.

    Attributes:
        model: the fused model; while the engine runs, other calls of it wait for their turn between its steps.
        limits: how large it may become.

    Raises:
        LoraflowError: if the base's attention cannot be shared with other calls.
    """

    model: FusedModel
    limits: EngineLimits

    def __init__(self, model: FusedModel, limits: EngineLimits | None = None) -> None:
        self.model = model
        self.limits = limits or EngineLimits()
        attention = model.base_model.config._attn_implementation
        if attention == "eager":
            raise LoraflowError(
                "Continuous batching changes eager attention for everybody. Load the base with "
                '`BaseOptions(model_kwargs={"attn_implementation": "sdpa"})`, or a flash implementation.'
            )
        model.eval()
        self._closed = False
        self._jobs: dict[str, Job] = {}
        self._manager = _Manager(model, self.limits, self._jobs)
        self._manager.start()

    def submit(self, job: Job) -> None:
        """Take a request in; its listener hears of what follows.

        Raises:
            LoraflowError: if it can never be answered, or the engine has ended.
        """
        longest = len(job.prompt) + job.max_new_tokens
        if not job.prompt:
            raise LoraflowError("The prompt has no tokens. Give at least one.")
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
        added = None
        if not self._closed:
            added = self._manager.add_request(
                list(job.prompt),
                request_id=job.id,
                max_new_tokens=job.max_new_tokens,
                streaming=True,
                eos_token_id=list(job.ends) or -1,
            )
        if added is None:
            self._jobs.pop(job.id, None)
            raise LoraflowError(f"The engine has ended: {self.failure or 'it was closed'}.")

    def cancel(self, request_id: str) -> None:
        """Forget a request; its listener hears nothing more."""
        if self._jobs.pop(request_id, None) is not None:
            self._manager.cancel_request(request_id)

    @property
    def running(self) -> int:
        """How many requests are in the engine."""
        return len(self._jobs)

    @property
    def batched(self) -> int:
        """How many of them were in its last step."""
        return min(self._manager.batched, len(self._jobs))

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


class _Router(OutputRouter):
    """Takes what the manager says of requests, and tells their listeners."""

    def __init__(self, jobs: dict[str, Job]) -> None:
        super().__init__()
        self._jobs = jobs

    def deliver(self, output: GenerationOutput) -> None:
        job = self._jobs.get(output.request_id)
        if job is None:
            return
        ended = output.status == RequestStatus.FINISHED
        new = output.generated_tokens[job.told :]
        for position, token in enumerate(new, start=1):
            known, job.sampled = job.sampled or Token(token), None
            finish: FinishReason | None = None
            if ended and position == len(new):
                finish = "stop" if token in job.ends else "length"
            job.told += 1
            job.listener(dataclasses.replace(known, id=token, finish=finish))
        if output.status == RequestStatus.FAILED:
            job.listener(Failure(str(output.error)))
        if ended or output.status == RequestStatus.FAILED:
            self._jobs.pop(output.request_id, None)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        state.status, state.error = RequestStatus.FAILED, str(error)
        self.deliver(state.to_generation_output())


class _Manager(ContinuousBatchingManager):
    """transformers' manager, whose steps are weighed and sampled request by request."""

    def __init__(self, model: FusedModel, limits: EngineLimits, jobs: dict[str, Job]) -> None:
        self._fused = model
        self._jobs = jobs
        self.batched = 0
        config = ContinuousBatchingConfig(
            page_size=limits.page_tokens,
            num_blocks=-(-limits.cache_tokens // limits.page_tokens),
            max_batch_tokens=limits.batch_tokens,
            max_requests_per_batch=limits.requests,
            # Shared blocks are found by their tokens, and know nothing of weights.
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        plain = GenerationConfig(do_sample=False, eos_token_id=-1)
        super().__init__(cast(Any, model.base_model), plain, config)
        self.output_router = _Router(jobs)

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        processor.model_runner = _Runner(
            logit_processor=self.logit_processor,
            cb_config=self.continuous_batching_config,
            cache=processor.cache,
            inputs_and_outputs=processor.inputs_and_outputs,
            do_sample=False,
            return_logprobs=False,
        )
        processor.model_runner.fail = self._fail
        processor.cache.update = _with_finite_states(processor.cache.update)
        return processor

    def _fail(self, job: Job, message: str) -> None:
        """Give up one request; the others go on."""
        if self._jobs.pop(job.id, None) is not None:
            self.cancel_request(job.id)
            job.listener(Failure(message, asked_for=True))

    def _fail_all_remaining_requests(self, error: Exception, batch_processor: Any) -> None:
        # Called at every end: that of a failing step, and that which was asked for.
        if self.background_thread_status.tp_status == BackgroundThreadStatus.HARD_STOP:
            error = LoraflowError("The engine was closed before this answer was finished.")
        super()._fail_all_remaining_requests(error, batch_processor)

    def _generation_step(self) -> None:
        assert self.batch_processor is not None
        shared, model = cast(Any, self.batch_processor.inputs_and_outputs), self._fused
        with contextlib.ExitStack() as stack:
            # First of all: what the step does with the adapters must be done before others come in or leave.
            stack.enter_context(model.attachment.turn())
            # Once a step: requests may be cancelled in the middle of it.
            batch = [(self._jobs.get(future.state.request_id), future) for future in shared.requests_in_batch]
            cast(_Runner, self.batch_processor.model_runner).batch = batch
            self.batched = len(batch)
            with torch.cuda.stream(shared.compute_stream):
                lanes = _lanes(model, batch)
            stack.enter_context(model.attachment.weighing(lanes))
            if not any(job is not None and job.wants_weights for job, _ in batch):
                super()._generation_step()
                return
            recorded = stack.enter_context(model.attachment.recording())
            super()._generation_step()
            self._keep_weights(batch, recorded)

    def _keep_weights(self, batch: Sequence[tuple[Job | None, Any]], recorded: Sequence[dict[str, Tensor]]) -> None:
        """Put the weights at the last position of each request beside its new token."""
        adapters = len(self._fused.adapters)
        seen = [{name: w.reshape(-1, adapters).cpu() for name, w in found.items()} for found in recorded]
        start = 0
        for job, future in batch:
            start += future.query_length
            if job is None or not job.wants_weights or job.sampled is None or not future.has_new_token:
                continue
            gates = job.weigher.gates
            weights = torch.zeros(len(seen), adapters)
            for layer, found in enumerate(seen):
                # Beside requests whose linears have gates of their own, those of whole layers are noted for each too.
                names = [name for name in found if name and f"layers.{layer}.{name}" in gates] or [""]
                noted = [found[name][start - 1] for name in names if name in found]
                if noted:
                    weights[layer] = torch.stack(noted).mean(dim=0)
            among = _among(self._fused, job.weigher)
            weights = weights if among is None else weights[:, among]
            job.sampled = dataclasses.replace(job.sampled, weights=weights)


def _lanes(model: FusedModel, batch: Sequence[tuple[Job | None, Any]]) -> Lanes:
    """Who weighs which tokens of a step; requests of the base, and those cancelled meanwhile, have no weights."""
    attachment = model.attachment
    positions: dict[int, list[int]] = {}
    weighers: dict[int, Weigher] = {}
    given: list[tuple[range, Tensor]] = []
    unweighed: list[int] = []
    start = 0
    for job, future in batch:
        mine, start = range(start, start + future.query_length), start + future.query_length
        if job is not None and job.weigher.weights is not None:
            given.append((mine, _weights_of_all(model, job.weigher)))
        elif job is not None and job.weigher.gates:
            key = id(job.weigher.gates)
            weighers[key] = job.weigher
            positions.setdefault(key, []).extend(mine)
        else:
            unweighed.extend(mine)
    lanes: list[Lane] = [Lane(tuple(unweighed), "layer", {})] if unweighed else []
    for key, weigher in weighers.items():
        assert weigher.method is not None
        lanes.append(attachment.lane(positions[key], weigher.method, weigher.gates, _among(model, weigher)))
    if given:
        rows = [position for mine, _ in given for position in mine]
        weights = torch.cat([weights.expand(len(mine), -1, -1) for mine, weights in given])
        lanes.append(attachment.given_lane(rows, weights))
    return Lanes(start, tuple(lanes), flat=True)


def _among(model: FusedModel, weigher: Weigher) -> list[int] | None:
    """Where a weigher's adapters are in the model now; None where it weighs all."""
    return None if weigher.adapters is None else model.attachment.positions(weigher.adapters)


def _weights_of_all(model: FusedModel, weigher: Weigher) -> Float[Tensor, "layers adapters"]:
    weights, among = weigher.weights, _among(model, weigher)
    assert weights is not None
    if among is None:
        return weights
    everywhere = weights.new_zeros(weights.shape[0], len(model.adapters))
    everywhere[:, among] = weights
    return everywhere


def _with_finite_states(update: Callable[..., Any]) -> Callable[..., Any]:
    """A cache's `update` that stores finite numbers only."""

    def finite_update(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(finite(key_states), finite(value_states), *args, **kwargs)

    return finite_update


class _Runner(ModelRunner):
    """transformers' runner, which samples each request by its own settings."""

    batch: Sequence[tuple[Job | None, Any]]
    fail: Callable[[Job, str], None]

    def _sample(self, scores: Float[Tensor, "1 requests vocabulary"], output_ids: Tensor) -> None:
        waiting = [job for job, future in self.batch if future.has_new_token]
        logits = scores[0, : len(waiting)]
        chosen = logits.argmax(dim=-1)
        usable = logits.amax(dim=-1).isfinite().tolist()
        for row, job in enumerate(waiting):
            if job is None:
                continue
            if not usable[row]:
                self.fail(job, "The model's logits are no finite numbers. Ask for smaller weights.")
                continue
            if not job.sampling.greedy:
                chosen[row] = sample(logits[row], job.sampling, job.generator)
            job.sampled = _token(logits[row], int(chosen[row]), job.sampling.logprobs)
        output_ids[0, : len(waiting)].copy_(chosen)


def sample(
    logits: Float[Tensor, " vocabulary"], sampling: Sampling, generator: torch.Generator | None
) -> Int[Tensor, ""]:
    """Draw one token: temperature first, then the smallest set of tokens with the probability `top_p`."""
    # The likeliest is at 0 and the rest below, in float64: no temperature is too low for that.
    probabilities = ((logits - logits.max()).double() / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        # The token that crosses the border stays.
        ordered[ordered.cumsum(dim=-1) - ordered >= sampling.top_p] = 0
        return tokens[torch.multinomial(ordered, 1, generator=generator)[0]]
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def _token(logits: Float[Tensor, " vocabulary"], token: int, count: int | None) -> Token:
    if count is None:
        return Token(token)
    logs = logits.log_softmax(dim=-1)
    found = logs.topk(min(count, len(logs))) if count else None
    top = () if found is None else tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))
    return Token(token, float(logs[token]), top)


@contextlib.contextmanager
def running(model: FusedModel, limits: EngineLimits | None = None) -> Iterator[Engine]:
    """An engine inside a `with` block; what is in it at the end is answered first."""
    engine = Engine(model, limits)
    try:
        yield engine
    finally:
        engine.close()


def answer(engine: Engine, job: Job, timeout_s: float | None = None) -> list[Token]:
    """Submit one request and wait for all of its tokens; the job's own listener hears of them too.

    Raises:
        LoraflowError: if it fails, or takes longer.
    """
    heard: list[Token | Failure] = []
    ended = threading.Event()
    listener = job.listener

    def listen(event: Token | Failure) -> None:
        heard.append(event)
        listener(event)
        if isinstance(event, Failure) or event.finish is not None:
            ended.set()

    job.listener = listen
    engine.submit(job)
    if not ended.wait(timeout_s):
        engine.cancel(job.id)
        raise LoraflowError(f"The request {job.id!r} took longer than {timeout_s} s.")
    if isinstance(heard[-1], Failure):
        raise LoraflowError(heard[-1].message)
    return [token for token in heard if isinstance(token, Token)]

"""transformers' continuous batching, whose steps are weighed, sampled and stored request by request."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

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

from loraflow.core.attach import Attachment
from loraflow.core.fusion import Fusion
from loraflow.core.lanes import Lane, Lanes, spread
from loraflow.errors import LoraflowError
from loraflow.methods.base import Mixing
from loraflow.serving.attention import attending_apart
from loraflow.serving.config import EngineLimits
from loraflow.serving.jobs import Failure, FinishReason, Job, Sampling, Token, Weigher
from loraflow.serving.likelihoods import PromptPosition, prompt_positions, read_prompts, token_of
from loraflow.serving.prefixes import Prefixes
from loraflow.serving.waiting import Waiting

_NOT_FINITE = "The model's logits are no finite numbers. Ask for smaller weights."


class _Router(OutputRouter):
    """Takes what the manager says of requests, and tells their listeners."""

    def __init__(self, jobs: dict[str, Job], cancel: Callable[[str], Any]) -> None:
        super().__init__()
        self._jobs = jobs
        self._cancel = cancel

    def deliver(self, output: GenerationOutput) -> None:
        job = self._jobs.get(output.request_id)
        if job is None:
            return
        ended = output.status == RequestStatus.FINISHED
        new = output.generated_tokens[job.told :]
        for position, token in enumerate(new, start=1):
            known, job.sampled = job.sampled or Token(token), None
            finish: FinishReason | None = known.finish
            if finish is None and ended and position == len(new):
                finish = "stop" if token in job.ends else "length"
            job.told += 1
            job.listener(dataclasses.replace(known, id=token, finish=finish))
            if finish is not None and not ended:
                # Its form is whole, and has no token to end with.
                self._cancel(output.request_id)
                ended = True
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


class Manager(ContinuousBatchingManager):
    """transformers' manager, whose steps are weighed and sampled request by request."""

    def __init__(self, model: Fusion, limits: EngineLimits, jobs: dict[str, Job]) -> None:
        self._fused = model
        self._jobs = jobs
        self._waiting = Waiting()
        self._inside: list[Job] = []
        self._limits = limits
        self.batched = 0
        config = ContinuousBatchingConfig(
            page_size=limits.page_tokens,
            num_blocks=-(-limits.cache_tokens // limits.page_tokens),
            max_batch_tokens=limits.batch_tokens,
            max_requests_per_batch=limits.requests,
            # By `Prefixes`: transformers' own shared blocks are found by their tokens, and know nothing of weights.
            allow_block_sharing=limits.prefix_caching,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        plain = GenerationConfig(do_sample=False, eos_token_id=-1)
        self._text_config = model.base_model.config.get_text_config(decoder=True)
        self._last: tuple[weakref.ref[Attachment], list[tuple[Job | None, int]], Lanes] | None = None
        super().__init__(cast(Any, model.base_model), plain, config)
        self.output_router = _Router(jobs, self.cancel_request)

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
        if processor.cache.use_prefix_sharing:
            Prefixes(processor.cache, processor.scheduler.safety_margin, self._jobs)
        _resume_after_cancelling(processor.scheduler)
        # Flash kernels know where each request's keys are; without a mask, SDPA is told so in each step.
        cast(Any, processor.inputs_and_outputs).attention_mask = None
        cache: Any = processor.cache
        if not hasattr(cache, "get_seq_length"):
            # OPT asks before it looks whether it needs the answer: every token comes with its position. Since
            # transformers 5.24 the paged cache is what models take for theirs.
            cache.get_seq_length = lambda *_: 0
        return processor

    def submit(self, job: Job) -> bool:
        """Let a job wait for its place; False where nothing is answered any more."""
        self._waiting.put(job)
        # Only now: what comes in after the engine's last look would wait for ever.
        if self.background_thread_status.can_accept_new_requests() is not None:
            self._waiting.remove(job)
            return False
        self._wake_up_loop.set()
        return True

    def give_up(self, job: Job) -> None:
        """Answer a job no further."""
        self._waiting.remove(job)
        self.cancel_request(job.id)

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        self._let_in()
        return super()._generation_loop_body(batch_processor, bootstrapping)

    def _let_in(self) -> None:
        """Let jobs in that have room in the next steps, so that those who come later may still be before the others."""
        self._inside = [job for job in self._inside if job.id in self._jobs]
        unread = sum(len(job.prompt) for job in self._inside if job.begun is None)
        while len(self._inside) < self._limits.requests and unread < self._limits.batch_tokens:
            job = self._waiting.take(self._inside)
            if job is None:
                return
            if job.id not in self._jobs:
                continue
            added = self.add_request(
                list(job.prompt),
                request_id=job.id,
                max_new_tokens=job.max_new_tokens,
                streaming=True,
                eos_token_id=list(job.ends) or -1,
            )
            if added is None:
                # The engine ends: it fails with all that waits.
                self._waiting.put(job)
                return
            self._inside.append(job)
            unread += len(job.prompt)

    @property
    def cache_usage(self) -> float:
        """The used part of the cache; 1 is all of it. Pages that wait to be shared are free for whoever needs them."""
        if self.batch_processor is None:
            return 0.0
        cache = self.batch_processor.cache
        waiting = sum(
            len(pages.ledger.cached_blocks) * pages.bytes_per_block for pages in cache.cache_allocators.values()
        )
        return 1 - cache.compute_free_capacity() - waiting / (cache.num_sectors * cache.bytes_per_sector)

    def _fail(self, job: Job, message: str) -> None:
        """Give up one request; the others go on."""
        if self._jobs.pop(job.id, None) is not None:
            self.give_up(job)
            job.listener(Failure(message, asked_for=True))

    def _fail_all_remaining_requests(self, error: Exception, batch_processor: Any) -> None:
        # Called at every end: that of a failing step, and that which was asked for.
        if self.background_thread_status.tp_status == BackgroundThreadStatus.HARD_STOP:
            error = LoraflowError("The engine was closed before this answer was finished.")
        while (job := self._waiting.take(())) is not None:
            if self._jobs.pop(job.id, None) is not None:
                job.listener(Failure(str(error)))
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
            _note_begin(batch)
            with torch.cuda.stream(shared.compute_stream):
                lanes = self._lanes_of(batch)
                if self._text_config._attn_implementation == "sdpa":
                    cache = self.batch_processor.cache
                    stack.enter_context(attending_apart(self._text_config, cache, shared.requests_in_batch))
            stack.enter_context(model.attachment.weighing(lanes))
            if not any(job is not None and job.wants_weights for job, _ in batch):
                super()._generation_step()
                return
            recorded = stack.enter_context(model.attachment.recording())
            super()._generation_step()
            self._keep_weights(batch, recorded)

    def _lanes_of(self, batch: Sequence[tuple[Job | None, Any]]) -> Lanes:
        """Who weighs which tokens of a step; mostly the same as in the last one."""
        attachment, asked = self._fused.attachment, [(job, future.query_length) for job, future in batch]
        if self._last is not None and self._last[0]() is attachment and _are_same(self._last[1], asked):
            return self._last[2]
        lanes = _lanes(self._fused, batch)
        # Adapters that were taken out meanwhile leave memory.
        self._last = weakref.ref(attachment), asked, lanes
        return lanes

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


def _resume_after_cancelling(scheduler: Any) -> None:
    """Let waiting requests in where one was cancelled too.

    A request that was put aside because the cache was full keeps all others out until one is finished; transformers
    takes none that was cancelled for one, and here those that end early are.
    """
    own = scheduler.clear_cancelled_requests

    def clear() -> Any:
        cancelled = own()
        if cancelled:
            scheduler.block_new_requests = False
        return cancelled

    scheduler.clear_cancelled_requests = clear


def _are_same(one: Sequence[tuple[Job | None, int]], other: Sequence[tuple[Job | None, int]]) -> bool:
    """Whether these are the same requests with as many tokens each."""
    if len(one) != len(other):
        return False
    return all(a is b and m == n for (a, m), (b, n) in zip(one, other, strict=True))


def _note_begin(batch: Sequence[tuple[Job | None, Any]]) -> None:
    """Note when requests are in a step for the first time."""
    for job, _ in batch:
        if job is not None and job.begun is None:
            job.begun = time.monotonic()


def _lanes(model: Fusion, batch: Sequence[tuple[Job | None, Any]]) -> Lanes:
    """Who weighs which tokens of a step; requests of the base, and those cancelled meanwhile, have no weights."""
    attachment = model.attachment
    positions: dict[int, list[int]] = {}
    weighers: dict[int, Weigher] = {}
    given: dict[Mixing, list[tuple[range, Tensor]]] = {}
    unweighed: list[int] = []
    start = 0
    for job, future in batch:
        mine, start = range(start, start + future.query_length), start + future.query_length
        if job is not None and job.weigher.weights is not None:
            given.setdefault(job.weigher.mixing, []).append((mine, _weights_of_all(model, job.weigher)))
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
    for mixing, of_jobs in given.items():
        rows = [position for mine, _ in of_jobs for position in mine]
        weights = torch.cat([weights.expand(len(mine), -1, -1) for mine, weights in of_jobs])
        lanes.append(attachment.given_lane(rows, weights, mixing))
    return Lanes(start, tuple(lanes), flat=True)


def _among(model: Fusion, weigher: Weigher) -> list[int] | None:
    """Where a weigher's adapters are in the model now; None where it weighs all."""
    return None if weigher.adapters is None else model.attachment.positions(weigher.adapters)


def _weights_of_all(model: Fusion, weigher: Weigher) -> Float[Tensor, "layers adapters"]:
    assert weigher.weights is not None
    return spread(weigher.weights, _among(model, weigher), len(model.adapters))


class _Runner(ModelRunner):
    """transformers' runner, which samples each request by its own settings."""

    batch: Sequence[tuple[Job | None, Any]]
    fail: Callable[[Job, str], None]
    _told: Sequence[PromptPosition] = ()

    def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
        """Run a step, whose logits are those of the last positions, and behind them those that prompts are told by."""
        self._told = prompt_positions(self.batch)
        if self._told:
            last: Tensor = batch_data["logits_indices"]
            batch_data["logits_indices"] = torch.cat([last, last.new_tensor([one.row for one in self._told])])
        super().compute_batch(model, batch_data)

    def _sample(self, scores: Float[Tensor, "1 requests vocabulary"], output_ids: Tensor) -> None:
        waiting = [job for job, future in self.batch if future.has_new_token]
        logits = scores[0, : len(waiting)]
        for failed in read_prompts(self._told, scores[0, scores.shape[1] - len(self._told) :]):
            self.fail(failed, _NOT_FINITE)
        # NaN counts as the largest.
        largest, chosen = logits.max(dim=-1)
        usable = largest.isfinite().tolist()
        for row, job in enumerate(waiting):
            if job is None:
                continue
            if not usable[row]:
                self.fail(job, _NOT_FINITE)
                continue
            options = logits[row]
            if job.constraint is not None:
                try:
                    options = job.constraint.limit(options, job.ends)
                except LoraflowError as error:
                    self.fail(job, str(error))
                    continue
                chosen[row] = options.argmax()
            if not job.sampling.greedy:
                chosen[row] = sample(options, job.sampling, job.generator)
            token = int(chosen[row])
            job.sampled = token_of(logits[row], token, job.sampling.logprobs)
            try:
                if job.constraint is not None and token not in job.ends and job.constraint.accept(token):
                    job.sampled = dataclasses.replace(job.sampled, finish="stop")
            except LoraflowError as error:
                self.fail(job, str(error))
                continue
            if job.tells_prompt and not job.told:
                prompt = (Token(job.prompt[0]), *(token for _, token in sorted(job.read.items())))
                job.sampled = dataclasses.replace(job.sampled, prompt=prompt)
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

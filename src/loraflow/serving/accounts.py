"""What is kept of each prompt that the engine takes: counts, a line of the log, and spans of its stages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from loraflow.serving.jobs import Job, Token
from loraflow.serving.logs import log_facts
from loraflow.serving.metrics import Metrics
from loraflow.serving.picking import Picks
from loraflow.serving.record import CURRENT, Record
from loraflow.serving.served import Served
from loraflow.serving.tracing import Tracing

log = logging.getLogger("loraflow.serving")


@dataclass
class Stages:
    """How far a prompt came, and when, in seconds of a monotonic clock; None where it did not come so far.

    Attributes:
        read: when its request was read.
        weighed: when it was known who weighs it, and the engine took it.
        first: when its first token came.
        last: when the newest token of each of its answers came.
        finishes: why its answers ended, those that did.
        record: the request over HTTP that it came with.
    """

    read: float | None = None
    weighed: float | None = None
    first: float | None = None
    last: dict[int, float] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    record: Record | None = field(default_factory=CURRENT.get)


class Prompt(Protocol):
    """What an account is kept of: the service's `Asked`."""

    id: str
    served: Served
    prompt: list[int]
    jobs: list[Job]
    started: float
    stages: Stages
    generated: int
    tells_weights: bool

    @property
    def outcome(self) -> str:
        """How it ended."""

    def picks(self) -> Picks | None:
        """What `auto` picked for it; None for other models."""


def _first_token_s(asked: Prompt) -> float | None:
    """Seconds from when its request came till a prompt's first token."""
    return None if asked.stages.first is None else asked.stages.first - asked.started


class Accounts:
    """Keeps account of one server's prompts.

    Args:
        metrics: where they are counted.
        tracing: where their spans go; None for nowhere.
        offered: gives the names of models and adapters that are offered: only these are counted by name, so that what
            was unloaded does not come back with its last answers.
        text_of: gives the text of prompts for the log; None where it is not to be in there.
    """

    def __init__(
        self,
        metrics: Metrics,
        tracing: Tracing | None,
        offered: Callable[[], Collection[str]],
        text_of: Callable[[list[int]], Any] | None,
    ) -> None:
        self._metrics = metrics
        self._tracing = tracing
        self._offered = offered
        self._text_of = text_of

    def open(self, served: Served) -> Stages:
        """Begin a prompt's account, once its request is read."""
        stages = Stages(time.monotonic())
        if stages.record is not None:
            stages.record.model = served.id
        return stages

    def add_token(self, asked: Prompt, index: int, token: Token) -> None:
        """Count a token of one of a prompt's answers."""
        now, stages, metrics = time.monotonic(), asked.stages, self._metrics
        asked.generated += 1
        metrics.generated.inc()
        if stages.first is None:
            stages.first = now
            metrics.observe("time_to_first_token_seconds", now - asked.started)
        elif index in stages.last:
            metrics.observe("inter_token_latency_seconds", now - stages.last[index])
        stages.last[index] = now
        if token.weights is not None and asked.tells_weights:
            offered = self._offered()
            at = [index for index, name in enumerate(asked.served.adapters) if name in offered]
            metrics.add_weights([asked.served.adapters[index] for index in at], token.weights[:, at])

    def close(self, asked: Prompt) -> None:
        """Count a prompt that has ended, and tell of it."""
        ended = time.monotonic()
        spent = {name: end - start for name, start, end in _stages(asked, ended)}
        self._count(asked, ended - asked.started, spent)
        record = asked.stages.record
        if record is not None:
            record.prompt_tokens += len(asked.prompt)
            record.generated_tokens += asked.generated
            if self._tracing is not None and record.span is not None:
                _trace(self._tracing, record, asked, ended)
        first_s = _first_token_s(asked)
        facts: dict[str, Any] = {
            "request": asked.id,
            "model": asked.served.id,
            "method": asked.served.method.name,
            "prompt_tokens": len(asked.prompt),
            "generated_tokens": asked.generated,
            "answers": len(asked.jobs),
            "seconds": round(ended - asked.started, 4),
            "first_token_s": None if first_s is None else round(first_s, 4),
            "finished": asked.outcome == "finished",
            "outcome": asked.outcome,
        }
        picks = asked.picks()
        if picks is not None:
            facts["picked"] = {name: round(weight, 4) for name, weight in picks.weights.items()}
        if record is not None:
            facts["request_id"] = record.id
        if self._text_of is not None:
            facts["prompt"] = self._text_of(asked.prompt)
        log_facts(log, facts)

    def _count(self, asked: Prompt, seconds: float, spent: dict[str, float]) -> None:
        metrics, stages = self._metrics, asked.stages
        if asked.served.id in self._offered():
            metrics.requests.labels(asked.served.id, asked.outcome).inc()
        picks = asked.picks()
        if picks is not None:
            offered = self._offered()
            metrics.add_picks({name: w for name, w in picks.weights.items() if name in offered}, asked.generated)
            metrics.base_alone.inc(not picks.weights)
        metrics.prompt_tokens.inc(len(asked.prompt))
        queried = [job for job in asked.jobs if job.cached is not None]
        metrics.prefix_queries.inc(len(asked.prompt) * len(queried))
        metrics.prefix_hits.inc(sum(job.cached or 0 for job in queried))
        given_up = "abort" if asked.outcome in ("cancelled", "refused") else "error"
        for index in range(len(asked.jobs)):
            metrics.answers[stages.finishes.get(index, given_up)].inc()
        metrics.observe("e2e_request_latency_seconds", seconds)
        metrics.observe("request_prompt_tokens", len(asked.prompt))
        metrics.observe("request_generation_tokens", asked.generated)
        metrics.observe("request_params_n", len(asked.jobs))
        metrics.observe("request_params_max_tokens", asked.jobs[0].max_new_tokens)
        for stage, name in (("wait", "queue"), ("first_token", "prefill"), ("decode", "decode")):
            if stage in spent:
                metrics.observe(f"request_{name}_time_seconds", spent[stage])
        if "first_token" in spent:
            metrics.observe("request_inference_time_seconds", spent["first_token"] + spent.get("decode", 0.0))
        if "decode" in spent and asked.generated > 1:
            each = spent["decode"] / max(1, asked.generated - len(asked.jobs))
            metrics.observe("request_time_per_output_token_seconds", each)


def _stages(asked: Prompt, ended: float) -> Iterator[tuple[str, float, float]]:
    """The stages that a prompt has begun, each with its begin and its end."""
    stages = asked.stages
    begun = min((job.begun for job in asked.jobs if job.begun is not None), default=None)
    last = max(stages.last.values(), default=None)
    marks = (stages.read, stages.weighed, begun, stages.first, last)
    start = asked.started
    for name, end in zip(("read", "weigh", "wait", "first_token", "decode"), marks, strict=True):
        yield name, start, ended if end is None else end
        if end is None:
            return
        start = end


def _trace(tracing: Tracing, record: Record, asked: Prompt, ended: float) -> None:
    """Make a span of a prompt, with the attributes of vLLM's, and one of each of its stages."""
    stages = list(_stages(asked, ended))
    spent = {name: end - start for name, start, end in stages}
    sampling, served = asked.jobs[0].sampling, asked.served
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.request.id": record.id,
        "gen_ai.request.model": served.id,
        "gen_ai.request.n": len(asked.jobs),
        "gen_ai.request.max_tokens": asked.jobs[0].max_new_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.response.model": served.id,
        "gen_ai.response.finish_reasons": [asked.stages.finishes[index] for index in sorted(asked.stages.finishes)],
        "gen_ai.usage.prompt_tokens": len(asked.prompt),
        "gen_ai.usage.completion_tokens": asked.generated,
        "gen_ai.latency.e2e": ended - asked.started,
        "loraflow.method": served.method.name,
        "loraflow.outcome": asked.outcome,
    }
    picks = asked.picks()
    if picks is not None:
        attributes["loraflow.picked"] = list(picks.weights)
    first_s = _first_token_s(asked)
    if first_s is not None:
        attributes["gen_ai.latency.time_to_first_token"] = first_s
    for stage, name in (("wait", "queue"), ("first_token", "model_prefill"), ("decode", "model_decode")):
        if stage in spent:
            attributes[f"gen_ai.latency.time_in_{name}"] = spent[stage]
    if "first_token" in spent:
        attributes["gen_ai.latency.time_in_model_inference"] = spent["first_token"] + spent.get("decode", 0.0)
    failed = asked.outcome in ("timeout", "invalid", "failed")
    span = tracing.add(record.span, "llm_request", (asked.started, ended), attributes, failed=failed)
    for name, start, end in stages:
        tracing.add(span, name, (start, end), {})

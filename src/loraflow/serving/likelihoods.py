"""How likely tokens are: those of an answer, and those of a prompt as the engine reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.serving.jobs import Job, Token

# Positions whose log-probabilities are in memory at the same time, beside their logits.
_AT_ONCE = 64


@dataclass(frozen=True)
class PromptPosition:
    """A place in a step whose logits say how likely a prompt's next token is.

    Attributes:
        row: which token of the step.
        place: the place of that next token in the prompt.
    """

    job: Job
    row: int
    place: int


def prompt_positions(batch: Sequence[tuple[Job | None, Any]]) -> list[PromptPosition]:
    """All of those in a step, of the requests that are to tell their prompts; longer prompts are read in several."""
    found = []
    start = 0
    for job, future in batch:
        if job is not None and job.tells_prompt:
            # The manager has counted the tokens of this step already.
            first = future.state.position_offset - future.query_length
            after = min(first + future.query_length, len(job.prompt) - 1)
            found += [PromptPosition(job, start + at - first, at + 1) for at in range(first, after)]
        start += future.query_length
    return found


def read_prompts(positions: Sequence[PromptPosition], logits: Float[Tensor, "positions vocabulary"]) -> list[Job]:
    """Note how likely the prompts' tokens are, and give the requests for which these are no finite numbers."""
    failed: dict[str, Job] = {}
    for start in range(0, len(positions), _AT_ONCE):
        some = positions[start : start + _AT_ONCE]
        tokens = [one.job.prompt[one.place] for one in some]
        counts = [one.job.sampling.logprobs or 0 for one in some]
        for one, token in zip(some, _tokens(logits[start : start + len(some)], tokens, counts), strict=True):
            one.job.read[one.place] = token
            if token.logprob is None or not -torch.inf < token.logprob < torch.inf:
                failed[one.job.id] = one.job
    return list(failed.values())


def token_of(logits: Float[Tensor, " vocabulary"], token: int, count: int | None) -> Token:
    """A chosen token, with its log-probability and those of so many of the likeliest; None tells nothing."""
    return Token(token) if count is None else next(_tokens(logits[None], [token], [count]))


def _tokens(
    logits: Float[Tensor, "positions vocabulary"], tokens: Sequence[int], counts: Sequence[int]
) -> Iterator[Token]:
    logs = logits.log_softmax(dim=-1)
    chosen = logs.gather(1, torch.tensor(tokens, device=logs.device)[:, None])[:, 0].tolist()
    values, ids = (found.tolist() for found in logs.topk(min(max(counts), logs.shape[-1])))
    for row, (token, count) in enumerate(zip(tokens, counts, strict=True)):
        top = tuple(zip(ids[row][:count], values[row][:count], strict=True))
        yield Token(token, chosen[row], top)

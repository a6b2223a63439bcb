r"""What a fusion's weights are like over a data set: means, spreads, who leads, and gates that have collapsed.

A token of an answer counts with the weights that produced it, those of the position before it, as in the figures 3 to 5
of [Wang et al. 2024](https://arxiv.org/abs/2402.11455); a token of a prompt, with those of its own position.

* *Largest*: an adapter leads where its weight is the largest, with its sign, not its magnitude. Adapters within
  `TIE` of the largest share the token.
* *Entropy*: of the positive parts, as shares,
  $$H = -\frac{1}{\log k} \sum_i p_i \log p_i, \qquad p_i = \frac{\max(w_i, 0)}{\sum_j \max(w_j, 0)}$$
  0 where one adapter speaks, 1 where all speak alike. LoRA-Flow's weights may be negative and need not sum to one;
  a negative weight takes an update away, and is counted as silence. Tokens without any positive weight have no entropy
  and are counted by themselves (`silent`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraflow.answers import generate_answers, require_tokenizer
from loraflow.core.fusion import Fusion
from loraflow.examples import Example, parse_examples
from loraflow.methods import QueryMethod
from loraflow.methods.base import Level, Place
from loraflow.prompts import Message
from loraflow.training.data import (
    IGNORED,
    TokenExample,
    TokenExamples,
    longest_example,
    split_batches,
    tokenize,
)
from loraflow.training.weights import normalized_entropy, weights_of_rows

TIE = 1e-6
"""Weights this near to the largest are largest too."""
RESOLUTION = 0.001
"""Weights are counted in steps of this for the percentiles, which are exact to half of it."""
TENTHS = 10
"""Parts of an answer, as in the paper's figure 4."""


@dataclass(frozen=True)
class WeightSummary:
    """The fusion weights of many tokens, at each of several sites (layers, modules, or tenths of an answer).

    Attributes:
        count: how many tokens.
        mean: mean weight; NaN where there was no token, as in all that follows.
        std: standard deviation over the tokens.
        low: 10th percentile.
        high: 90th percentile.
        absolute: mean absolute weight.
        largest: share of the tokens where the adapter has the largest weight; sums to 1 over the adapters.
        entropy: mean normalised entropy of the tokens that have one.
        silent: share of the tokens without a positive weight, which have no entropy.
    """

    count: Int[Tensor, " sites"]
    mean: Float[Tensor, "sites adapters"]
    std: Float[Tensor, "sites adapters"]
    low: Float[Tensor, "sites adapters"]
    high: Float[Tensor, "sites adapters"]
    absolute: Float[Tensor, "sites adapters"]
    largest: Float[Tensor, "sites adapters"]
    entropy: Float[Tensor, " sites"]
    silent: Float[Tensor, " sites"]

    def part(self, sites: slice) -> WeightSummary:
        """The same for some of the sites."""
        return WeightSummary(*(getattr(self, field.name)[sites] for field in fields(self)))

    def as_json(self) -> dict[str, Any]:
        """The numbers as JSON values, None for NaN."""
        return {field.name: _plain(getattr(self, field.name).tolist()) for field in fields(self)}


@dataclass(frozen=True)
class WeightStatistics:
    """How a fusion weighs its adapters on a data set.

    Attributes:
        adapters: names, in the order of the last axis of every summary.
        method: name of the method that gave the weights.
        level: what it looks at. Methods that weigh whole prompts count each prompt once, not its tokens.
        place: where its gates stand.
        examples: how many examples.
        layers: indices of the fused decoder layers; layers that no adapter changes are left out.
        answers: of the answers' tokens, by layer. Gates of single modules are averaged over those of a layer.
        prompts: of the prompts' tokens, by layer; None for methods that weigh whole prompts.
        overall: of the answers' tokens, averaged over the layers first: one site.
        tenths: of the answers' tokens by tenth of the answer, averaged over the layers first. Always of tokens. Answers
            of fewer than ten tokens leave tenths out.
        modules: site names of the gates, where they are of single modules.
        module_answers: of the answers' tokens, by module.
        truncated: origins of the examples that were cut to the longest length.
    """

    adapters: tuple[str, ...]
    method: str
    level: Level
    place: Place
    examples: int
    layers: tuple[int, ...]
    answers: WeightSummary
    prompts: WeightSummary | None
    overall: WeightSummary
    tenths: WeightSummary
    modules: tuple[str, ...] = ()
    module_answers: WeightSummary | None = None
    truncated: tuple[str, ...] = ()

    @property
    def counted(self) -> str:
        """What the answers' weights are counted by: "prompts" or "tokens"."""
        return "prompts" if self.level == "query" else "tokens"

    def as_json(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        content = {
            field.name: value.as_json() if isinstance(value, WeightSummary) else value
            for field in fields(self)
            for value in [getattr(self, field.name)]
        }
        return {**content, "counted": self.counted}


def weight_statistics(
    model: Fusion,
    examples: Sequence[Mapping[str, Any] | Example],
    *,
    batch_size: int = 4,
    max_length: int | None = None,
    on_batch: Callable[[int], object] = lambda count: None,
) -> WeightStatistics:
    """Summarise the weights that a fusion gives to given answers, each read in one forward (teacher forcing).

    Nothing is kept of a batch but sums and counts, so that a data set may be of any size.

    Args:
        model: the fusion, with the method in use.
        examples: prompts and completions.
        batch_size: examples in a forward.
        max_length: longest example in tokens; longer ones are cut and reported. By default the model's, at most 2048.
        on_batch: called after each batch with its size, for progress bars.

    Returns:
        Means, spreads, shares and entropies.

    Raises:
        LoraflowError: if the base alone is in use, there is no tokenizer, or weights are not finite.
        DataError: if an example is malformed, or a prompt too long.
    """
    tokenizer = require_tokenizer(model.tokenizer)
    parsed = parse_examples(examples)
    data = tokenize(parsed, tokenizer, model.prompt, max_length or longest_example(model))
    return statistics_of_tokens(model, data, batch_size=batch_size, on_batch=on_batch)


def statistics_of_tokens(
    model: Fusion,
    data: TokenExamples,
    *,
    batch_size: int = 4,
    on_batch: Callable[[int], object] = lambda count: None,
) -> WeightStatistics:
    """The same for examples that are token ids already, such as those of `answer_tokens`."""
    fused = model.attachment.sites["module"]
    layers = tuple(sorted({site.layer for site in fused.values()}))
    modules = tuple(fused) if model.method.place == "module" and not isinstance(model.method, QueryMethod) else ()
    last = len(layers) + len(modules)
    answers, prompts, tenths = (_Tally(n, len(model.adapters)) for n in (last + 1, len(layers), TENTHS))
    whole = isinstance(model.method, QueryMethod)
    for batch in split_batches(data, batch_size):
        for answer, prompt in weights_of_rows(model, batch, layers, modules):
            of_layers = answer[:, : len(layers)].mean(dim=1)
            sites = torch.cat([answer, of_layers[:, None]], dim=1)
            answers.add_all(sites[:1] if whole else sites)
            tenths.add(of_layers, torch.arange(len(of_layers)) * TENTHS // len(of_layers))
            if not whole:
                prompts.add_all(prompt[:, : len(layers)])
        on_batch(len(batch))
    found = answers.summary()
    return WeightStatistics(
        adapters=tuple(model.adapter_names),
        method=model.method.name,
        level=model.method.level,
        place=model.method.place,
        examples=len(data),
        layers=layers,
        answers=found.part(slice(len(layers))),
        prompts=None if whole else prompts.summary(),
        overall=found.part(slice(last, None)),
        tenths=tenths.summary(),
        modules=modules,
        module_answers=found.part(slice(len(layers), last)) if modules else None,
        truncated=tuple(data.truncated),
    )


def answer_tokens(
    model: Fusion,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda count: None,
) -> TokenExamples:
    """Answer conversations greedily, and give prompts and answers as token ids, as they were generated.

    The token that ends an answer is part of it. `on_batch` is called after each batch with its size.
    """
    tokenizer = require_tokenizer(model.tokenizer)
    answers = generate_answers(
        model,
        conversations,
        tokenizer=tokenizer,
        prompt=model.prompt,
        max_new_tokens=max_new_tokens,
        endings=model.endings,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    rows = []
    for conversation, answer in zip(conversations, answers, strict=True):
        ids, new = model.prompt.prompt_ids(tokenizer, conversation), list(answer.token_ids)
        rows.append(TokenExample(ids + new, [IGNORED] * len(ids) + new))
    return TokenExamples(rows, [])


class _Tally:
    """Sums and counts of weights by site, in float64; what was added is not kept."""

    def __init__(self, sites: int, adapters: int) -> None:
        self.sites, self.adapters = sites, adapters
        self.count, self.entropic = torch.zeros(2, sites, dtype=torch.int64)
        self.entropy = torch.zeros(sites, dtype=torch.float64)
        self.total, self.squares, self.absolute, self.largest = torch.zeros(4, sites, adapters, dtype=torch.float64)
        # How often each step of `RESOLUTION` occurred: only those that did, so that weights may have any range.
        self.steps, self.counts = torch.zeros(2, 0, dtype=torch.int64)

    def add_all(self, weights: Float[Tensor, "tokens sites adapters"]) -> None:
        """Add tokens that have weights at every site."""
        self.add(weights.flatten(0, 1), torch.arange(self.sites).repeat(len(weights)))

    def add(self, weights: Float[Tensor, "rows adapters"], sites: Int[Tensor, " rows"]) -> None:
        """Add weights, each row at its site."""
        weights = weights.double()
        self.count.index_add_(0, sites, torch.ones_like(sites))
        for sums, values in ((self.total, weights), (self.squares, weights**2), (self.absolute, weights.abs())):
            sums.index_add_(0, sites, values)
        largest = (weights >= weights.amax(dim=1, keepdim=True) - TIE).double()
        self.largest.index_add_(0, sites, largest / largest.sum(dim=1, keepdim=True))
        entropy = normalized_entropy(weights)
        known = ~entropy.isnan()
        self.entropic.index_add_(0, sites, known.long())
        self.entropy.index_add_(0, sites, entropy.nan_to_num())
        steps = (weights / RESOLUTION).round().long() + _MIDDLE
        cells = sites[:, None] * self.adapters + torch.arange(self.adapters)
        self._count((cells * 2 * _MIDDLE + steps).flatten())

    def _count(self, steps: Int[Tensor, " values"]) -> None:
        every = torch.cat([self.steps, steps])
        counts = torch.cat([self.counts, torch.ones_like(steps)])
        self.steps, where = every.unique(return_inverse=True)
        self.counts = torch.zeros_like(self.steps).index_add_(0, where, counts)

    def summary(self) -> WeightSummary:
        """What the weights so far were like."""
        count = self.count.double()
        mean, squares = (sums / count[:, None] for sums in (self.total, self.squares))
        return WeightSummary(
            count=self.count,
            mean=mean,
            std=(squares - mean**2).clamp(min=0).sqrt(),
            low=self._quantile(0.1),
            high=self._quantile(0.9),
            absolute=self.absolute / count[:, None],
            largest=self.largest / count[:, None],
            entropy=self.entropy / self.entropic,
            silent=1 - self.entropic / count,
        )

    def _quantile(self, level: float) -> Float[Tensor, "sites adapters"]:
        """The smallest step at or below which this share of the tokens lies."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)])
        found = torch.full((self.sites * self.adapters,), math.nan, dtype=torch.float64)
        edges = torch.searchsorted(self.steps, torch.arange(len(found) + 1) * 2 * _MIDDLE)
        for cell, (first, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            if end == first:
                continue
            wanted = before[first] + math.ceil(level * (before[end] - before[first]).item())
            at = int(torch.searchsorted(before[first + 1 : end + 1], wanted))
            found[cell] = (self.steps[first + at] - cell * 2 * _MIDDLE - _MIDDLE) * RESOLUTION
        return found.view(self.sites, self.adapters)


# Steps of either sign in one number with their cell: weights up to a million, and two million cells.
_MIDDLE = 2**30


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value

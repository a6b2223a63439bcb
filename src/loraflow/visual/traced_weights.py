"""Which adapter spoke at each token: the fusion weights of one forward, ready to be shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraflow.methods.base import Level, Place


@dataclass(frozen=True, repr=False)
class TracedWeights:
    """The fusion weights of every position, layer and adapter: what the pictures show.

    Attributes:
        weights: what was computed at each position, `[batch, seq, layers, adapters]`. A gate of the whole model is
            repeated over the layers; gates of single modules are averaged over those of a layer, with zeros for a layer
            that has none.
        adapters: names of the adapters, in the order of the last axis.
        tokens: the text of each position; the token's id where there was no tokenizer.
        input_ids: `[batch, seq]`.
        attention_mask: 1 at real tokens, 0 at padding, `[batch, seq]`.
        prompt_length: how many positions are the prompt's, padding included; the rest was generated.
        module_weights: for gates of single modules, `[batch, seq, adapters]` by site name.
        method: name of the method that gave the weights.
        level: what it looks at: the same weights for every text ("task"), for a whole prompt ("query"), or not.
        place: where its gates stand.
        readings: where gates add updates of their own: how much of what each adapter (a column) reads is written where
            each (a row) writes, in units of fusion weights, by site name.
    """

    weights: Float[Tensor, "batch seq layers adapters"]
    adapters: tuple[str, ...]
    tokens: list[list[str]]
    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    prompt_length: int = 0
    module_weights: Mapping[str, Float[Tensor, "batch seq adapters"]] = field(default_factory=dict)
    method: str = ""
    level: Level = "token"
    place: Place = "layer"
    readings: Mapping[str, Float[Tensor, "writers readers"]] = field(default_factory=dict)

    def shown_weights(self, row: int = 0) -> Float[Tensor, "seq layers adapters"]:
        """The weights that a picture gives each token of a row.

        A generated token gets those of the position before it, which produced it (the paper's figure 5); a token of the
        prompt, which nothing produced, gets its own.
        """
        own = self.weights[row]
        shown = own.clone()
        start = max(1, self.prompt_length)
        if self.prompt_length:
            shown[start:] = own[start - 1 : -1]
        return shown

    def token_weights(self, row: int = 0) -> Float[Tensor, "seq adapters"]:
        """`shown_weights`, averaged over the layers."""
        return self.shown_weights(row).mean(dim=1)

    def shown_positions(self, row: int = 0) -> tuple[list[int], list[int]]:
        """Positions of a row's prompt and of its generated part, without padding; the latter may be empty."""
        positions = self.attention_mask[row].nonzero().flatten().tolist()
        start = self.prompt_length or len(self.tokens[row])
        return [p for p in positions if p < start], [p for p in positions if p >= start]

    def layer_weights(self, row: int = 0) -> Float[Tensor, "layers adapters"]:
        """Mean weights of each layer in the generated part of a row; in all of it where nothing was generated."""
        prompt, generated = self.shown_positions(row)
        return self.shown_weights(row)[generated or prompt].mean(dim=0)

    def mean_readings(self) -> Float[Tensor, "writers readers"] | None:
        """The mean of `readings` over all linears that have some; None where there are none."""
        return torch.stack(list(self.readings.values())).mean(dim=0) if self.readings else None

    def notes(self) -> list[str]:
        """What a reader must know about these weights, as sentences."""
        notes = []
        if self.level == "task":
            notes.append("The weights are the same for every prompt and token.")
        elif self.level == "query":
            notes.append("The method weighs whole prompts: these weights are the prompt's, the same for every token.")
        if self.place == "module":
            notes.append("A layer's weights are the mean over its modules.")
        elif self.place == "model":
            notes.append("The weights are the whole model's, the same in every layer.")
        if self.readings:
            notes.append("Beside them, what one adapter reads is written where others write: see who reads whom.")
        return notes

    def __repr__(self) -> str:
        rows, _, layers, _ = self.weights.shape
        parts = [self.shown_positions(row) for row in range(rows)]
        prompt, generated = (sum(len(part[i]) for part in parts) for i in (0, 1))
        counted = f"{prompt + generated} tokens" + (f" ({prompt} prompt, {generated} generated)" if generated else "")
        in_rows = f" in {rows} rows" if rows > 1 else ""
        means = self.weights[self.attention_mask.bool()].mean(dim=(0, 1)).tolist()
        weights = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(self.adapters, means, strict=True))
        method = f"{self.method}: " if self.method else ""
        return f"{type(self).__name__}({method}{counted}{in_rows}, {layers} layers; mean weights {weights})"

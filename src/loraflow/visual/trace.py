"""Which adapter spoke at each token: the fusion weights of one forward, ready to be shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraflow.methods.base import Level, Place

# Weights that are the same to the three decimals that pictures show.
EVEN = 0.001


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token, such that together they are the text of all.

    Decoded alone, a token loses its leading space in some tokenizers, and is no text at all where it is one byte of a
    character: such tokens give "", and the last byte's token the character.
    """
    texts: list[str] = []
    shown, start = 0, 0
    for end in range(1, len(ids) + 1):
        before = str(tokenizer.decode(ids[shown:start]))
        text = str(tokenizer.decode(ids[shown:end]))[len(before) :]
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(text)
            shown, start = start, end
    return texts


def printable(token: str) -> str:
    """A token with its control characters spelled out; raw, they could do anything to a terminal or a page's text.

    Spaces of all kinds and the joiners that scripts and emoji need stay.
    """
    return "".join(
        c if c.isprintable() or c in "\n\u200c\u200d" or unicodedata.category(c) == "Zs" else repr(c)[1:-1]
        for c in token
    )


def dominating(weights: Sequence[float]) -> int | None:
    """The place of the largest weight; None where another is as large, to three decimals."""
    top = max(range(len(weights)), key=weights.__getitem__)
    rest = [weight for index, weight in enumerate(weights) if index != top]
    return None if rest and weights[top] - max(rest) <= EVEN else top


def dominance(weights: Sequence[float]) -> float:
    """The largest weight as a share of all positive ones, from 0 to 1."""
    return max(*weights, 0.0) / (sum(max(weight, 0.0) for weight in weights) or 1.0)


@dataclass(frozen=True, repr=False)
class Trace:
    """The fusion weights of every position, layer and adapter.

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
        return notes

    def save_html(self, path: str | Path, *, row: int = 0) -> None:
        """Write the explorer: one page to be opened in a browser, without network.

        Args:
            path: the file; folders that are missing are made.
            row: which row of the batch.

        Raises:
            LoraflowError: if the file cannot be written.
        """
        from loraflow.visual.explorer import save_explorer

        save_explorer({self.method or "weights": self}, path, row=row)

    def __repr__(self) -> str:
        rows, _, layers, _ = self.weights.shape
        parts = [self.shown_positions(row) for row in range(rows)]
        prompt, generated = (sum(len(part[i]) for part in parts) for i in (0, 1))
        counted = f"{prompt + generated} tokens" + (f" ({prompt} prompt, {generated} generated)" if generated else "")
        in_rows = f" in {rows} rows" if rows > 1 else ""
        means = self.weights[self.attention_mask.bool()].mean(dim=(0, 1)).tolist()
        weights = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(self.adapters, means, strict=True))
        method = f"{self.method}: " if self.method else ""
        return f"Trace({method}{counted}{in_rows}, {layers} layers; mean weights {weights})"

    def _repr_html_(self) -> str:
        from loraflow.visual.html import trace_html

        return trace_html(self)

"""Which adapter spoke at each token: the fusion weights of one forward, ready to be shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase


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


@dataclass(frozen=True)
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
    """

    weights: Float[Tensor, "batch seq layers adapters"]
    adapters: tuple[str, ...]
    tokens: list[list[str]]
    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    prompt_length: int = 0
    module_weights: Mapping[str, Float[Tensor, "batch seq adapters"]] = field(default_factory=dict)

    def token_weights(self, row: int = 0) -> Float[Tensor, "seq adapters"]:
        """The weights that a picture gives each token of a row, averaged over the layers.

        A generated token gets those of the position before it, which produced it (the paper's figure 5); a token of the
        prompt, which nothing produced, gets its own.
        """
        own = self.weights[row].mean(dim=1)
        shown = own.clone()
        start = max(1, self.prompt_length)
        if self.prompt_length:
            shown[start:] = own[start - 1 : -1]
        return shown

    def _repr_html_(self) -> str:
        from loraflow.visual.html import trace_html

        return trace_html(self)

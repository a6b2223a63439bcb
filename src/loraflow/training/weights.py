"""The fusion weights of examples that are token ids, and how much of them one adapter has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.core.fusion import Fusion
from loraflow.errors import LoraflowError
from loraflow.methods import QueryMethod
from loraflow.training.data import IGNORED, Collator, TokenExamples


def weights_of_rows(
    model: Fusion, batch: TokenExamples, layers: Sequence[int], modules: Sequence[str]
) -> Iterator[tuple[Float[Tensor, "answer sites adapters"], Float[Tensor, "prompt sites adapters"]]]:
    """Each example's weights, at the layers, then the modules: those that produced its answer, and its prompt's.

    Yields:
        One example's weights after another.

    Raises:
        LoraflowError: if weights are not finite.
    """
    tensors = {key: value.to(model.device) for key, value in Collator(0)(batch.rows).items()}
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    if isinstance(model.method, QueryMethod):
        of_prompts = model.weigh(ids, mask * (tensors["labels"] == IGNORED)).double().cpu()[:, list(layers)]
        weights = of_prompts[:, None].expand(-1, ids.shape[1], -1, -1)
    else:
        traced = model.trace(ids, mask, prompt_mask=tensors["labels"] == IGNORED)
        of_modules = [traced.module_weights[name] for name in modules]
        weights = torch.cat([traced.weights[:, :, list(layers)], *(w[:, :, None] for w in of_modules)], dim=2).double()
    for row, example in zip(weights, batch.rows, strict=True):
        prompt = sum(label == IGNORED for label in example.labels)
        if not row[: len(example.input_ids)].isfinite().all():
            raise LoraflowError(
                f"The method {model.method.name!r} gave weights that are not finite (NaN or infinite). Check what it "
                "learned, and the precision of the base (`dtype`)."
            )
        # The last position is where nothing was produced any more.
        yield row[prompt - 1 : len(example.input_ids) - 1], row[:prompt]


def normalized_entropy(weights: Float[Tensor, "*rows adapters"]) -> Float[Tensor, "*rows"]:
    """Entropy of the positive weights as shares, divided by the logarithm of the number of adapters.

    0 where one adapter speaks (and where there is only one), 1 where all speak alike, NaN where no weight is positive.
    """
    positive = weights.clamp(min=0)
    total = positive.sum(dim=-1, keepdim=True)
    shares = positive / total
    entropy = torch.special.entr(shares).sum(dim=-1)
    return entropy / math.log(weights.shape[-1]) if weights.shape[-1] > 1 else entropy

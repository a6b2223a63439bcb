"""An adapter read by PEFT and by loraflow, and what became of it."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraflow import FusedModel
from loraflow.errors import LoraflowError
from tests.tiny import peft_model, random_ids, relative_error
from tests.zoo.kinds import Kind

BOUND = 1e-5
"""What the largest error may be, as a share of the adapter's own largest effect."""


@dataclass(frozen=True)
class Outcome:
    """What became of an adapter.

    Attributes:
        kind: "equal" to PEFT; "as saved", where PEFT reads less of the changed files than of those it wrote; "refused";
            "wrong"; or "raw", another error than loraflow's.
        detail: the message, what PEFT does, or how large the error is.
    """

    kind: str
    detail: str


def attempt(kind: Kind) -> Outcome:
    """Save an adapter of a kind, and let PEFT and loraflow read it."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, directory = kind.save(Path(place)), place
        plain, before = _logits(base), _logits(peft_model(base, directory))
        kind.change(Path(directory), base)
        try:
            found = _logits(FusedModel.from_adapters(copy.deepcopy(base), {"adapter": directory}, "adapter"))
        except LoraflowError as refusal:
            return Outcome("refused", _general(str(refusal), directory))
        except Exception as error:
            return Outcome("raw", f"{type(error).__name__}: {_general(str(error), directory)}")
        try:
            after = _logits(peft_model(base, directory))
        except Exception as error:
            after, reads = plain, f"PEFT ends in {type(error).__name__}"
        else:
            reads = "PEFT reads less of it"
        if (error := relative_error(found - plain, after - plain)) < BOUND:
            return Outcome("equal", "")
        if kind.same and relative_error(found - plain, before - plain) < BOUND:
            return Outcome("as saved", reads)
        return Outcome("wrong", f"off by {error:.1e}")


@torch.no_grad()
def _logits(model: PreTrainedModel | FusedModel) -> Tensor:
    return model(random_ids()).logits


def _general(message: str, directory: str) -> str:
    """A message without the adapter's name and place, in one line."""
    place = re.escape(str(Path(directory).resolve()))
    message = re.sub(rf"{place}/?", "", message.removeprefix("Adapter 'adapter'").replace(f" ({directory})", ""))
    return " ".join(message.lstrip(": ").split())

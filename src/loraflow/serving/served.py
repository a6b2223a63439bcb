"""One model that requests can name, and who weighs a prompt for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from loraflow.adapters import tensors_digest
from loraflow.core.attach import Attachment
from loraflow.core.batch import is_constant, layer_weights, weigh_prompts
from loraflow.core.lanes import Gates
from loraflow.endings import Endings
from loraflow.errors import LoraflowError, MethodError
from loraflow.methods import Method, QueryMethod
from loraflow.model import FusedModel
from loraflow.prompts import PromptFormat
from loraflow.serving.jobs import Weigher

Kind = Literal["base", "adapter", "fusion"]


@dataclass(frozen=True)
class Served:
    """One model that requests can name.

    Attributes:
        digest: of all that its answers depend on but the request: base, adapters, method and what that has learned.
        adapters: names of its adapters, in the order of its weights.
        method: who weighs them.
        prompt: how conversations become prompts.
        endings: what ends an answer, where a request says nothing more.
        gates: the method's gates, for its own adapters.
        origin: digest of the model that was named, where a request has its adapters weighed otherwise.
    """

    id: str
    kind: Kind
    root: str
    parent: str | None
    digest: str
    adapters: tuple[str, ...]
    parts: tuple[str, ...]
    method: Method
    prompt: PromptFormat
    endings: Endings
    gates: Gates = field(repr=False)
    origin: str = ""
    created: int = field(default_factory=lambda: int(time.time()))


def weigher_of(model: FusedModel, served: Served, prompt: Sequence[int]) -> Weigher:
    """Who weighs a request; methods that read prompts read this one now, which takes some passes.

    Raises:
        LoraflowError: if an adapter has left the model.
    """
    if served.gates and is_constant(served.method, served.gates):
        # However many different ones there are, they are weighed together.
        weights = layer_weights(served.gates, model.attachment.layer_count)
        return Weigher(weights=weights, adapters=served.adapters, digest=served.digest)
    if not isinstance(served.method, QueryMethod):
        return Weigher(served.method, served.gates, adapters=served.adapters, digest=served.digest)
    ids = torch.tensor([list(prompt)], device=model.device)
    with model.attachment.turn(), torch.no_grad():
        attachment = model.attachment
        positions = attachment.positions(served.adapters)
        gate = served.gates.get("model")
        weights = weigh_prompts(attachment, served.method, gate, ids, None, model.tokenizer, positions)[0]
    # The whole prompt decides the weights, and so what is kept of its beginning.
    digest = tensors_digest({"weights": weights.cpu()}, served.digest)
    return Weigher(weights=weights, adapters=served.adapters, digest=digest)


def try_gates(model: FusedModel, method: Method, attachment: Attachment, positions: Sequence[int]) -> Gates:
    """Make gates, and let each weigh one token: what fails in a step fails all who are in it.

    Raises:
        LoraflowError: if the method refuses its parameters.
        MethodError: if it fails otherwise, as with parameters of a wrong type.
    """
    sites = {name: site for place in attachment.sites.values() for name, site in place.items()}
    try:
        gates = attachment.make_gates(method, positions)
        for name, gate in gates.items():
            if not isinstance(method, QueryMethod):
                gate(torch.zeros(1, 1, sites[name].features, device=model.device, dtype=model.dtype))
    except LoraflowError:
        raise
    except Exception as error:
        raise MethodError(f"The method {method.name!r} cannot weigh with these parameters: {error}") from error
    return gates

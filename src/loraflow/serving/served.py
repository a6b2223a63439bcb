"""One model that requests can name, and who weighs a prompt for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from loraflow.adapters import tensors_digest
from loraflow.core.attach import Attachment
from loraflow.core.batch import is_constant, layer_weights, weigh_prompts
from loraflow.core.lanes import Gates, inform
from loraflow.core.probe import Prompt
from loraflow.core.slots import try_gate
from loraflow.endings import Endings
from loraflow.errors import LoraflowError, MethodError
from loraflow.methods import METHODS, Method, QueryMethod, get_method, make_method
from loraflow.model import FusedModel
from loraflow.prompts import PromptFormat
from loraflow.saved.fusion import fusion_digest
from loraflow.serving.auto import Auto, Picking
from loraflow.serving.jobs import Weigher
from loraflow.serving.picking import pick

Kind = Literal["base", "adapter", "fusion", "auto"]


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
        auto: what picks of the adapters by the request; None where all of them are weighed.
        picking: what it may pick for one request.
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
    auto: Auto | None = None
    picking: Picking | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def among(self, adapters: Sequence[str]) -> Served:
        """The same with some of its adapters alone, such as those that were picked."""
        digests = dict(zip(self.adapters, self.parts, strict=True))
        return dataclasses.replace(self, adapters=tuple(adapters), parts=tuple(digests[name] for name in adapters))

    def with_picking(self, picking: Picking) -> Served:
        """The same, of whose adapters some are picked; its digest tells which may be, and how."""
        facts = json.dumps([self.digest, *dataclasses.astuple(picking)])
        digest = f"sha256:{hashlib.sha256(facts.encode()).hexdigest()}"
        return dataclasses.replace(self, digest=digest, picking=picking)

    def fitted_picking(self, picking: Picking) -> Served:
        """The same for one request to `auto`, where its method was fitted on its adapters.

        Raises:
            MethodError: if it weighs each token, and knows nothing of limits.
        """
        named = dataclasses.replace(self, origin=self.digest)
        if isinstance(self.method, QueryMethod):
            return named.with_picking(picking)
        if picking != Picking(self.adapters, None, None):
            raise MethodError(
                f"The method {self.method.name!r} weighs each token by what it learned of all its adapters together, "
                "and knows no `adapters`, `top_k` and `floor`. Leave them out."
            )
        return named


def unlearned_method(
    name: str, adapters: Sequence[str], options: Mapping[str, Any], offered: Iterable[Served]
) -> Method:
    """A method that weighs these adapters for one request, without having learned anything.

    Raises:
        MethodError: if the method is unknown, a parameter is, or it would have to learn first.
    """
    method = get_method(name, list(adapters), options)
    if method.learns:
        fitted = [served.id for served in offered if served.method.name == method.name]
        hint = f" Ask for one of the models {', '.join(map(repr, fitted))}." if fitted else ""
        usable = ", ".join(sorted(repr(name) for name, known in METHODS.items() if known.learns is None))
        raise MethodError(
            f"The method {method.name!r} learns, and a request cannot wait for that.{hint} Methods that learn nothing: "
            f"{usable}."
        )
    return method


def weigher_of(model: FusedModel, served: Served, prompt: Sequence[int]) -> Weigher:
    """Who weighs a request; methods that read prompts read this one now, which takes some passes.

    Raises:
        LoraflowError: if an adapter has left the model.
    """
    if served.gates and is_constant(served.method, served.gates):
        # However many different ones there are, they are weighed together.
        weights = layer_weights(served.gates, model.attachment.layer_count)
        return Weigher(weights=weights, adapters=served.adapters, digest=served.digest)
    if not served.method.reads_prompt:
        return Weigher(served.method, served.gates, adapters=served.adapters, digest=served.digest)
    if served.picking is not None:
        return _picking_weigher(model, served, prompt)
    ids = torch.tensor([list(prompt)], device=model.device)
    with model.attachment.turn(), torch.no_grad():
        attachment = model.attachment
        positions = attachment.positions(served.adapters)
        gate = served.gates.get("model")
        weights = weigh_prompts(attachment, served.method, gate, ids, None, model.tokenizer, positions)[0]
    # The whole prompt decides the weights, and so what is kept of its beginning.
    digest = tensors_digest({"weights": weights.cpu()}, served.digest)
    if not isinstance(served.method, QueryMethod):
        # They are a prior of each layer's, the same in all, and its tokens are weighed one by one.
        return Weigher(served.method, inform(served.gates, weights[:1]), adapters=served.adapters, digest=digest)
    return Weigher(weights=weights, mixing=served.method.mixing, adapters=served.adapters, digest=digest)


def _picking_weigher(model: FusedModel, served: Served, prompt: Sequence[int]) -> Weigher:
    """Who weighs a request to `auto`: the adapters that are picked for its prompt, or the base alone."""
    assert isinstance(served.method, QueryMethod)
    assert served.picking is not None
    ids = torch.tensor(list(prompt), device=model.device)
    with model.attachment.turn(), torch.no_grad():
        attachment = model.attachment
        reading = Prompt(attachment, ids, model.tokenizer, attachment.positions(served.adapters))
        picks, names, weights = pick(served.method, served.gates.get("model"), reading, served.picking)
    picked = served.among(names)
    parts = list(zip(picked.adapters, picked.parts, strict=True))
    if not names:
        # As whoever asks for the base, with whom it shares what is in the cache.
        base = make_method("base", {})
        digest = fusion_digest(model.base_record, parts, base, tensors_digest({}))
        return Weigher(base, adapters=(), digest=digest, picks=picks)
    weights = weights.to(model.device, torch.promote_types(model.dtype, torch.float32))
    # What was not picked changes nothing of what is computed.
    digest = tensors_digest({"weights": weights.cpu()}, fusion_digest(model.base_record, parts, served.method, ""))
    return Weigher(weights=weights, adapters=picked.adapters, digest=digest, picks=picks)


def try_gates(model: FusedModel, method: Method, attachment: Attachment, positions: Sequence[int]) -> Gates:
    """Make gates, and let each weigh one token: what fails in a step fails all who are in it.

    Raises:
        LoraflowError: if the method refuses its parameters.
        MethodError: if it fails otherwise, as with parameters of a wrong type.
    """
    sites = {name: site for place in attachment.sites.values() for name, site in place.items()}
    try:
        gates = attachment.make_gates(method, positions)
        for name, gate in () if method.reads_prompt else gates.items():
            try_gate(gate, sites[name], model.device, model.dtype)
    except LoraflowError:
        raise
    except Exception as error:
        raise MethodError(f"The method {method.name!r} cannot weigh with these parameters: {error}") from error
    return gates

"""Vectors of a fusion's adapters, for other fusions and for a bank: what was made of samples once is not made again."""

from __future__ import annotations

import json

import torch

from loraflow.adapters import AdapterVectors
from loraflow.core.fusion import Fusion
from loraflow.errors import MethodError
from loraflow.methods.base import JoinsLater


def vectors_of(fusion: Fusion) -> AdapterVectors:
    """The vectors that a fusion's method has made of its adapters' samples.

    Raises:
        MethodError: if the method keeps no such vectors, or has made none.
    """
    kept = _gate(fusion).kept_samples()
    found = {
        adapter: rows.mean(dim=0) for adapter, rows in zip(fusion.adapter_names, kept, strict=True) if rows is not None
    }
    if not found:
        raise MethodError(
            f"The method {fusion.method.name!r} has made no vectors yet. Fit it on samples of each adapter's own data."
        )
    vectors = AdapterVectors(made_by(fusion), len(next(iter(found.values()))))
    for adapter in fusion.adapters:
        if adapter.name in found:
            vectors.put(adapter.name, adapter.digest, found[adapter.name])
    return vectors


@torch.no_grad()
def take_vectors(fusion: Fusion, vectors: AdapterVectors) -> list[str]:
    """Give a fusion's method the vectors of its adapters.

    Args:
        fusion: its gate is changed in place; adapters without a vector keep what they have.
        vectors: those of these adapters, and perhaps of others.

    Returns:
        The adapters that have no vector there, or one of other weights: fit the method on samples of these alone.

    Raises:
        MethodError: if the method keeps no such vectors, or something else made them.
    """
    gate = _gate(fusion)
    if vectors.made_by != made_by(fusion):
        raise MethodError(
            f"The vectors were made by {vectors.made_by}, and the method {fusion.method.name!r} compares those of "
            f"{made_by(fusion)}. Take vectors of the same encoder, or fit the method on samples."
        )
    digests = {adapter.name: adapter.digest for adapter in fusion.adapters}
    wanting = {*vectors.missing(digests), *vectors.stale(digests)}
    rows = []
    for (name, digest), kept in zip(digests.items(), gate.kept_samples(), strict=True):
        row = kept if name in wanting else vectors.vector(name, digest)[None]
        rows.append(torch.zeros(1, vectors.features).double() if row is None else row.double().cpu())
    gate.set_samples(rows)
    return [name for name in digests if name in wanting]


def made_by(fusion: Fusion) -> str:
    """What makes a fusion's vectors: the method's way, and its encoder, or the base and the layer; as JSON."""
    parameters = fusion.method.parameters()
    facts = {"method": fusion.method.name, **{name: parameters.get(name) for name in ("encoder", "instruction")}}
    if facts["encoder"] == "base":
        layer = parameters["layer"] % fusion.attachment.layer_count
        facts = {**facts, "layer": layer, "base": fusion.base_record.digest}
    return json.dumps({**facts, "prompt": fusion.prompt.model_dump()}, sort_keys=True)


def _gate(fusion: Fusion) -> JoinsLater:
    """The gate that keeps vectors.

    Raises:
        MethodError: if there is none.
    """
    gate = fusion.gates.get("model")
    if not isinstance(gate, JoinsLater):
        raise MethodError(
            f"The method {fusion.method.name!r} keeps no vectors of its adapters. Take 'lora-retriever' or 'centroid'."
        )
    return gate

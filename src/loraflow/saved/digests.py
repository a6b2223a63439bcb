"""Digests of tensors, and of all that decides what a fusion computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from loraflow.bases import BaseRecord
from loraflow.methods import Method


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, independent of their order and of any file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def fusion_digest(base: BaseRecord, adapters: Iterable[tuple[str, str]], method: Method, weights_digest: str) -> str:
    """SHA-256 of what a fusion computes from token ids: all that decides it, and nothing else.

    That is the base, name and digest of each adapter in order, the method, and the digest of what it has learned. Not
    in it: where the base and the adapters are, the prompt format, the record of the training, the version.
    """
    facts = {
        "base": base.model_dump(exclude={"path", "revision"}),
        "adapters": list(adapters),
        "method": [method.name, method.parameters()],
        "learned": weights_digest,
    }
    return f"sha256:{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}"

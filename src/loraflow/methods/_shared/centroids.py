"""What methods share that compare a prompt with samples of each adapter's own data: embeddings and their means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loraflow.encoders import TextEncoder
from loraflow.errors import MethodError
from loraflow.methods.base import Query, QueryGate, Site

BASE = "base"
"""The `encoder` that is the base model itself."""


class Centroids(QueryGate):
    """Each adapter's mean embedding.

    Attributes:
        centroids: `[adapters, hidden]`; zero before they are made of samples.
        encoder: the model that embeds texts; None is the base.
    """

    centroids: Float[Tensor, "adapters hidden"]
    encoder: TextEncoder | None

    def __init__(self, adapters: int, features: int, encoder: TextEncoder | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("centroids", torch.zeros(adapters, features))

    def set_samples(self, embeddings: Sequence[Float[Tensor, "_samples hidden"]]) -> None:
        """Take the mean embedding of each adapter's samples."""
        self.centroids.copy_(torch.stack([of_one.mean(dim=0) for of_one in embeddings]))

    def kept_samples(self) -> list[Float[Tensor, "1 hidden"] | None]:
        """For each adapter what stands for its samples: their mean; None before it is made."""
        return [row[None].clone() if row.any() else None for row in self.centroids]


class EmbedsPrompts:
    """Mixed into query-level methods with the parameters `layer`, `encoder` and `instruction`.

    Attributes:
        layer: which decoder layer's output of the base is averaged over the prompt's tokens; -1 is the last.
        encoder: "base", or the Hub id or directory of another model that embeds texts (`loraflow.encoders`).
        instruction: what another model reads before each text.
    """

    layer: int
    encoder: str
    instruction: str

    def __post_init__(self) -> None:
        """Check the parameters.

        Raises:
            MethodError: if the base is to read an instruction.
        """
        if self.instruction and self.encoder == BASE:
            raise MethodError(
                f"`instruction` (={self.instruction!r}) is for encoders of texts, and `encoder` is the base, which "
                "reads prompts as they are. Leave it out, or name another model."
            )

    def gate(self, site: Site) -> Centroids:
        """Make the place for the centroids.

        Raises:
            MethodError: if the base has no such layer.
        """
        if not -site.layers <= self.layer < site.layers:
            raise MethodError(f"`layer` (={self.layer}) must be between -{site.layers} and {site.layers - 1}.")
        encoder = None if self.encoder == BASE else TextEncoder(self.encoder, self.instruction)
        return Centroids(len(site.adapters), site.features if encoder is None else encoder.features, encoder)

    def embed(self, query: Query, gate: Any) -> Float[Tensor, " hidden"]:
        """The embedding of a prompt: its text's by the encoder, or the mean over its tokens of the base's states."""
        if gate.encoder is not None:
            return gate.encoder.embed(query.text, gate.centroids.device)
        return query.layer_output(self.layer).float().mean(dim=0)

    def compared(
        self, query: Query, gate: Any, *, center: bool
    ) -> tuple[Float[Tensor, " hidden"], Float[Tensor, "adapters hidden"]]:
        """The embedding of a prompt and the centroids, in float64; the centroids' mean taken from both or not.

        Raises:
            MethodError: if there are no centroids yet, or one is missing.
        """
        if not gate.centroids.any():
            raise MethodError("The centroids are not made yet. Fit the method on samples of each adapter's own data.")
        if not bool((known := gate.centroids.any(dim=1)).all()):
            missing = [name for name, is_known in zip(query.adapters, known.tolist(), strict=True) if not is_known]
            raise MethodError(
                f"There is no centroid of {', '.join(map(repr, missing))} yet. Fit the method on samples of what those "
                "adapters are for, or leave them out."
            )
        embedding = self.embed(query, gate).double()
        centroids = gate.centroids.to(embedding)
        if not center:
            return embedding, centroids
        origin = centroids.mean(dim=0)
        return embedding - origin, centroids - origin

"""Another model's embeddings of texts, for methods that compare prompts."""

from __future__ import annotations

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from loraflow.errors import MethodError


class TextEncoder:
    """A model of transformers whose last hidden states, averaged over the tokens, embed a text.

    Raises:
        MethodError: if there is no such model.
    """

    def __init__(self, name: str) -> None:
        # The model itself is loaded when it is first used.
        try:
            self.features = transformers.AutoConfig.from_pretrained(name).hidden_size
        except (OSError, ValueError) as error:
            raise MethodError(f"`encoder` (={name!r}) is no model that transformers can load: {error}") from error
        self.name = name
        self._loaded: tuple | None = None

    @torch.no_grad()
    def embed(self, text: str, device: torch.device) -> Float[Tensor, " features"]:
        """The embedding of a text."""
        if self._loaded is None:
            self._loaded = (
                transformers.AutoTokenizer.from_pretrained(self.name),
                transformers.AutoModel.from_pretrained(self.name).eval(),
            )
        tokenizer, model = self._loaded
        inputs = tokenizer(text, return_tensors="pt", truncation=True).to(device)
        return model.to(device)(**inputs).last_hidden_state[0].float().mean(dim=0)

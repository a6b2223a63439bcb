"""Models that make vectors of texts, for whoever compares texts.

A model that says how its vectors are made (`modules.json`, as those of sentence-transformers have it) is run by
sentence-transformers, by its own pooling, projection and normalisation. Of any other, a plain model of transformers, a
text's vector is the mean over its tokens of the last hidden states.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers.utils import cached_file

from loraflow.errors import LoraflowError, MethodError

_POOLING_FILE = "modules.json"


class TextEncoder:
    """A model that makes vectors of texts, by its Hub id or directory; it does not depend on what else is encoded.

    Encoders of one model share it, also copies and those of other fusions; threads take turns at it. Texts longer than
    the model reads are cut at its limit: it reads their beginning, after the instruction.

    Args:
        name: Hub id or directory of the model.
        instruction: what is put before each text, for models that were trained with instructions. Where the model's own
            pooling leaves instructions out (INSTRUCTOR's does), its tokens are left out of the mean.

    Attributes:
        name: Hub id or directory of the model.
        instruction: what is put before each text.
        features: width of the vectors.

    Raises:
        LoraflowError: if it needs sentence-transformers, which is not installed.
        MethodError: if there is no such model.
    """

    name: str
    instruction: str
    features: int

    def __init__(self, name: str, instruction: str = "") -> None:
        self.name, self.instruction = name, instruction
        self._model = _open(name)
        self.features = self._model.features

    @torch.no_grad()
    def embed(self, text: str, device: torch.device) -> Float[Tensor, " features"]:
        """The vector of a text in float32, as the model gives it: those of some have length 1, those of others not."""
        with self._model.lock:
            # A clone, for what is made in inference mode no gradient may come near.
            return self._model.embed(text, self.instruction, device).float().clone()

    def __reduce__(self) -> tuple[type[TextEncoder], tuple[str, str]]:
        # The model is named in a copy, not kept in it.
        return TextEncoder, (self.name, self.instruction)


class _Model:
    """A loaded model, at which one thread works at a time: it may be moved to another device meanwhile."""

    def __init__(self, features: int, embed: Callable[[str, str, torch.device], Tensor]) -> None:
        self.features, self.embed = features, embed
        self.lock = threading.Lock()


_opened: weakref.WeakValueDictionary[str, _Model] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def _open(name: str) -> _Model:
    """A model, loaded once as long as somebody uses it."""
    with _opening:
        found = _opened.get(name)
        if found is None:
            found = _opened[name] = _sentence_model(name) if _says_how(name) else _plain_model(name)
        return found


def _says_how(name: str) -> bool:
    """Whether a model has a file that says how its vectors are made.

    Raises:
        MethodError: if there is no such model, or it cannot be told.
    """
    if Path(_place(name)).is_dir():
        return (Path(_place(name)) / _POOLING_FILE).is_file()
    try:
        return cached_file(name, _POOLING_FILE, _raise_exceptions_for_missing_entries=False) is not None
    except (OSError, ValueError) as error:
        raise MethodError(_unusable(name, "transformers", error)) from error


def _sentence_model(name: str) -> _Model:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise LoraflowError(
            f"`encoder` (={name!r}) is a model of sentence-transformers, which is not installed ({error}): "
            "pip install 'loraflow[retrieval]'"
        ) from error
    try:
        model = SentenceTransformer(_place(name), device="cpu")
    except Exception as error:
        raise MethodError(_unusable(name, "sentence-transformers", error)) from error

    def embed(text: str, instruction: str, device: torch.device) -> Tensor:
        # An empty instruction takes the place of one that the model would add by default.
        options: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": False, "device": str(device)}
        return model.encode([text], prompt=instruction, **options)[0]

    return _Model(int(model.get_embedding_dimension()), embed)


def _plain_model(name: str) -> _Model:
    try:
        # First, for it says best what is missing.
        transformers.AutoConfig.from_pretrained(_place(name))
        tokenizer = transformers.AutoTokenizer.from_pretrained(_place(name))
        model = transformers.AutoModel.from_pretrained(_place(name)).eval()
    except (OSError, ValueError) as error:
        raise MethodError(_unusable(name, "transformers", error)) from error

    # A tokenizer need not know how much the model reads. Of RoBERTa's positions, padding has two.
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    longest = min(tokenizer.model_max_length, positions - 2 if tokenizer.model_max_length > positions else positions)

    def embed(text: str, instruction: str, device: torch.device) -> Tensor:
        inputs = tokenizer(instruction + text, return_tensors="pt", truncation=True, max_length=longest).to(device)
        if inputs["input_ids"].shape[1] == 0:
            raise MethodError(f"`encoder` (={name!r}) makes no token of {text!r}. Give a text, or another encoder.")
        return model.to(device)(**inputs).last_hidden_state[0].float().mean(dim=0)

    return _Model(model.config.hidden_size, embed)


def _place(name: str) -> str:
    """A directory of this machine, or else a Hub id."""
    path = Path(name).expanduser()
    return str(path) if path.is_dir() else name


def _unusable(name: str, library: str, error: Exception) -> str:
    return (
        f"`encoder` (={name!r}) is no model that {library} can load: {str(error).rstrip('.')}. Give the Hub id or the "
        "directory of one."
    )

"""A vector of each adapter, kept beside a bank: what tells which adapters are near a query, without their weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from loraflow.errors import AdapterError, did_you_mean
from loraflow.files import write_atomically

VECTORS_FILE = "loraflow_vectors.safetensors"
_KEY = "loraflow_vectors"
_VERSION = 1
_FIRST_ROWS = 16


class AdapterVectors:
    """Vectors by adapter, each with the digest of the weights that it was made for.

    An adapter that comes in adds a row; the others stay as they are. One whose weights have changed is *stale*: its
    vector is not given any more until another takes its place. Threads may share it.

    Args:
        made_by: what made the vectors, such as the encoder's name; those of others cannot be compared with them.
        features: width of the vectors.

    Attributes:
        made_by: what made the vectors.
        features: width of the vectors.
    """

    made_by: str
    features: int

    def __init__(self, made_by: str, features: int) -> None:
        self.made_by, self.features = made_by, features
        self._lock = threading.RLock()
        self._digests: dict[str, str] = {}
        # Rows beyond the names are room for others, so that one that comes in moves none.
        self._rows = torch.zeros(_FIRST_ROWS, features)

    @classmethod
    def read(cls, path: str | Path, made_by: str | None = None) -> AdapterVectors:
        """Read what `save` wrote.

        Args:
            path: the file, or the folder of a bank.
            made_by: what makes the vectors that are to be compared with them, if that is known already.

        Raises:
            AdapterError: if it cannot be read, or something else made its vectors.
        """
        path = _file(path)
        try:
            content = path.read_bytes()
            rows = load(content)["vectors"]
            size = int.from_bytes(content[:8], "little")
            kept = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_KEY])
            version, theirs, digests = kept["format_version"], kept["made_by"], dict(kept["digests"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"{path} holds no vectors of adapters ({error!r}). Make them again.") from error
        if version != _VERSION or rows.dim() != 2 or len(rows) != len(digests) or not rows.isfinite().all():
            raise AdapterError(
                f"{path} holds {tuple(rows.shape)} values for {len(digests)} adapters, in format {version} (this "
                f"version reads {_VERSION}). Make the vectors again."
            )
        if made_by not in (None, theirs):
            raise AdapterError(
                f"The vectors in {path} were made by {theirs}, and cannot be compared with those of {made_by}. Make "
                "them again, or take what made them."
            )
        read = cls(str(theirs), rows.shape[1])
        read._digests, read._rows = digests, rows.float()
        return read

    def save(self, path: str | Path) -> Path:
        """Write all vectors into a file, or under their own name into a bank's folder; whole or not at all."""
        path = _file(path)
        with self._lock:
            kept = {"format_version": _VERSION, "made_by": self.made_by, "digests": list(self._digests.items())}
            tensors = {"vectors": self._rows[: len(self._digests)].contiguous()}
            write_atomically(path, save(tensors, metadata={_KEY: json.dumps(kept)}))
        return path

    @property
    def names(self) -> list[str]:
        """The adapters that have a vector, stale ones too."""
        return list(self._digests)

    def put(self, name: str, digest: str, vector: Float[Tensor, " features"]) -> None:
        """Take in an adapter's vector, in the place of an older one of the same name.

        Args:
            name: the adapter's.
            digest: of its weights.
            vector: what was made of samples of its data.

        Raises:
            AdapterError: if it is of another width, or not finite.
        """
        if tuple(vector.shape) != (self.features,) or not bool(vector.isfinite().all()):
            raise AdapterError(
                f"The vector of {name!r} has the shape {tuple(vector.shape)} or values that are not finite. Give "
                f"{self.features} finite numbers."
            )
        with self._lock:
            row = list(self._digests).index(name) if name in self._digests else len(self._digests)
            if row == len(self._rows):
                self._rows = torch.cat([self._rows, torch.zeros(max(_FIRST_ROWS, row), self.features)])
            self._rows[row] = vector.detach().float().cpu()
            self._digests[name] = digest

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterError: if it has no vector.
        """
        with self._lock:
            row = list(self._digests).index(self._known(name))
            del self._digests[name]
            self._rows = torch.cat([self._rows[:row], self._rows[row + 1 :]])

    def stale(self, digests: Mapping[str, str]) -> list[str]:
        """The adapters whose weights are others than those that their vectors were made for."""
        return [name for name, digest in digests.items() if self._digests.get(name, digest) != digest]

    def missing(self, digests: Mapping[str, str]) -> list[str]:
        """The adapters that have no vector."""
        return [name for name in digests if name not in self._digests]

    def vector(self, name: str, digest: str) -> Float[Tensor, " features"]:
        """An adapter's vector.

        Raises:
            AdapterError: if there is none, or it is of other weights.
        """
        with self._lock:
            if self._digests[self._known(name)] != digest:
                raise AdapterError(
                    f"The vector of {name!r} was made for other weights ({self._digests[name]}) than it has now "
                    f"({digest}). Make it again, of samples of its data."
                )
            return self._rows[list(self._digests).index(name)].clone()

    def nearest(
        self, query: Float[Tensor, " features"], count: int, among: Iterable[str] | None = None
    ) -> list[tuple[str, float]]:
        """The adapters of the largest inner products with a query, the nearest first; of equal ones, those named first.

        Args:
            query: its vector.
            count: how many, at most.
            among: names to choose from; all by default.

        Raises:
            AdapterError: if `count` is no number, the query is of another width, or one of the names has no vector.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise AdapterError(f"`count` (={count!r}) must be a whole number of at least 1.")
        if tuple(query.shape) != (self.features,):
            raise AdapterError(f"`query` has the shape {tuple(query.shape)}. Give {self.features} numbers.")
        with self._lock:
            names = list(self._digests)
            scores = self._rows[: len(names)] @ query.detach().float().cpu()
            if among is not None:
                wanted = {self._known(name) for name in among}
                rows = [row for row, name in enumerate(names) if name in wanted]
                names, scores = [names[row] for row in rows], scores[rows]
        order = scores.argsort(descending=True, stable=True)[:count].tolist()
        return [(names[place], float(scores[place])) for place in order]

    def __len__(self) -> int:
        return len(self._digests)

    def _known(self, name: str) -> str:
        if name not in self._digests:
            raise AdapterError(f"The adapter {name!r} has no vector. {did_you_mean(name, self._digests)}")
        return name


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path / VECTORS_FILE if path.is_dir() else path

"""What an adapter is in memory, and where one lives."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:  # PEFT is imported where it is used: it imports bitsandbytes, which takes a second and may print.
    from peft import LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraModule:
    """One adapter's update of one linear module: `scaling * (lora_B (lora_A x) + bias)`, with DoRA's magnitude.

    Attributes:
        lora_A: down projection, `[rank, in_features]`.
        lora_B: up projection, `[out_features, rank]`, scaling not applied.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: the bias of `lora_B` (`lora_bias=True`), `[out_features]`.
        magnitude: DoRA's magnitude vector, `[out_features]`.
        experts: how many experts it updates, each by its own `rank` rows of `lora_A` and columns of `lora_B`, one
            expert after the other.
    """

    lora_A: Float[Tensor, "rank in_features"]
    lora_B: Float[Tensor, "out_features rank"]
    scaling: float
    bias: Float[Tensor, " out_features"] | None = None
    magnitude: Float[Tensor, " out_features"] | None = None
    experts: int = 1

    @property
    def rank(self) -> int:
        """Rank of the update, of one expert where there are several."""
        return self.lora_A.shape[0] // self.experts

    def of_expert(self, expert: int) -> LoraModule:
        """The update of one expert alone."""
        own = slice(expert * self.rank, (expert + 1) * self.rank)
        return LoraModule(self.lora_A[own], self.lora_B[:, own], self.scaling)


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter lives: a local directory, or a Hub repository with an optional subfolder and revision."""

    path: str
    revision: str | None = None

    @classmethod
    def parse(cls, source: str | Path | AdapterSource) -> AdapterSource:
        """Read `directory`, `user/repo`, `user/repo/subfolder`; a Hub id may end in `@revision`."""
        if isinstance(source, AdapterSource):
            return source
        text = str(source)
        if not Path(text).expanduser().exists() and "@" in text:
            path, _, revision = text.rpartition("@")
            return cls(path, revision)
        return cls(text)

    @property
    def is_local(self) -> bool:
        """Whether the path names something on this machine's disk rather than on the Hub."""
        path = Path(self.path).expanduser()
        return path.exists() or path.is_absolute() or self.path.startswith((".", "~")) or len(path.parts) == 1


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter in memory, by module name of the base model.

    Attributes:
        name: the name it has in the fusion.
        source: where it was read from; on the Hub with the resolved commit as revision.
        config: PEFT's configuration of it.
        modules: its updates, keyed by the base's module name (`model.layers.0.self_attn.q_proj`).
        digest: SHA-256 of its weights and of the settings that decide the mathematics.
        copies: values of the base's own parameters that PEFT saved with it (`save_embedding_layers`, `modules_to_save`,
            `bias`), by parameter name; it fits a base that has the same.
        placed: whether its updates are by the names of a base, which it may be put into again.
    """

    name: str
    source: AdapterSource
    config: LoraConfig
    modules: Mapping[str, LoraModule] = field(repr=False)
    digest: str
    copies: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    placed: bool = False

    @property
    def parameters(self) -> int:
        """Number of values in the adapter's tensors."""
        return sum(
            tensor.numel()
            for module in self.modules.values()
            for tensor in (module.lora_A, module.lora_B, module.bias, module.magnitude)
            if tensor is not None
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its modules, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    def called(self, name: str) -> Adapter:
        """The same by another name."""
        return dataclasses.replace(self, name=name)

    @property
    def identity(self) -> Hashable:
        """What no other adapter has; the digest, where it is known without reading anything."""
        return self.digest

    @property
    def uses_dora(self) -> bool:
        """Whether any of its modules carries a DoRA magnitude."""
        return any(module.magnitude is not None for module in self.modules.values())


def tensors_digest(tensors: Mapping[str, Tensor], settings: str = "") -> str:
    """SHA-256 of settings and named tensors, independent of the tensors' order and of any file format."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"

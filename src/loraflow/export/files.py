"""A PEFT adapter on disk, as PEFT's own `save_pretrained` writes it, and what can load it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save
from transformers.pytorch_utils import Conv1D

from loraflow import __version__
from loraflow.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, LoraModule, write_keys
from loraflow.core.fusion import Fusion
from loraflow.core.layers import LayerFusion
from loraflow.errors import LoraflowError
from loraflow.export.folding import Compression
from loraflow.files import staged, write_atomically
from loraflow.merging import Loss
from loraflow.saved.records import CARD_FILE

# What `vllm serve --max-lora-rank` takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


_CARD = """---
library_name: peft
{base_line}pipeline_tag: text-generation
tags: [lora, peft, loraflow]
---

# {names}, fused into one adapter

An ordinary PEFT adapter, exported by [loraflow](https://pypi.org/project/loraflow) {version} from a fusion of
{count} LoRA adapters ({names}) by the {method}. {summary}
"""


@dataclass(frozen=True)
class MeanCost:
    """What constant weights cost a dynamic fusion on examples.

    Attributes:
        examples: how many.
        dynamic_loss: mean negative log-likelihood of a response token with the fusion, in nats.
        exported_loss: the same with the exported adapter.
        truncated: origins of the examples that were cut to the longest length.
    """

    examples: int
    dynamic_loss: float
    exported_loss: float
    truncated: list[str]


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        directory: where it is.
        adapters: names of the adapters that are in it.
        modules: number of linear modules that it updates.
        rank: the largest of their ranks.
        uses_dora: whether it is a DoRA adapter.
        lora_bias: whether it has biases.
        compression: what a lower rank cost; None where none was asked for.
        cost: what constant weights cost; None where they were constant before.
        merge: by which merge, where it is none of a fusion's weights.
        from_sum: what that, and a lower rank, lose of the sum of the adapters' updates.
    """

    directory: Path
    adapters: tuple[str, ...]
    modules: int
    rank: int
    uses_dora: bool
    lora_bias: bool
    compression: Compression | None = None
    cost: MeanCost | None = None
    merge: str | None = None
    from_sum: Loss | None = None

    @property
    def vllm(self) -> str:
        """Whether vLLM can load it, and with which options or why not."""
        if self.uses_dora or self.lora_bias:
            what = "DoRA" if self.uses_dora else "adapters with biases (`lora_bias`)"
            return f"vLLM cannot load it: it does not support {what}. PEFT can."
        if self.rank > VLLM_RANKS[-1]:
            return f"vLLM cannot load it: its rank is {self.rank}, the limit {VLLM_RANKS[-1]}. Export a lower rank."
        needed = next(rank for rank in VLLM_RANKS if rank >= self.rank)
        return f"vLLM can load it: --enable-lora --max-lora-rank {needed} --lora-modules name={self.directory}"


def checked_directory(model: Fusion, directory: Path) -> Path:
    """A directory by its whole path, whether it is there or not.

    Raises:
        LoraflowError: if it is a file, or one of the fusion's own adapters.
    """
    target = directory.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise LoraflowError(f"{directory} is a file. Give a directory.")
    if target.exists():
        refuse_own_files(model, directory, target)
    return target


def checked_target(model: Fusion, directory: Path, overwrite: bool) -> Path:
    """Where the export goes.

    Raises:
        LoraflowError: if something is there that must not be replaced.
    """
    target = checked_directory(model, directory)
    if not target.exists():
        return target
    found = {path.name for path in target.iterdir()}
    if found and not found & {CONFIG_FILE, WEIGHTS_FILE}:
        raise LoraflowError(f"{directory} holds {sorted(found)[0]!r} and no adapter. Give a new or an empty directory.")
    if found and not overwrite:
        raise LoraflowError(f"{directory} holds an adapter already. Give another directory, or say `overwrite=True`.")
    return target


def refuse_own_files(model: Fusion, directory: Path, target: Path) -> None:
    """Check that a directory is none of a fusion's own adapters.

    Raises:
        LoraflowError: if it is one.
    """
    for adapter in model.adapters:
        if adapter.source.is_local and Path(adapter.source.path) == target:
            raise LoraflowError(f"{directory} is the adapter {adapter.name!r} of this fusion. Give another directory.")


def write_adapter(model: Fusion, adapter: Adapter, report: ExportReport) -> None:
    """Write beside the directory first, so that a crash leaves no adapter there that is only in part the new one."""
    target = report.directory
    tensors = {key: tensor.contiguous() for key, tensor in write_keys(adapter.modules).items()}
    with staged(target, folder=True) as folder:
        adapter.config.save_pretrained(str(folder))
        write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        write_atomically(folder / CARD_FILE, _card(model, report).encode())
        if not target.exists() or not any(target.iterdir()):
            os.replace(folder, target)
            return
        # Without a configuration, weights are no adapter: old and new can never be taken for one.
        (target / CONFIG_FILE).unlink(missing_ok=True)
        for name in (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE):
            os.replace(folder / name, target / name)


def peft_config(model: Fusion, modules: Mapping[str, LoraModule]) -> LoraConfig:
    """PEFT's configuration; r equals alpha everywhere, so readers that know no patterns scale by 1 too."""
    pattern = rank_pattern({name: module.rank for name, module in modules.items()})
    rank = max(module.rank for module in modules.values())
    config = LoraConfig(
        base_model_name_or_path=model.base_record.path or None,
        revision=model.base_record.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_dora=any(module.magnitude is not None for module in modules.values()),
        lora_bias=any(module.bias is not None for module in modules.values()),
        fan_in_fan_out=any(isinstance(model.base_model.get_submodule(name), Conv1D) for name in modules),
    )
    # PEFT makes a set of a list, whose order would differ from run to run.
    config.target_modules = target_modules(list(modules), _module_names(model))
    return config


def _module_names(model: Fusion) -> list[str]:
    """The base's own modules, without what the fusion put among them."""
    own = [name for name, module in model.base_model.named_modules() if isinstance(module, LayerFusion)]
    prefixes = tuple(f"{name}." for name in own)
    return [name for name, _ in model.base_model.named_modules() if name not in own and not name.startswith(prefixes)]


def target_modules(wanted: Sequence[str], known: Sequence[str]) -> list[str] | str:
    """What PEFT's `target_modules` must be to hit the wanted modules and no other.

    Args:
        wanted: full names of the modules.
        known: names of all modules of the base.

    Returns:
        Last parts of the names where they suffice, else full names, else (where one of those is the end of another
        module's name) a pattern.
    """
    candidates = (sorted({name.rpartition(".")[2] for name in wanted}), list(wanted))
    for names in candidates:
        config = LoraConfig(target_modules=names)
        if {name for name in known if check_target_module_exists(config, name)} == set(wanted):
            return names
    return "|".join(map(re.escape, wanted))


def rank_pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """PEFT's `rank_pattern`, given that `r` is the largest rank: by the last part of the names where that suffices."""
    of_leaf: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        of_leaf.setdefault(name.rpartition(".")[2], set()).add(rank)
    pattern = {}
    for name, rank in ranks.items():
        leaf = name.rpartition(".")[2]
        if rank != max(ranks.values()):
            pattern[leaf if len(of_leaf[leaf]) == 1 else name] = rank
    return pattern


def _card(model: Fusion, report: ExportReport) -> str:
    path = model.base_record.path
    summary = "It gives what the fusion gives."
    if report.cost is not None:
        summary = (
            f"Its weights are the means of that method's on {report.cost.examples} examples. Loss per response token "
            f"there: {report.cost.dynamic_loss:.4f} with the fusion, {report.cost.exported_loss:.4f} with this adapter."
        )
    if report.compression is not None:
        summary += (
            f" It is compressed to rank {report.compression.rank}, with a relative error of "
            f"{report.compression.error:.2g} in the updates."
        )
    if report.from_sum is not None:
        summary = (
            f"Its updates differ from the sum of those adapters' by {report.from_sum.error:.2g}, relative to that sum."
        )
    return _CARD.format(
        # The Hub takes ids of its own there, no paths.
        base_line=f"base_model: {path}\n" if path and not Path(path).is_absolute() else "",
        names=", ".join(report.adapters),
        version=__version__,
        count=len(report.adapters),
        method=f"merge `{report.merge}`" if report.merge else f"method `{model.method.name}`",
        summary=summary,
    )

r"""A base with a fusion of constant weights, or a merge, folded into its weights: an ordinary checkpoint.

$$W' = \mathrm{round}(W + B' A')$$

with the one adapter of `export_peft`, computed in float64 and rounded once, to the precision that the base has; a DoRA
is folded by its own formula, and biases go into the base's where it has some. A quantised base is written dequantised:
the weights that it computes with.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraflow import __version__
from loraflow.adapters import LoraModule
from loraflow.bases.loading import bar_for_people
from loraflow.core.fusion import Fusion
from loraflow.core.layers import LayerFusion
from loraflow.core.stack import dense_weight
from loraflow.errors import LoraflowError
from loraflow.examples import Example
from loraflow.export.files import checked_directory
from loraflow.export.fusion import Folded, fold
from loraflow.files import staged
from loraflow.merging import Loss, Merge, loss_from
from loraflow.saved.records import CARD_FILE

_CONFIG = "config.json"
# All that a checkpoint and its tokenizer are made of, whoever wrote them: a replaced one leaves none of it behind.
_OF_CHECKPOINTS = (
    *(_CONFIG, "generation_config.json", ".gitattributes"),
    *("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("tokenizer*.json", "*tokenizer*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
    *("preprocessor_config.json", "processor_config.json"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py"),
)
# What sampling does, by what does nothing: transformers writes no other value where nothing is sampled.
_OF_SAMPLING = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_OUR_CARD = "exported by [loraflow](https://pypi.org/project/loraflow)"
_CARD = """---
library_name: transformers
{base_line}pipeline_tag: text-generation
tags: [loraflow]
---

# {names}, folded into their base

An ordinary checkpoint, {ours} {version}: the base with {count} LoRA
adapters ({names}) folded into its weights by the {method}. {summary}
"""


@dataclass(frozen=True)
class CheckpointReport:
    """What was written.

    Attributes:
        directory: where it is; None where it was only made for another file, and is gone.
        folded: the adapter that was folded in, and what making it cost.
        dtype: precision of the weights.
        shards: number of files that they are in.
        dequantised: what the base was quantised by; None where it was not.
        rounding: what rounding to `dtype` changed of the updates, relative to them.
        tokenizer: whether a tokenizer is with it.
        prompt: what of the fusion's prompt format has no place in a checkpoint, in words; None where all of it has.
        unsampled: settings of sampling that the base's generation configuration has although it does not sample
            (`do_sample`), which transformers refuses to write; they are left out.
    """

    directory: Path | None
    folded: Folded
    dtype: torch.dtype
    shards: int
    dequantised: str | None
    rounding: Loss
    tokenizer: bool
    prompt: str | None
    unsampled: tuple[str, ...] = ()


@torch.no_grad()
def export_merged(
    model: Fusion,
    directory: str | Path,
    *,
    rank: int | None = None,
    mean_weights_on: Sequence[Mapping[str, Any] | Example] | None = None,
    merge: Merge | None = None,
    batch_size: int = 4,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    console: Console | None = None,
) -> CheckpointReport:
    """Write a fusion as a checkpoint of its base, which `AutoModelForCausalLM` loads, with its tokenizer.

    Args:
        model: the fusion; its method's weights must be constant, unless `mean_weights_on` or `merge` is given.
        directory: where to; it appears complete or not at all.
        rank: compress every update to this rank before.
        mean_weights_on: examples on which a dynamic fusion's weights are averaged.
        merge: merge the fusion's adapters so, whatever its method weighs them by.
        batch_size: examples in a forward of a measurement.
        max_shard_size: the largest file of weights, such as "5GB".
        overwrite: replace a checkpoint that is in the directory.
        console: where progress is shown; standard error by default.

    Raises:
        LoraflowError: if the directory cannot be used, or the fusion cannot be folded.
        MethodError: if the fusion weights are not constant, or are all zero.
    """
    target = checked_checkpoint(model, Path(directory), overwrite)
    generation, unsampled = _generation_config(model)
    folded = fold(
        model,
        rank=rank,
        dtype=torch.float64,
        mean_weights_on=mean_weights_on,
        merge=merge,
        batch_size=batch_size,
        console=console,
    )
    dense, state, rounding = folded_weights(model, folded.adapter.modules)
    dense.generation_config = generation
    tokenizer, prompt = _with_prompt(model)
    with staged(target, folder=True) as folder:
        with bar_for_people():
            dense.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        report = CheckpointReport(
            target,
            folded,
            dense.dtype,
            len(list(folder.glob("model*.safetensors"))),
            model.base_record.quantization,
            rounding,
            tokenizer is not None,
            prompt,
            unsampled,
        )
        (folder / CARD_FILE).write_text(_card(model, report, merge), encoding="utf-8")
        _put(folder, target)
    return report


def checked_checkpoint(model: Fusion, directory: Path, overwrite: bool) -> Path:
    """Where the checkpoint goes.

    Raises:
        LoraflowError: if something is there that must not be replaced.
    """
    target = checked_directory(model, directory)
    if not target.exists():
        return target
    base = Path(model.base_record.path).expanduser()
    if model.base_record.path and base.exists() and base.resolve() == target:
        raise LoraflowError(
            f"{directory} is the base of this fusion, which is never written to. Give another directory."
        )
    found = {path.name for path in target.iterdir()}
    if found and _CONFIG not in found:
        raise LoraflowError(
            f"{directory} holds {sorted(found)[0]!r} and no checkpoint. Give a new or an empty directory."
        )
    others = sorted(path.name for path in target.iterdir() if not _is_of_checkpoint(path))
    if others:
        raise LoraflowError(
            f"{directory} holds {others[0]!r} ({len(others)} such), which is no part of a checkpoint, and is never "
            "written to. Move that elsewhere, or give a new or an empty directory."
        )
    if found and not overwrite:
        raise LoraflowError(f"{directory} holds a checkpoint already. Give another directory, or say `overwrite=True`.")
    return target


def _is_of_checkpoint(path: Path) -> bool:
    """Whether a file is one that checkpoints have; of the cards, only ours is."""
    if path.name == CARD_FILE and path.is_file():
        return _OUR_CARD in path.read_text(encoding="utf-8", errors="replace")
    return any(fnmatchcase(path.name, pattern) for pattern in _OF_CHECKPOINTS)


def _put(folder: Path, target: Path) -> None:
    """Move a whole checkpoint to where it goes."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(folder, target)
        return
    # Without a configuration, weights are no checkpoint: old and new can never be taken for one.
    (target / _CONFIG).unlink(missing_ok=True)
    for old in [path for path in target.iterdir() if _is_of_checkpoint(path)]:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == _CONFIG)
    for name in names:
        os.replace(folder / name, target / name)


def folded_weights(model: Fusion, modules: Mapping[str, LoraModule]) -> tuple[PreTrainedModel, dict[str, Tensor], Loss]:
    """The base as it is without adapters, its weights with an adapter folded in, and what rounding them cost.

    Args:
        model: the fusion.
        modules: the adapter's updates, in float64.

    Returns:
        A model of the base's class on the meta device, not quantised; values for all its tensors, those of the base
        itself where nothing changes; and the rounding error.

    Raises:
        LoraflowError: if a value has no place in such a model.
    """
    base = model.base_model
    state = dict(_own_tensors(base))
    changed: dict[str, float] = {}
    wanted_change: dict[str, float] = {}
    for name, module in modules.items():
        linear = base.get_submodule(name)
        before = dense_weight(linear)
        weight = _folded(before.double(), module)
        rounded = weight.to(before.dtype)
        if not torch.isfinite(rounded).all():
            raise LoraflowError(
                f"'{name}' has values that {str(before.dtype).removeprefix('torch.')} cannot represent. Load the base "
                "in a wider precision, or check the fusion weights."
            )
        changed[name] = (rounded.double() - weight).square().sum().item()
        wanted_change[name] = (weight - before.double()).square().sum().item()
        state[f"{name}.weight"] = (rounded.T if isinstance(linear, Conv1D) else rounded).contiguous()
        if module.bias is not None and module.bias.any():
            if f"{name}.bias" not in state:
                raise LoraflowError(
                    f"'{name}' has no bias in {type(base).__name__}, so the adapters' (`lora_bias`) has no place in "
                    "its checkpoint. Export it as an adapter instead."
                )
            bias = state[f"{name}.bias"]
            state[f"{name}.bias"] = (bias.cpu().double() + module.bias).to(bias.dtype)
    dtypes = {state[f"{name}.weight"].dtype for name in modules}
    dense = _empty(base, dtypes.pop() if len(dtypes) == 1 else base.dtype)
    wanted = dense.state_dict().keys()
    lost = sorted(wanted - state.keys())
    if lost:
        raise LoraflowError(
            f"The base, as it is loaded, has no '{lost[0]}' in full precision ({len(lost)} such), which a checkpoint "
            f"of {type(base).__name__} has. Load the base without quantisation, and whole."
        )
    return dense, {name: state[name] for name in wanted}, loss_from(changed, wanted_change)


def _folded(weight: Tensor, module: LoraModule) -> Tensor:
    weight = weight + module.scaling * module.lora_B @ module.lora_A
    if module.magnitude is None:
        return weight
    return weight * (module.magnitude.flatten() / torch.linalg.norm(weight, dim=1))[:, None]


def _own_tensors(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the base that a checkpoint has, dequantised, without what a fusion put among its modules.

    Yields:
        Name and value of each.

    Raises:
        LoraflowError: if they are away, to be brought in a forward only.
    """
    own = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, LayerFusion))
    for key, value in base.state_dict().items():
        if own and key.startswith(own):
            continue
        if value.is_meta:
            raise LoraflowError(
                f"'{key}' of the base is kept away from the devices (offloaded), and cannot be written from there. "
                "Load the base whole (`device='cpu'`)."
            )
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and not value.is_floating_point():
            value = dense_weight(base.get_submodule(module))
        yield key, value


def _empty(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The base's class without values or quantisation."""
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        made: nn.Module = type(base)(config)
    return made.to(dtype)  # type: ignore[return-value]


def _generation_config(model: Fusion) -> tuple[GenerationConfig, tuple[str, ...]]:
    """The base's, whose answers end where the fusion's end, as far as tokens say it, and what was left out of it.

    Raises:
        LoraflowError: if transformers would not write it.
    """
    config = copy.deepcopy(model.generation_config)
    if model.endings.token_ids:
        config.eos_token_id = list(model.endings.token_ids)
    unsampled = []
    if config.do_sample is not True:
        unsampled = [name for name, none in _OF_SAMPLING.items() if getattr(config, name, None) not in (None, none)]
    for name in unsampled:
        setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise LoraflowError(
            f"The base's generation configuration cannot be written with the checkpoint: "
            f"{' '.join(str(error).split())} Correct it in "
            "`model.generation_config`, or in the base's generation_config.json."
        ) from error
    return config, tuple(unsampled)


def _with_prompt(model: Fusion) -> tuple[Any, str | None]:
    """The tokenizer with the fusion's chat template, and what of its prompt format it has no place for."""
    prompt, tokenizer = model.prompt, copy.deepcopy(model.tokenizer)
    left = [
        word for word, value in (("system prompt", prompt.system_prompt), ("stop strings", model.endings.stop)) if value
    ]
    if prompt.template not in (None, "{prompt}"):
        left.append("plain template")
    if tokenizer is not None and prompt.chat_template is not None:
        tokenizer.chat_template = prompt.chat_template
    return tokenizer, ", ".join(left) or None


def _card(model: Fusion, report: CheckpointReport, merge: Merge | None) -> str:
    path = model.base_record.path
    summary = (
        f"Rounding to {str(report.dtype).removeprefix('torch.')} changed the updates by {report.rounding.error:.2g}."
    )
    cost = report.folded.cost
    if cost is not None:
        summary = (
            f"Its weights are the means of that method's on {cost.examples} examples. Loss per response token there: "
            f"{cost.dynamic_loss:.4f} with the fusion, {cost.exported_loss:.4f} with the means. {summary}"
        )
    loss: Loss | None = report.folded.from_sum or report.folded.compression
    if loss is not None:
        summary += f" Before that, they were {loss.error:.2g} away from the adapters' own, relative to these."
    if report.prompt is not None:
        summary += f" Of the fusion's prompt format it has no {report.prompt}: give that yourself."
    return _CARD.format(
        ours=_OUR_CARD,
        base_line=f"base_model: {path}\n" if path and not Path(path).is_absolute() else "",
        names=", ".join(report.folded.sources),
        version=__version__,
        count=len(report.folded.sources),
        method=f"merge `{merge.name}`" if merge is not None else f"method `{model.method.name}`",
        summary=summary,
    )

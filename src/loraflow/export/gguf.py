r"""A fusion for llama.cpp: as a LoRA in GGUF, or as a whole model.

The LoRA is written with the `gguf` package, which has llama.cpp's names of tensors: `general.type` "adapter",
`adapter.type` "lora", `adapter.lora.alpha`, and for each linear `NAME.weight.lora_a` and `NAME.weight.lora_b`.
llama.cpp multiplies every update with alpha over *its* rank, so that updates of other ranks than alpha carry the
quotient in their B. It keeps the rows of Llama's q and k in another order, by pairs of rotary dimensions, which B
takes.

A whole model needs the settings and the tokenizer as llama.cpp wants them, which only its own `convert_hf_to_gguf.py`
knows (the package has none of it): it is run on the merged checkpoint, from a copy of llama.cpp that the caller has.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from loraflow.adapters import LoraModule
from loraflow.core.fusion import Fusion
from loraflow.errors import ArchitectureError, LoraflowError, did_you_mean
from loraflow.examples import Example
from loraflow.export.checkpoint import CheckpointReport, export_merged
from loraflow.export.fusion import Folded, fold
from loraflow.files import staged
from loraflow.merging import Merge

_MAGIC = b"GGUF"
CONVERTER = "convert_hf_to_gguf.py"
# Those whose files were read back and gave the fusion's logits; others may keep their weights in an order of their own.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Whose q and k llama.cpp reorders.
_REORDERED = ("llama", "mistral")
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    Attributes:
        file: where it is.
        folded: the adapter that it is, or that is folded into it, and what making that cost.
        checkpoint: of a whole model, what the checkpoint said that it was converted from, which has no directory any
            more; None for a LoRA.
    """

    file: Path
    folded: Folded
    checkpoint: CheckpointReport | None = None


@torch.no_grad()
def export_gguf(
    model: Fusion,
    file: str | Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    mean_weights_on: Sequence[Mapping[str, Any] | Example] | None = None,
    merge: Merge | None = None,
    batch_size: int = 4,
    overwrite: bool = False,
    console: Console | None = None,
) -> GgufReport:
    """Write a fusion as a LoRA in GGUF, which llama.cpp puts on the base (`--lora`).

    Args:
        model: the fusion; its method's weights must be constant, unless `mean_weights_on` or `merge` is given.
        file: where to.
        rank: compress every update to this rank before.
        dtype: precision of the tensors: float32, float16 or bfloat16.
        mean_weights_on: examples on which a dynamic fusion's weights are averaged.
        merge: merge the fusion's adapters so, whatever its method weighs them by.
        batch_size: examples in a forward of a measurement.
        overwrite: replace the file.
        console: where progress is shown; standard error by default.

    Raises:
        ArchitectureError: if it was not verified for the base's architecture.
        LoraflowError: if the file or precision cannot be used, `gguf` is not installed, or GGUF knows no such adapter.
        MethodError: if the fusion weights are not constant, or are all zero.
    """
    gguf = _package()
    if dtype not in DTYPES:
        raise LoraflowError(
            f"`dtype` (={dtype}) must be one of {', '.join(map(str, DTYPES))}: llama.cpp reads no other in a LoRA."
        )
    target = checked_file(Path(file), overwrite)
    architecture = _architecture(model)
    folded = fold(
        model,
        rank=rank,
        dtype=dtype,
        mean_weights_on=mean_weights_on,
        merge=merge,
        batch_size=batch_size,
        console=console,
    )
    tensors = lora_tensors(model, folded.adapter.modules, folded.adapter.config.r)
    with staged(target) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(" + ".join(folded.sources))
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(folded.adapter.config.r))
        for name, tensor in tensors.items():
            _add_tensor(gguf, writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, target)
    return GgufReport(target, folded)


def export_gguf_model(
    model: Fusion, file: str | Path, llama_cpp: str | Path, *, overwrite: bool = False, **options: Any
) -> GgufReport:
    """Write a fusion as a whole model in GGUF, by llama.cpp's own converter.

    Args:
        model: the fusion.
        file: where to.
        llama_cpp: a copy of llama.cpp, or its `convert_hf_to_gguf.py`; it runs in this Python.
        overwrite: replace the file.
        options: as for `export_merged`.

    Raises:
        LoraflowError: if the file cannot be used, there is no converter, or it fails.
    """
    target = checked_file(Path(file), overwrite)
    converter = Path(llama_cpp).expanduser()
    converter = converter / CONVERTER if converter.is_dir() else converter
    if not converter.is_file():
        raise LoraflowError(f"There is no {converter}. Give a copy of llama.cpp, which has its {CONVERTER}.")
    with staged(target, folder=True) as folder:
        checkpoint = folder / "checkpoint"
        report = export_merged(model, checkpoint, **options)
        made = folder / "model.gguf"
        command = [sys.executable, str(converter), str(checkpoint), "--outfile", str(made)]
        if report.dtype in DTYPES:
            command += ["--outtype", DTYPES[report.dtype]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not made.is_file():
            said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
            raise LoraflowError(
                f"{converter} failed on the checkpoint (status {done.returncode}); its last words: {said[-1]}. Export "
                "it as a merged checkpoint, and run the converter on that to see all that it says."
            )
        os.replace(made, target)
    return GgufReport(target, report.folded, dataclasses.replace(report, directory=None))


def checked_file(file: Path, overwrite: bool) -> Path:
    """Where the file goes.

    Raises:
        LoraflowError: if something is there that must not be replaced.
    """
    target = file.expanduser().resolve()
    if target.is_dir():
        raise LoraflowError(f"{file} is a directory, and GGUF is one file. Give a name, such as {file / 'model.gguf'}.")
    if not target.exists():
        return target
    with target.open("rb") as there:
        if there.read(len(_MAGIC)) != _MAGIC:
            raise LoraflowError(f"{file} is there and is no GGUF. Give another name.")
    if not overwrite:
        raise LoraflowError(f"{file} is there already. Give another name, or say `overwrite=True`.")
    return target


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise LoraflowError("GGUF needs the package `gguf`: pip install 'loraflow[gguf]'.") from error
    return gguf


def _architecture(model: Fusion) -> str:
    kind = model.base_record.model_type
    if kind not in ARCHITECTURES:
        raise ArchitectureError(
            f"A LoRA of a {kind!r} base was never read back from GGUF here, and llama.cpp may keep its weights in an "
            f"order of their own. {did_you_mean(kind, ARCHITECTURES)} Export it as a PEFT adapter, and run llama.cpp's "
            "convert_lora_to_gguf.py on that."
        )
    return ARCHITECTURES[kind]


def lora_tensors(model: Fusion, modules: Mapping[str, LoraModule], alpha: int) -> dict[str, Tensor]:
    """An adapter's tensors by llama.cpp's names, as it reads them.

    Args:
        model: the fusion that the adapter is of.
        modules: its updates, with scaling 1.
        alpha: what llama.cpp divides by each update's rank, and multiplies it with.

    Raises:
        LoraflowError: if one is a DoRA, has a bias, or has no name there.
    """
    gguf, config = _package(), model.base_model.config
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[_architecture(model)], config.num_hidden_layers)
    tensors = {}
    for name, module in modules.items():
        if module.magnitude is not None or (module.bias is not None and module.bias.any()):
            what = "DoRA's magnitudes" if module.magnitude is not None else "biases (`lora_bias`)"
            raise LoraflowError(f"'{name}' has {what}, of which GGUF knows nothing. Export a whole model instead.")
        place = names.get_name(name)
        if place is None:
            raise LoraflowError(f"llama.cpp has no tensor for '{name}'. Export a whole model instead.")
        lora_B = module.lora_B.double() * (module.rank / alpha)
        if config.model_type in _REORDERED:
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            leaf = name.rpartition(".")[2]
            lora_B = reordered(lora_B, heads[leaf]) if leaf in heads else lora_B
        tensors[f"{place}.weight.lora_a"] = module.lora_A
        tensors[f"{place}.weight.lora_b"] = lora_B.to(module.lora_B.dtype)
    return tensors


def reordered(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: the two halves of each head's rotary dimensions taken in turns."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tensor(gguf: Any, writer: Any, name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16: its bytes, as GGUF has them.
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
        return
    writer.add_tensor(name, tensor.contiguous().numpy())

"""`loraflow info`: what fits, how many parameters, how much memory, before anything heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from loraflow.cli import options as o
from loraflow.errors import LoraflowError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.adapters import Adapter

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "bnb-8bit": 1.0, "bnb-4bit": 0.55}


def info(
    fusion: o.Fusion = None,
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006 (typer reads the default)
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    quantization: o.Quantization = None,
) -> None:
    """Check which adapters fit a base, and count parameters and memory, without loading the base's weights.

    Examples: `loraflow info zh-math`; `loraflow info --base B --lora-modules zh=path math=path`
    """  # noqa: DOC501 (it is the --help text)
    from rich.console import Console

    from loraflow.adapters import AdapterSource, load_adapter
    from loraflow.errors import AdapterError

    console = Console()
    if fusion is not None:
        base, sources = _describe_fusion(fusion, base, o.parse_adapters(lora_modules), console)
    else:
        if base is None or not lora_modules:
            raise LoraflowError("Give a saved fusion, or --base and --lora-modules name=path ...")
        sources = {name: AdapterSource.parse(path) for name, path in o.parse_adapters(lora_modules).items()}

    from loraflow.adapters import match_adapter
    from loraflow.architecture import check_inside_layers, find_decoder_layers
    from loraflow.loading import BaseOptions, load_empty_base

    model = load_empty_base(base, BaseOptions(revision=revision))
    layers = find_decoder_layers(model)
    fitting: list[Adapter] = []
    refused: list[str] = []
    for name, source in sources.items():
        try:
            adapter = load_adapter(name, source)
            match_adapter(adapter, model)
            check_inside_layers(adapter, layers)
            fitting.append(adapter)
        except AdapterError as error:
            refused.append(str(error))
    console.print(
        f"base: {base} ({type(model).__name__}, {len(layers.layers)} layers, hidden size {layers.hidden_size})"
    )
    _adapter_table(fitting, console)
    for message in refused:
        console.print("[bold red]does not fit:[/] ", end="")
        print(message)
    if fitting:
        _count(model, layers, fitting, dtype, quantization, console)
    if refused:
        raise typer.Exit(1)


def _describe_fusion(
    fusion: str, base: str | None, moved: dict[str, str], console: Console
) -> tuple[str, dict[str, Any]]:
    from loraflow.adapters import AdapterSource
    from loraflow.storage import fetch_fusion, read_fusion, resolve_source

    directory = fetch_fusion(fusion, None)
    config, tensors = read_fusion(directory)
    learned = sum(tensor.numel() for tensor in tensors.values())
    console.print(
        f"fusion: {fusion}, method {config.method.name} {config.method.parameters}, {learned:,} learned values"
    )
    if config.training:
        shown = ("examples", "dev_examples", "steps", "train_loss", "dev_loss", "dev_score")
        summary = ", ".join(f"{key} {config.training[key]}" for key in shown if config.training.get(key) is not None)
        experts = {name: record["examples"] for name, record in config.training.get("experts", {}).items()}
        own = config.training.get("samples") or experts
        if own:
            summary = "on each adapter's own data, " + ", ".join(f"{name} {count}" for name, count in own.items())
        console.print(f"trained: {summary}")
    sources = {
        record.name: AdapterSource.parse(moved[record.name])
        if record.name in moved
        else AdapterSource(resolve_source(record.path, directory), record.revision)
        for record in config.adapters
    }
    return base or resolve_source(config.base.path, directory), sources


def _adapter_table(adapters: list[Adapter], console: Console) -> None:
    from rich.table import Table

    table = Table("adapter", "rank", "scaling", "targets", "modules", "parameters", "kind", box=None)
    for adapter in adapters:
        scalings = sorted({round(module.scaling, 4) for module in adapter.modules.values()})
        targets = sorted({name.rpartition(".")[2] for name in adapter.modules})
        config = adapter.config
        kinds = [
            name
            for name, on in (("DoRA", adapter.uses_dora), ("rsLoRA", config.use_rslora), ("bias", config.lora_bias))
            if on
        ]
        table.add_row(
            adapter.name,
            ", ".join(map(str, adapter.ranks)),
            ", ".join(f"{scaling:g}" for scaling in scalings),
            " ".join(targets),
            str(len(adapter.modules)),
            f"{adapter.parameters:,}",
            " ".join(kinds) or "LoRA",
        )
    console.print(table)


def _count(
    model: Any, layers: Any, adapters: list[Adapter], dtype: str, quantization: str | None, console: Console
) -> None:
    import torch

    from loraflow.attach import attach
    from loraflow.methods import LoraFlow

    total = sum(parameter.numel() for parameter in model.parameters())
    precision = str(model.config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype
    if precision not in _BYTES:
        raise LoraflowError(f"`--dtype` is unknown: {dtype!r}. {did_you_mean(dtype, o.DTYPES)}")
    names = [adapter.name for adapter in adapters]
    if any(adapter.uses_dora for adapter in adapters):
        # DoRA needs the base's real weights, which are not here; its gates are counted without it.
        console.print("gates: not counted for DoRA adapters before the base is loaded")
    else:
        attachment = attach(model, layers, adapters)
        for granularity in ("step", "layer", "module"):
            gates = attachment.make_gates(LoraFlow(granularity=granularity, start="average"))
            count = sum(parameter.numel() for gate in gates.values() for parameter in gate.parameters())
            console.print(f"gates, {granularity:6} ({len(names)} adapters): {count:,} values in {len(gates)}")
    base_bytes = total * _BYTES[quantization or precision]
    adapter_bytes = sum(adapter.parameters for adapter in adapters) * _BYTES[precision]
    label = f"{quantization} base" if quantization else precision
    console.print(f"memory for weights ({label}): base {_size(base_bytes)}, adapters {_size(adapter_bytes)}")


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

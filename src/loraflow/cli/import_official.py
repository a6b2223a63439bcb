"""`loraflow import-official`: gates that LoRA-Flow's authors trained, as a fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraflow.cli import options as o
from loraflow.errors import LoraflowError


def import_official(
    gate: Annotated[Path, typer.Argument(help="The gate file (.pt) of thunlp/LoRAFlow.")],
    output: Annotated[Path, typer.Option("--output", help="Directory for the fusion.")],
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006 (typer reads the default)
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            help="Divisor of the gates' logits, which the file does not hold: 1.1 for the authors' zh-math and ru-math "
            "gates, else 1.",
        ),
    ] = 1.0,
    overwrite: o.Overwrite = False,
    copy_adapters: Annotated[
        bool,
        typer.Option("--copy-adapters", help="Copy local adapters into --output, so that it can be moved as it is."),
    ] = False,
    system_prompt: o.SystemPrompt = None,
    prompt_template: o.PromptTemplate = None,
    chat_template: o.ChatTemplate = None,
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    quantization: o.Quantization = None,
) -> None:
    """Turn a gate file of LoRA-Flow's official code into a fusion, to be used as one fitted here.

    The adapters must be PEFT adapters of the gate's own base, and come in the order of its rows: language, then task.

    Example: `loraflow import-official zh_math.pt --base meta-llama/Llama-2-7b-hf --lora-modules language=zh-lora
    task=math-lora --temperature 1.1 --output zh-math`
    """  # noqa: DOC501 (it is the --help text)
    from rich.console import Console

    o.check_output(output, overwrite=overwrite, makes="fusion")
    adapters = o.parse_adapters(lora_modules)
    if base is None or not adapters:
        missing = "--base" if base is None else "--lora-modules"
        raise LoraflowError(f"`{missing}` is missing. Give --base and --lora-modules language=path task=path.")
    prompt = o.prompt_format(system_prompt, prompt_template, chat_template)
    options = o.Placement(revision, dtype, device, quantization).options()

    from loraflow.official import load_official

    model = load_official(gate, base, adapters, temperature=temperature, prompt=prompt, options=options)
    model.save_pretrained(output, copy_adapters=copy_adapters)
    Console(stderr=True).print(
        f"{len(model.gates)} gates for {', '.join(model.adapter_names)}, saved to {output}; "
        f"try: loraflow generate {output} --prompt '...'",
        soft_wrap=True,
    )

"""`loraflow import-official`: gates that LoRA-Flow's authors trained, as a fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraflow.cli.groups import with_groups
from loraflow.cli.recipe import Overwrite, check_output
from loraflow.cli.sources import CopyAdapters, Sources
from loraflow.cli.texts import PromptOptions


@with_groups
def import_official(
    *,
    gate: Annotated[Path, typer.Argument(help="The gate file (.pt) of thunlp/LoRAFlow.")],
    output: Annotated[Path, typer.Option("--output", help="Directory for the fusion.")],
    sources: Sources,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            help="Divisor of the gates' logits, which the file does not hold: 1.1 for the authors' zh-math and ru-math "
            "gates, else 1.",
        ),
    ] = 1.0,
    overwrite: Overwrite = False,
    copy_adapters: CopyAdapters = False,
    prompt: PromptOptions,
) -> None:
    """Turn a gate file of LoRA-Flow's official code into a fusion, to be used as one fitted here.

    The adapters must be PEFT adapters of the gate's own base, and come in the order of its rows: language, then task.

    Example: `loraflow import-official zh_math.pt --base meta-llama/Llama-2-7b-hf --lora-modules language=zh-lora
    task=math-lora --temperature 1.1 --output zh-math`
    """
    from rich.console import Console

    check_output(output, overwrite=overwrite, makes="fusion")
    base, _ = sources.both("language=path task=path.")
    adapters = sources.paths()
    format_, options = prompt.format(), sources.placement.options()

    from loraflow.official import load_official

    model = load_official(gate, base, adapters, temperature=temperature, prompt=format_, options=options)
    model.save_pretrained(output, copy_adapters=copy_adapters)
    Console(stderr=True).print(
        f"{len(model.gates)} gates for {', '.join(model.adapter_names)}, saved to {output}; "
        f"try: loraflow generate {output} --prompt '...'",
        soft_wrap=True,
    )

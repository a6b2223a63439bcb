"""`loraflow finetune`: the baseline that trains weights instead of fusing, on the same examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraflow.cli import options as o
from loraflow.cli import training_options as t
from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.training.finetuning import FinetuneResult

_ADAPTER = "Adapter (the defaults are the paper's)"


def finetune(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Training examples, one JSON object a line: `prompt` and `completion`, or `messages`.",
            rich_help_panel=t.DATA,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Directory for the adapter.", rich_help_panel=t.DATA)],
    base: o.Base = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            help="Existing adapter to train further: a directory, `user/repo` or `user/repo/subfolder`.  "
            "[default: none, a new one]",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Rank of a new adapter.  [default: 64]", rich_help_panel=_ADAPTER)
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha", help="Its updates are scaled by alpha / rank.  [default: 16]", rich_help_panel=_ADAPTER
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option("--dropout", help="On its input while training.  [default: 0.1]", rich_help_panel=_ADAPTER),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            "--target-modules",
            help="Modules that it adapts, such as q_proj,v_proj.  [default: all-linear]",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    dev: t.Dev = None,
    prompt_field: t.PromptField = None,
    completion_field: t.CompletionField = None,
    dev_prompt_field: t.DevPromptField = None,
    dev_completion_field: t.DevCompletionField = None,
    resume: t.Resume = False,
    keep_checkpoints: t.KeepCheckpoints = False,
    overwrite: o.Overwrite = False,
    epochs: t.Epochs = 5,
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Go on for so many steps, whatever --epochs says.  [default: none]", rich_help_panel=t.RECIPE
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.", rich_help_panel=t.RECIPE)] = 2e-4,
    batch_size: t.BatchSize = 4,
    gradient_accumulation: t.GradientAccumulation = 1,
    warmup: t.Warmup = 0.2,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=t.RECIPE)] = 0.1,
    max_length: t.MaxLength = None,
    gradient_checkpointing: t.GradientCheckpointing = False,
    checkpoint_steps: t.CheckpointSteps = None,
    seed: Annotated[
        int, typer.Option(help="Of a new adapter, the examples' order, and dropout.", rich_help_panel=t.RECIPE)
    ] = 0,
    system_prompt: o.SystemPrompt = None,
    prompt_template: o.PromptTemplate = None,
    chat_template: o.ChatTemplate = None,
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    quantization: o.Quantization = None,
) -> None:
    """Train a LoRA on a few examples, to compare with a fusion fitted on them.

    A new adapter, or with --adapter an existing one further; the base stays as it is. The result in --output is an
    ordinary PEFT adapter.

    Example: `loraflow finetune --base meta-llama/Llama-2-7b-hf --adapter user/math-lora --data train.jsonl
    --dev dev.jsonl --output math-tuned`
    """  # noqa: DOC501 (it is the --help text)
    from rich.console import Console

    from loraflow.examples import read_examples

    console = Console(stderr=True)
    # Cheap checks come before the model is loaded.
    o.check_output(output, overwrite=overwrite or resume, makes="adapter")
    if base is None:
        raise LoraflowError("`--base` is missing. Give the base model's Hub id or directory.")
    new = {"--rank": rank, "--alpha": alpha, "--dropout": dropout, "--target-modules": target_modules}
    given = [flag for flag, value in new.items() if value is not None]
    if adapter is not None and given:
        raise LoraflowError(f"`{given[0]}` describes a new adapter, and --adapter is an existing one. Leave one out.")
    examples = read_examples(data, t.fields(prompt_field, completion_field))
    dev_fields = t.fields(dev_prompt_field or prompt_field, dev_completion_field or completion_field)
    dev_examples = read_examples(dev, dev_fields) if dev is not None else None
    prompt = o.prompt_format(system_prompt, prompt_template, chat_template)

    from loraflow import training
    from loraflow.training.config import LoraSettings
    from loraflow.training.finetuning import finetune as run

    config = training.FitConfig(
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        warmup=warmup,
        weight_decay=weight_decay,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        checkpoint_steps=checkpoint_steps,
        seed=seed,
    )
    targets = [name.strip() for name in target_modules.split(",")] if target_modules is not None else None
    settings = {"r": rank, "alpha": alpha, "dropout": dropout, "target_modules": _targets(targets)}
    lora = LoraSettings(**{name: value for name, value in settings.items() if value is not None})  # type: ignore[arg-type]
    checkpoints = output / "checkpoints"
    result = run(
        base,
        examples,
        output,
        adapter=adapter,
        lora=None if adapter is not None else lora,
        dev=dev_examples,
        config=config,
        prompt=prompt,
        checkpoints=checkpoints,
        resume=resume,
        console=console,
        options=o.Placement(revision, dtype, device, quantization).options(),
    )
    if not keep_checkpoints:
        training.remove_checkpoints(checkpoints)
    _report(console, result, base, len(examples))


def _targets(names: list[str] | None) -> str | list[str] | None:
    return "all-linear" if names == ["all-linear"] else names


def _report(console: Console, result: FinetuneResult, base: str, count: int) -> None:
    console.print(
        f"{result.parameters:,} values, {result.steps} steps in {result.seconds:.0f} s; "
        f"train loss {result.train_loss:.4f}"
    )
    if result.dev_loss is not None:
        console.print(f"kept step {result.kept_step}: dev loss {result.dev_loss:.4f}")
    if result.truncated:
        shown = ", ".join(result.truncated[:5]) + (", ..." if len(result.truncated) > 5 else "")
        console.print(f"[yellow]{len(result.truncated)} of {count} examples were cut to the longest length:[/] {shown}")
    console.print(
        f"saved to {result.output}; try: loraflow generate --base {base} --lora-modules tuned={result.output} "
        "--method tuned --prompt '...'",
        soft_wrap=True,
    )

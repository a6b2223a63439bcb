"""`loraflow fit`: learn a fusion from a few examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli import options as o
from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.examples import Example, Fields
    from loraflow.training import FitResult

_DATA = "Data"
_RECIPE = "Recipe (the defaults are the paper's)"


def fit(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Training examples, one JSON object a line: `prompt` and `completion`, or `messages`. 200 are enough.",
            rich_help_panel=_DATA,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Directory for the fusion.", rich_help_panel=_DATA)],
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006 (typer reads the default)
    method: o.Method = "lora-flow",
    method_option: o.MethodOptions = [],  # noqa: B006
    dev: Annotated[
        Path | None,
        typer.Option("--dev", help="Examples on which the best checkpoint is chosen.", rich_help_panel=_DATA),
    ] = None,
    prompt_field: Annotated[
        str | None,
        typer.Option(
            "--prompt-field",
            help="Field that is the prompt; `data.0` is the first item of the list `data`.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    completion_field: Annotated[
        str | None, typer.Option("--completion-field", help="Field that is the completion.", rich_help_panel=_DATA)
    ] = None,
    dev_prompt_field: Annotated[
        str | None,
        typer.Option("--dev-prompt-field", help="The same for --dev, where its fields differ.", rich_help_panel=_DATA),
    ] = None,
    dev_completion_field: Annotated[
        str | None,
        typer.Option(
            "--dev-completion-field", help="The same for --dev, where its fields differ.", rich_help_panel=_DATA
        ),
    ] = None,
    dev_metric: Annotated[
        str,
        typer.Option(
            "--dev-metric",
            help="What decides on --dev: loss, or a score of generated answers: exact-match, last-number, code-tests.",
            rich_help_panel=_DATA,
        ),
    ] = "loss",
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="Let code-tests run generated code, in a sandbox.", rich_help_panel=_DATA),
    ] = False,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Try the paper's grid of learning rates (1e-3, 1e-4) and batch sizes (2, 4, 8) and keep what is best "
            "on --dev.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after an interruption, from the last checkpoint in --output.")
    ] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep them after a finished fit.")
    ] = False,
    copy_adapters: Annotated[
        bool,
        typer.Option("--copy-adapters", help="Copy local adapters into --output, so that it can be moved as it is."),
    ] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the examples.", rich_help_panel=_RECIPE)] = 5,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.", rich_help_panel=_RECIPE)] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.", rich_help_panel=_RECIPE)] = 4,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Forwards in a step; must divide the batch size.", rich_help_panel=_RECIPE)
    ] = 1,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps with a rising learning rate.", rich_help_panel=_RECIPE)
    ] = 0.2,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=_RECIPE)] = 0.1,
    adapter_dropout: Annotated[
        float, typer.Option(help="Dropout on the adapters' input while fitting.", rich_help_panel=_RECIPE)
    ] = 0.0,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Longest example in tokens; longer ones are cut and reported.  [default: the model's, at most 2048]",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_RECIPE)
    ] = False,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.  [default: an epoch]", rich_help_panel=_RECIPE)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer when --dev-metric is a score.", rich_help_panel=_RECIPE)
    ] = 512,
    seed: Annotated[int, typer.Option(help="Of the examples' order, and of dropout.", rich_help_panel=_RECIPE)] = 0,
    system_prompt: o.SystemPrompt = None,
    prompt_template: o.PromptTemplate = None,
    chat_template: o.ChatTemplate = None,
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    quantization: o.Quantization = None,
) -> None:
    """Learn a fusion of adapters from a few examples.

    Base and adapters stay frozen; only the method's gates are learned, and saved in --output with everything that is
    needed to load them.

    Example: `loraflow fit --base meta-llama/Llama-2-7b-hf --lora-modules zh=user/zh-lora math=user/math-lora
    --data train.jsonl --dev dev.jsonl --output zh-math`
    """  # noqa: DOC501 (it is the --help text)
    from rich.console import Console

    from loraflow.evaluation.sandbox import check_available
    from loraflow.evaluation.scoring import get_scorer
    from loraflow.examples import read_examples

    console = Console(stderr=True)
    # Cheap checks come before the model is loaded.
    examples = read_examples(data, _fields(prompt_field, completion_field))
    dev_fields = _fields(dev_prompt_field or prompt_field, dev_completion_field or completion_field)
    dev_examples = read_examples(dev, dev_fields) if dev is not None else None
    if dev_examples is None and (search or dev_metric != "loss"):
        raise LoraflowError(
            f"`{'--search' if search else '--dev-metric'}` needs dev examples to decide on. Give --dev."
        )
    score = get_scorer(dev_metric, allow_code=allow_code) if dev_metric != "loss" else None
    if dev_metric == "code-tests":
        check_available()
    prompt = o.prompt_format(system_prompt, prompt_template, chat_template)
    o.parse_adapters(lora_modules)

    from loraflow import training

    config = training.FitConfig(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        warmup=warmup,
        weight_decay=weight_decay,
        adapter_dropout=adapter_dropout,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        checkpoint_steps=checkpoint_steps,
        score_max_new_tokens=max_new_tokens,
        seed=seed,
    )
    placement = o.Placement(revision, dtype, device, quantization)
    model = o.build_model(base, lora_modules, method, method_option, prompt, placement)
    console.print(
        f"{len(examples)} examples, {model.num_learned_parameters():,} values to learn in {len(model.gates)} gates"
    )
    checkpoints = output / "checkpoints"
    # What fitting and searching take alike.
    common: dict[str, Any] = {
        "config": config,
        "score": score,
        "checkpoints": checkpoints,
        "resume": resume,
        "console": console,
    }
    if search:
        assert dev_examples is not None
        result = training.search(model, examples, dev=dev_examples, **common)
    else:
        result = training.fit(model, examples, dev=dev_examples, **common)
    model.save_pretrained(output, copy_adapters=copy_adapters)
    if not keep_checkpoints:
        training.remove_checkpoints(checkpoints)
    _report(console, result, output, examples)


def _fields(prompt: str | None, completion: str | None) -> Fields | None:
    from loraflow.examples import Fields

    if (prompt is None) != (completion is None):
        raise LoraflowError("`--prompt-field` and `--completion-field` go together. Give both, or neither.")
    return None if prompt is None or completion is None else Fields(prompt, completion)


def _report(console: Console, result: FitResult, output: Path, examples: list[Example]) -> None:
    start = ", ".join(f"{name} {weight:g}" for name, weight in result.start.items())
    console.print(
        f"started at {start}; {result.steps} steps in {result.seconds:.0f} s; train loss {result.train_loss:.4f}"
    )
    if result.dev_loss is not None:
        score = f", score {result.dev_score:.3f}" if result.dev_score is not None else ""
        console.print(f"kept step {result.kept_step}: dev loss {result.dev_loss:.4f}{score}")
    if result.truncated:
        shown = ", ".join(result.truncated[:5]) + (", ..." if len(result.truncated) > 5 else "")
        console.print(
            f"[yellow]{len(result.truncated)} of {len(examples)} examples were cut to the longest length:[/] {shown}"
        )
    console.print(f"saved to {output}; try: loraflow generate {output} --prompt '...'", soft_wrap=True)

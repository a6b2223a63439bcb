"""`loraflow fit`: learn a fusion from a few examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli import options as o
from loraflow.cli import training_options as t
from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.examples import Example, Fields
    from loraflow.model import FusedModel
    from loraflow.training import FitResult


# What each way to learn cannot use.
_BY_STEPS = ("epochs", "max_steps", "learning_rate", "gradient_accumulation", "warmup", "weight_decay")
_OF_TRAINING = (*_BY_STEPS, "adapter_dropout", "gradient_checkpointing", "checkpoint_steps")
_UNUSED: dict[str, tuple[str, ...]] = {
    "gradient": (),
    "search": ("search", *_OF_TRAINING),
    "experts": ("search", "dev", "dev_metric", "max_new_tokens", "dev_prompt_field", "dev_completion_field"),
    "samples": (
        *("search", "dev", "dev_metric", "max_new_tokens", "dev_prompt_field", "dev_completion_field", "resume"),
        *(*_OF_TRAINING, "batch_size", "max_length", "seed", "keep_checkpoints"),
    ),
}


def fit(
    context: typer.Context,
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Training examples, one JSON object a line: `prompt` and `completion`, or `messages`. 200 are enough.",
            rich_help_panel=t.DATA,
        ),
    ] = None,
    adapter_data: Annotated[
        list[str],
        typer.Option(
            "--adapter-data",
            help="For methods that learn from each adapter's own data (phatgoose, centroid): `name=path` of such a "
            "file for every adapter, several after one flag.",
            rich_help_panel=t.DATA,
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default)
    output: Annotated[Path, typer.Option("--output", help="Directory for the fusion.", rich_help_panel=t.DATA)],
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006
    method: o.Method = "lora-flow",
    method_option: o.MethodOptions = [],  # noqa: B006
    dev: t.Dev = None,
    prompt_field: t.PromptField = None,
    completion_field: t.CompletionField = None,
    dev_prompt_field: t.DevPromptField = None,
    dev_completion_field: t.DevCompletionField = None,
    dev_metric: Annotated[
        str,
        typer.Option(
            "--dev-metric",
            help="What decides on --dev: loss, or a score of generated answers: exact-match, last-number, code-tests.",
            rich_help_panel=t.DATA,
        ),
    ] = "loss",
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="Let code-tests run generated code, in a sandbox.", rich_help_panel=t.DATA),
    ] = False,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Try the method's learning rate and a tenth of it with batches of 2, 4 and 8 (the paper's grid), and "
            "keep what is best on --dev.",
        ),
    ] = False,
    resume: t.Resume = False,
    keep_checkpoints: t.KeepCheckpoints = False,
    overwrite: o.Overwrite = False,
    copy_adapters: Annotated[
        bool,
        typer.Option("--copy-adapters", help="Copy local adapters into --output, so that it can be moved as it is."),
    ] = False,
    epochs: t.Epochs = 5,
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Go on for so many steps, whatever --epochs says.  [default: none; phatgoose 100]",
            rich_help_panel=t.RECIPE,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak of the cosine schedule.  [default: 1e-3; learned-static 1e-2, phatgoose 5e-3]",
            rich_help_panel=t.RECIPE,
        ),
    ] = None,
    batch_size: t.BatchSize = 4,
    gradient_accumulation: t.GradientAccumulation = 1,
    warmup: t.Warmup = 0.2,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="AdamW's.  [default: 0.1; learned-static, phatgoose 0]", rich_help_panel=t.RECIPE),
    ] = None,
    adapter_dropout: Annotated[
        float, typer.Option(help="Dropout on the adapters' input while fitting.", rich_help_panel=t.RECIPE)
    ] = 0.0,
    max_length: t.MaxLength = None,
    gradient_checkpointing: t.GradientCheckpointing = False,
    checkpoint_steps: t.CheckpointSteps = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer when --dev-metric is a score.", rich_help_panel=t.RECIPE)
    ] = 512,
    seed: Annotated[int, typer.Option(help="Of the examples' order, and of dropout.", rich_help_panel=t.RECIPE)] = 0,
    system_prompt: o.SystemPrompt = None,
    prompt_template: o.PromptTemplate = None,
    chat_template: o.ChatTemplate = None,
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    quantization: o.Quantization = None,
) -> None:
    """Learn a fusion of adapters from a few examples.

    Base and adapters stay frozen; only what the method learns is trained, and saved in --output with everything that is
    needed to load it. Methods: lora-flow (gates, by gradient), learned-static (constant weights, by gradient), lorahub
    (one weight for each adapter, by gradient-free search); and from each adapter's own data instead of examples of the
    task: phatgoose, centroid.

    Examples: `loraflow fit --base meta-llama/Llama-2-7b-hf --lora-modules zh=user/zh-lora math=user/math-lora
    --data train.jsonl --dev dev.jsonl --output zh-math`; `--method lorahub --method-option budget=40`;
    `--method phatgoose --adapter-data zh=zh.jsonl math=math.jsonl`
    """  # noqa: DOC501 (it is the --help text)
    from rich.console import Console

    from loraflow.evaluation.sandbox import check_available
    from loraflow.evaluation.scoring import get_scorer
    from loraflow.examples import read_examples

    console = Console(stderr=True)
    # Cheap checks come before the model is loaded.
    o.check_output(output, overwrite=overwrite or resume, makes="fusion")
    adapters = o.parse_adapters(lora_modules)
    resolved = o.resolve_method(method or "lora-flow", list(adapters), method_option)
    given = {name for name in context.params if _is_given(context, name)}
    _refuse_unused(given, resolved)
    _refuse_idle(given, search=search, dev=dev, dev_metric=dev_metric)
    fields = t.fields(prompt_field, completion_field)
    examples = _examples(resolved, data, adapter_data, list(adapters), fields)
    dev_fields = t.fields(dev_prompt_field or prompt_field, dev_completion_field or completion_field)
    dev_examples = read_examples(dev, dev_fields) if dev is not None else None
    if dev_examples is None and (search or dev_metric != "loss"):
        raise LoraflowError(
            f"`{'--search' if search else '--dev-metric'}` needs dev examples to decide on. Give --dev."
        )
    score = get_scorer(dev_metric, allow_code=allow_code) if dev_metric != "loss" else None
    if dev_metric == "code-tests":
        check_available()
    prompt = o.prompt_format(system_prompt, prompt_template, chat_template)

    from loraflow import training

    # What is left open is as the method's own source has it.
    asked = {"max_steps": max_steps, "learning_rate": learning_rate, "weight_decay": weight_decay}
    # Epochs that are asked for are not to lose against steps of the method's own.
    by_epochs = "epochs" in given and max_steps is None
    settings = {
        name: value for name, value in asked.items() if value is not None or (name == "max_steps" and by_epochs)
    }
    config = training.FitConfig.for_method(
        resolved,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        warmup=warmup,
        adapter_dropout=adapter_dropout,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        checkpoint_steps=checkpoint_steps,
        score_max_new_tokens=max_new_tokens,
        seed=seed,
        **settings,
    )
    placement = o.Placement(revision, dtype, device, quantization)
    model = o.build_model(base, lora_modules, resolved, prompt, placement)
    count = sum(map(len, examples.values())) if isinstance(examples, dict) else len(examples)
    gates = "1 gate" if len(model.gates) == 1 else f"{len(model.gates)} gates"
    console.print(f"{count} examples, {model.num_learned_parameters():,} values to learn in {gates}")
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
        assert not isinstance(examples, dict)
        result = training.search(model, examples, dev=dev_examples, **common)
    else:
        result = training.fit(model, examples, dev=dev_examples, **common)
    model.save_pretrained(output, copy_adapters=copy_adapters)
    if not keep_checkpoints:
        training.remove_checkpoints(checkpoints)
    _report(console, model, result, output, count)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_unused(given: set[str], method: Any) -> None:
    if method.learns is None:
        raise LoraflowError(f"The method {method.name!r} learns nothing: there is nothing to fit. Use it as it is.")
    for name in _UNUSED.get(method.learns, ()):
        if name in given:
            raise LoraflowError(f"The method {method.name!r} has no use for --{name.replace('_', '-')}. Leave it out.")


def _refuse_idle(given: set[str], *, search: bool, dev: Path | None, dev_metric: str) -> None:
    """Refuse options that others make idle."""
    reasons = {
        "learning_rate": "--search tries rates of its own" if search else "",
        "batch_size": "--search tries sizes of its own" if search else "",
        "dev_prompt_field": "" if dev is not None else "there is no --dev",
        "dev_completion_field": "" if dev is not None else "there is no --dev",
        "allow_code": "" if dev_metric == "code-tests" else "--dev-metric is not code-tests",
        "max_new_tokens": "" if dev_metric != "loss" else "--dev-metric is the loss, which generates nothing",
    }
    for name, reason in reasons.items():
        if reason and name in given:
            raise LoraflowError(f"`--{name.replace('_', '-')}` has no effect: {reason}. Leave it out.")


def _examples(
    method: Any, data: Path | None, adapter_data: list[str], adapters: list[str], fields: Fields | None
) -> list[Example] | dict[str, list[Example]]:
    """The examples that a method learns from."""
    from loraflow.errors import did_you_mean
    from loraflow.examples import read_examples

    if method.learns not in ("experts", "samples"):
        if data is None or adapter_data:
            raise LoraflowError(f"The method {method.name!r} learns from examples of the task. Give them with --data.")
        return read_examples(data, fields)
    own = o.parse_adapters(adapter_data, "--adapter-data")
    for name in own:
        if name not in adapters:
            raise LoraflowError(f"`--adapter-data` names the unknown adapter {name!r}. {did_you_mean(name, adapters)}")
    missing = [name for name in adapters if name not in own]
    if data is not None or missing:
        wanted = " ".join(f"{name}=FILE" for name in adapters)
        raise LoraflowError(
            f"The method {method.name!r} learns from each adapter's own data. Give it with --adapter-data {wanted}, "
            "and no --data."
        )
    return {name: read_examples(own[name], fields) for name in adapters}


def _report(console: Console, model: FusedModel, result: FitResult, output: Path, count: int) -> None:
    start = ", ".join(f"{name} {weight:g}" for name, weight in result.start.items())
    parts = [f"started at {start}"] if start else []
    unit = "evaluations" if model.method.learns == "search" else "steps"
    parts.append(f"{result.steps} {unit} in {result.seconds:.0f} s" if result.steps else f"{result.seconds:.0f} s")
    if result.train_loss is not None:
        parts.append(f"train loss {result.train_loss:.4f}")
    console.print("; ".join(parts))
    if model.method.level == "task" and model.method.place == "model":
        weights = next(iter(model.state_dict().values())).tolist()
        shown = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(model.adapter_names, weights, strict=True))
        console.print(f"weights: {shown}")
    if result.dev_loss is not None:
        score = f", score {result.dev_score:.3f}" if result.dev_score is not None else ""
        kept = f"kept step {result.kept_step}: " if model.method.learns == "gradient" else ""
        console.print(f"{kept}dev loss {result.dev_loss:.4f}{score}")
    if result.truncated:
        origins = ", ".join(result.truncated[:5]) + (", ..." if len(result.truncated) > 5 else "")
        console.print(
            f"[yellow]{len(result.truncated)} of {count} examples were cut to the longest length:[/] {origins}"
        )
    console.print(f"saved to {output}; try: loraflow generate {output} --prompt '...'", soft_wrap=True)

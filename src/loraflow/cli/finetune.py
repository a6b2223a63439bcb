"""`loraflow finetune`: the baseline that trains weights instead of fusing, on the same examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from loraflow.cli.groups import Given, panel, with_groups
from loraflow.cli.mixtures import read_mixture
from loraflow.cli.recipe import Room, Run, Steps, check_output, print_cut, recipe_option
from loraflow.cli.sources import Base, Placement
from loraflow.cli.texts import DevExamples, PromptOptions, TrainOn, data_option
from loraflow.errors import LoraflowError
from loraflow.training.config import LEARNING_RATE, FitConfig, LoraSettings

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.training import FinetuneResult

_adapter = panel("Adapter (the defaults are the paper's)")


@dataclass(frozen=True)
class AdapterOptions:
    """The adapter that is trained; the names of a new one's options are those of `LoraSettings`."""

    adapter: Annotated[
        str | None,
        _adapter(
            "--adapter",
            help="Existing adapter to train further: a directory, `user/repo` or `user/repo/subfolder`.  "
            "[default: none, a new one]",
        ),
    ] = None
    r: Annotated[int, _adapter("--rank", help="Rank of a new adapter.")] = LoraSettings.r
    alpha: Annotated[float, _adapter("--alpha", help="Its updates are scaled by alpha / rank.")] = LoraSettings.alpha
    dropout: Annotated[float, _adapter("--dropout", help="On its input while training.")] = LoraSettings.dropout
    target_modules: Annotated[
        str, _adapter("--target-modules", help="Modules that it adapts, such as q_proj,v_proj.")
    ] = str(LoraSettings.target_modules)

    def settings(self, given: Given) -> LoraSettings | None:
        """What a new adapter is like; None for an existing one.

        Raises:
            LoraflowError: if an existing one is described.
        """
        settings: dict[str, Any] = given.settings(LoraSettings)
        if self.adapter is not None:
            for flag in given.flags(settings):
                raise LoraflowError(
                    f"`{flag}` describes a new adapter, and --adapter is an existing one. Leave one out."
                )
            return None
        names = [name.strip() for name in self.target_modules.split(",")]
        return LoraSettings(**{**settings, "target_modules": names[0] if names == ["all-linear"] else names})


@dataclass(frozen=True)
class FinetuneSteps(Steps):
    """The steps of an optimiser, with the defaults of a fine-tuning."""

    max_steps: Annotated[
        int | None, recipe_option(help="Go on for so many steps, whatever --epochs says.  [default: none]")
    ] = FitConfig.max_steps
    learning_rate: Annotated[float, recipe_option(help="Peak of the cosine schedule.")] = LEARNING_RATE
    weight_decay: Annotated[float, recipe_option(help="AdamW's.")] = FitConfig.weight_decay


@with_groups
def finetune(
    *,
    given: Given,
    data: Annotated[
        list[str],
        data_option(
            "--data",
            help="Training examples, as `loraflow fit` reads them; several after one flag are mixed, "
            "`a.jsonl=0.7 b.csv=0.3` in these proportions.",
        ),
    ],
    output: Annotated[Path, data_option("--output", help="Directory for the adapter.")],
    base: Base = None,
    adapter: AdapterOptions,
    dev: DevExamples,
    run: Run,
    steps: FinetuneSteps,
    room: Room,
    seed: Annotated[
        int, recipe_option(help="Of a new adapter, the examples' order, dropout, and what a mixture takes.")
    ] = FitConfig.seed,
    train_on: TrainOn = FitConfig.train_on,
    prompt: PromptOptions,
    placement: Placement,
) -> None:
    """Train a LoRA on a few examples, to compare with a fusion fitted on them.

    A new adapter, or with --adapter an existing one further; the base stays as it is. The result in --output is an
    ordinary PEFT adapter.

    Example: `loraflow finetune --base meta-llama/Llama-2-7b-hf --adapter user/math-lora --data train.jsonl
    --dev dev.jsonl --output math-tuned`
    """  # noqa: DOC501 (it is the --help text)
    from rich.console import Console

    console = Console(stderr=True)
    # Cheap checks come before the model is loaded.
    check_output(output, overwrite=run.overwrite or run.resume, makes="adapter")
    if base is None:
        raise LoraflowError("`--base` is missing. Give the base model's Hub id or directory.")
    lora = adapter.settings(given)
    examples = read_mixture(data, dev.names.fields(), seed)
    dev_examples, format_ = dev.read(), prompt.format()
    config = FitConfig(**{"learning_rate": steps.learning_rate, **given.settings(FitConfig)})

    from loraflow import training

    checkpoints = output / "checkpoints"
    result = training.finetune(
        base,
        examples,
        output,
        adapter=adapter.adapter,
        lora=lora,
        dev=dev_examples,
        config=config,
        prompt=format_,
        checkpoints=checkpoints,
        resume=run.resume,
        console=console,
        options=placement.options(),
    )
    if not run.keep_checkpoints:
        training.remove_checkpoints(checkpoints)
    _report(console, result, base, len(examples))


def _report(console: Console, result: FinetuneResult, base: str, count: int) -> None:
    console.print(
        f"{result.parameters:,} values, {result.steps} steps in {result.seconds:.0f} s; "
        f"train loss {result.train_loss:.4f}"
    )
    if result.dev_loss is not None:
        console.print(f"kept step {result.kept_step}: dev loss {result.dev_loss:.4f}")
    print_cut(console, result.truncated, count)
    console.print(
        f"saved to {result.output}; try: loraflow generate --base {base} --lora-modules tuned={result.output} "
        "--method tuned --prompt '...'",
        soft_wrap=True,
    )

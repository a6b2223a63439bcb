"""`loraflow finetune`: the baseline that trains weights instead of fusing, on the same examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from loraflow.cli.devices import Devices, Shard, join, launch, placed
from loraflow.cli.groups import Given, panel, with_groups
from loraflow.cli.mixtures import read_mixture
from loraflow.cli.recipe import Room, Run, Steps, held_output, print_cut, recipe_option
from loraflow.cli.sources import Base, Placement
from loraflow.cli.texts import DevExamples, PromptOptions, TrainOn, data_option
from loraflow.errors import LoraflowError
from loraflow.files import is_first_process
from loraflow.training.config import LEARNING_RATE, FitConfig, LoraSettings

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.model import FusedModel
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
    on: Annotated[
        str | None,
        _adapter(
            "--on",
            help="Train a new one on top of a saved fusion, which stays as it is, or of an adapter: a directory, or "
            "`name=path`. --output is the fusion with it then.  [default: on the base]",
        ),
    ] = None
    name: Annotated[str, _adapter("--name", help="What it is called in the fusion, with --on.")] = "tuned"
    r: Annotated[int, _adapter("--rank", help="Rank of a new adapter.")] = LoraSettings.r
    alpha: Annotated[float, _adapter("--alpha", help="Its updates are scaled by alpha / rank.")] = LoraSettings.alpha
    dropout: Annotated[float, _adapter("--dropout", help="On its input while training.")] = LoraSettings.dropout
    target_modules: Annotated[
        str, _adapter("--target-modules", help="Modules that it adapts, such as q_proj,v_proj.")
    ] = str(LoraSettings.target_modules)

    def settings(self, given: Given) -> LoraSettings | None:
        """What a new adapter is like; None for an existing one.

        Raises:
            LoraflowError: if an existing one is described, or is to be on top of something.
        """
        settings: dict[str, Any] = given.settings(LoraSettings)
        if self.on is None and "name" in given:
            raise LoraflowError(
                f"`--name` (={self.name!r}) is of an adapter on top of a fusion. Give --on, or no name."
            )
        if self.on is not None and self.adapter is not None:
            raise LoraflowError("`--on` trains a new adapter, and --adapter is an existing one. Leave one out.")
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

    min_steps: Annotated[int, recipe_option(help="Go on for so many at least, over more epochs of few examples.")] = (
        FitConfig.min_steps
    )
    max_steps: Annotated[
        int | None, recipe_option(help="Go on for so many steps, whatever --epochs says.  [default: none]")
    ] = FitConfig.max_steps
    learning_rate: Annotated[float, recipe_option(help="Peak of the schedule.")] = LEARNING_RATE
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
    devices: Devices = None,
    shard: Shard = False,
    seed: Annotated[
        int, recipe_option(help="Of a new adapter, the examples' order, dropout, and what a mixture takes.")
    ] = FitConfig.seed,
    train_on: TrainOn = FitConfig.train_on,
    prompt: PromptOptions,
    placement: Placement,
) -> None:
    """Train a LoRA on a few examples, to compare with a fusion fitted on them.

    A new adapter, or with --adapter an existing one further; the base stays as it is. The result in --output is an
    ordinary PEFT adapter. With --on, a new one on top of a fusion or of an adapter, and the result is a fusion.

    Example: `loraflow finetune --base meta-llama/Llama-2-7b-hf --adapter user/math-lora --data train.jsonl
    --dev dev.jsonl --output math-tuned`
    """
    console = join(devices, placement.device)
    # Cheap checks come before the model is loaded.
    lora = adapter.settings(given)
    _check_place(adapter.on, base, devices, shard=shard)
    examples = read_mixture(data, dev.names.fields(), seed)
    dev_examples, format_ = dev.read(), prompt.format()
    config = FitConfig(**{"learning_rate": steps.learning_rate, **given.settings(FitConfig)})
    if launch(given, devices, placement.device, config):
        return

    from loraflow import training

    with held_output(output, run, makes="adapter" if adapter.on is None else "fusion") as checkpoints:
        common: dict[str, Any] = {
            "lora": lora,
            "dev": dev_examples,
            "config": config,
            "checkpoints": checkpoints,
            "resume": run.resume,
            "overwrite": run.overwrite,
            "reports": output / "reports",
            "console": console,
        }
        if adapter.on is not None:
            model = _open(adapter.on, base, prompt, placement)
            result = model.finetune(examples, output, name=adapter.name, **common)
        else:
            options = placed(placement.options(), shard=shard)
            result = training.finetune(
                str(base), examples, output, adapter=adapter.adapter, prompt=format_, options=options, **common
            )
        if not is_first_process():
            return
        if not run.keep_checkpoints:
            training.remove_checkpoints(checkpoints)
    module = f"--base {base} --lora-modules tuned={result.output} --method tuned"
    _report(console, result, module if adapter.on is None else str(result.output), len(examples))


def _check_place(on: str | None, base: str | None, devices: int | None, *, shard: bool) -> None:
    """Check that there is something to train on, in the one process where that is a fusion.

    Raises:
        LoraflowError: if there is not.
    """
    if base is None and (on is None or not _is_fusion(on)):
        raise LoraflowError("`--base` is missing. Give the base model's Hub id or directory.")
    if on is not None and (shard or (devices or 1) > 1):
        flag = "--shard" if shard else f"--devices {devices}"
        raise LoraflowError(f"`--on` trains in one process on one device. Leave `{flag}` out.")


def _is_fusion(source: str) -> bool:
    """Whether it is a saved fusion; a local directory with an adapter, and `name=path`, are adapters."""
    path = Path(source).expanduser()
    return not (path / "adapter_config.json").is_file() and (path.exists() or "=" not in source)


def _open(source: str, base: str | None, prompt: PromptOptions, placement: Placement) -> FusedModel:
    """What is trained on: a saved fusion, or one adapter as a fusion of its own."""
    from loraflow.methods import Static
    from loraflow.model import FusedModel

    if _is_fusion(source):
        model = FusedModel.from_pretrained(source, base=base, options=placement.options())
        asked = prompt.over(model.prompt)
        if asked != model.prompt:
            model.prompt = asked
        return model
    named = "=" in source and not Path(source).expanduser().exists()
    name, path = source.split("=", 1) if named else (Path(source).expanduser().resolve().name, source)
    return FusedModel.from_adapters(
        str(base), {name: path}, Static({name: 1.0}), prompt=prompt.format(), options=placement.options()
    )


def _report(console: Console, result: FinetuneResult, model: str, count: int) -> None:
    console.print(
        f"{result.parameters:,} values, {result.steps} steps in {result.seconds:.0f} s; "
        f"train loss {result.train_loss:.4f}"
    )
    if result.dev_loss is not None:
        console.print(f"kept step {result.kept_step}: dev loss {result.dev_loss:.4f}")
    print_cut(console, result.truncated, count)
    console.print(
        f"saved to {result.output}; try: loraflow generate {model} --prompt '...'",
        soft_wrap=True,
    )

"""`loraflow fit`: learn a fusion from a few examples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from loraflow.cli.devices import Devices, Shard, join, launch, placed
from loraflow.cli.groups import Given, with_groups
from loraflow.cli.mixtures import read_mixture
from loraflow.cli.recipe import Room, Run, Steps, held_output, print_cut, recipe_option
from loraflow.cli.replay import CONFIG_FILE, Config, config_file
from loraflow.cli.sources import CopyAdapters, Method, MethodChoice, Sources
from loraflow.cli.texts import DevExamples, PromptOptions, Stop, TrainOn, data_option, manner_line, stop_strings
from loraflow.cli.values import parse_adapters
from loraflow.errors import LoraflowError, did_you_mean
from loraflow.files import is_first_process, make_folder, write_atomically
from loraflow.training.config import FitConfig

if TYPE_CHECKING:
    from rich.console import Console

    from loraflow.examples import Example, Fields
    from loraflow.methods import Method as FusionMethod
    from loraflow.model import FusedModel
    from loraflow.training import FitResult
    from loraflow.training.rates import RateTest

RATES_FILE = "learning-rates.json"
# Parameters of a fit that the command line spells otherwise, or in several options.
_FINDING = "--find-learning-rate fits nothing"
_NOT_FOR_FINDING = (
    *("search", "dev_metric", "early_stopping", "resume", "keep_checkpoints", "checkpoint_steps", "keep_last"),
    *("learning_rate", "epochs", "min_steps", "max_steps", "report_to", "copy_adapters", "devices"),
)
_SPELLED = {"dev": ("dev", "dev_prompt_field", "dev_completion_field"), "score": ("dev_metric",)}


@dataclass(frozen=True)
class TrainingData:
    """What a method learns from."""

    data: Annotated[
        list[str],
        data_option(
            "--data",
            help="Training examples, `prompt` and `completion`, or `messages`: a file of JSON lines, JSON, CSV, TSV or "
            "Parquet, or a data set as `org/name:configuration[train[:200]]`. 200 are enough. Several after one flag "
            "are mixed, `a.jsonl=0.7 b.csv=0.3` in these proportions.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    adapter_data: Annotated[
        list[str],
        data_option(
            "--adapter-data",
            help="For methods that learn from each adapter's own data (phatgoose, ramole, centroid, lora-retriever): "
            "`name=path` of such a file for every adapter (for ramole, for two at least), several after one flag.",
            show_default=False,
        ),
    ] = field(default_factory=list)

    def read(
        self, method: FusionMethod, adapters: Sequence[str], fields: Fields | None, seed: int
    ) -> list[Example] | dict[str, list[Example]]:
        """The examples that a method learns from.

        Raises:
            LoraflowError: if they are not what it learns from, or an adapter is unknown or has none.
        """
        from loraflow.examples import read_examples
        from loraflow.training.learners import learner_of

        learner = learner_of(method)
        if learner.reads == "task":
            if not self.data or self.adapter_data:
                raise LoraflowError(
                    f"The method {method.name!r} learns from examples of the task. Give them with --data."
                )
            return read_mixture(self.data, fields, seed)
        own = parse_adapters(self.adapter_data, "--adapter-data")
        for name in own:
            if name not in adapters:
                raise LoraflowError(
                    f"`--adapter-data` names the unknown adapter {name!r}. {did_you_mean(name, adapters)}"
                )
        if self.data or not own or (learner.reads_all and len(own) < len(adapters)):
            wanted = " ".join(f"{name}=FILE" for name in adapters)
            raise LoraflowError(
                f"The method {method.name!r} learns from each adapter's own data. Give it with --adapter-data "
                f"{wanted}, and no --data."
            )
        return {name: read_examples(own[name], fields) for name in adapters if name in own}


@dataclass(frozen=True)
class FitMethod(MethodChoice):
    """The method to fit."""

    method: Method = "lora-flow"


@dataclass(frozen=True)
class Decision:
    """What decides between checkpoints, or between the settings of a search."""

    examples: DevExamples
    dev_metric: Annotated[
        str,
        data_option(
            "--dev-metric",
            help="What decides on --dev: loss, or a score of generated answers: exact-match, last-number, code-tests.",
        ),
    ] = "loss"
    allow_code: Annotated[
        bool, data_option("--allow-code", help="Let code-tests run generated code, in a sandbox.")
    ] = False
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Try the method's learning rate and a tenth of it with batches of 2, 4 and 8 (the paper's grid), and "
            "keep what is best on --dev.",
        ),
    ] = False

    def read(self) -> Mapping[str, Any]:
        """The dev examples and the score, as fitting and searching take them.

        Raises:
            LoraflowError: if something needs dev examples and there are none.
        """
        from loraflow.evaluation.sandbox import check_available
        from loraflow.evaluation.scoring import get_scorer

        dev = self.examples.read()
        if dev is None and (self.search or self.dev_metric != "loss"):
            raise LoraflowError(
                f"`{'--search' if self.search else '--dev-metric'}` needs dev examples to decide on. Give --dev."
            )
        score = get_scorer(self.dev_metric, allow_code=self.allow_code) if self.dev_metric != "loss" else None
        if self.dev_metric == "code-tests":
            check_available()
        return {"dev": dev, "score": score}


@with_groups
def fit(
    *,
    given: Given,
    data: TrainingData,
    output: Annotated[Path, data_option("--output", help="Directory for the fusion.")],
    sources: Sources,
    choice: FitMethod,
    decision: Decision,
    find_learning_rate: Annotated[
        bool,
        typer.Option(
            "--find-learning-rate",
            help="Do not fit, but try learning rates from 1e-6 to 10 on --data, show the losses and suggest one: a "
            f"tenth of the rate at which the smoothed loss is lowest. The table is also in --output/{RATES_FILE}.",
        ),
    ] = False,
    config: Config = None,
    run: Run,
    copy_adapters: CopyAdapters = False,
    steps: Steps,
    adapter_dropout: Annotated[
        float, recipe_option(help="Dropout on the adapters' input while fitting.")
    ] = FitConfig.adapter_dropout,
    room: Room,
    devices: Devices = None,
    shard: Shard = False,
    score_max_new_tokens: Annotated[
        int, recipe_option("--max-new-tokens", help="Longest answer when --dev-metric is a score.")
    ] = FitConfig.score_max_new_tokens,
    seed: Annotated[
        int, recipe_option(help="Of the examples' order, of dropout, and of what a mixture takes.")
    ] = FitConfig.seed,
    train_on: TrainOn = FitConfig.train_on,
    prompt: PromptOptions,
    stop: Stop = [],  # noqa: B006 (typer reads the default)
) -> None:
    """Learn a fusion of adapters from a few examples.

    Base and adapters stay frozen; only what the method learns is trained, and saved in --output with everything that is
    needed to load it. Methods: lora-flow (gates, by gradient), learned-static (constant weights, by gradient),
    adapter-core (a small matrix between the adapters in each linear, by gradient), lorahub (one weight for each
    adapter, by gradient-free search); and from each adapter's own data instead of examples of the task: phatgoose,
    ramole, centroid, lora-retriever.

    Examples: `loraflow fit --base meta-llama/Llama-2-7b-hf --lora-modules zh=user/zh-lora math=user/math-lora
    --data train.jsonl --dev dev.jsonl --output zh-math`; `--method lorahub --method-option budget=40`;
    `--method phatgoose --adapter-data zh=zh.jsonl math=math.jsonl`
    """
    console = join(devices, sources.placement.device)
    # Cheap checks come before the model is loaded.
    adapters = list(sources.adapters())
    method = choice.resolve("lora-flow", adapters)
    _refuse_unused(given, method)
    _refuse_idle(given, decision, steps, find_learning_rate=find_learning_rate)
    recipe = FitConfig.for_method(method, **_settings(given))
    if launch(given, devices, sources.placement.device, recipe):
        return
    with held_output(output, run, makes="fusion") as checkpoints:
        examples = data.read(method, adapters, decision.examples.names.fields(), seed)
        decides = decision.read()

        from loraflow import training
        from loraflow.training.reporting import check_trackers

        check_trackers(recipe.report_to, weights=True)
        model = sources.build(
            method, prompt.format(), stop_strings(stop), placed(sources.placement.options(), shard=shard)
        )
        count = sum(map(len, examples.values())) if isinstance(examples, dict) else len(examples)
        kind = "core" if method.adds else "gate"
        gates = f"1 {kind}" if len(model.gates) == 1 else f"{len(model.gates)} {kind}s"
        console.print(f"{count} examples, {model.num_learned_parameters():,} values to learn in {gates}")
        asked = manner_line(model.prompt_origin, model.endings, model.tokenizer)
        console.print(asked, soft_wrap=True, markup=False, highlight=False)
        if find_learning_rate:
            found = training.find_learning_rate(model, cast(Any, examples), config=recipe, console=console)
            _report_rates(console, found, output)
            return
        learn: Any = training.search if decision.search else training.fit
        on_disk = {"checkpoints": checkpoints, "reports": output / "reports"}
        said = {"resume": run.resume, "overwrite": run.overwrite, "console": console}
        result = learn(model, examples, **decides, config=recipe, **on_disk, **said)
        if not is_first_process():
            return
        model.save_pretrained(output, copy_adapters=copy_adapters)
        write_atomically(output / CONFIG_FILE, config_file(given, recipe, _idle_fields(method, decision)))
        if not run.keep_checkpoints:
            training.remove_checkpoints(checkpoints)
    _report(console, model, result, output, count)


def _settings(given: Given) -> dict[str, Any]:
    """What was given of the recipe; what is left open is as the method's own source has it."""
    settings = given.settings(FitConfig)
    if "epochs" in settings:
        # Epochs that are asked for are not to lose against steps of the method's own.
        settings.setdefault("max_steps", None)
        settings.setdefault("min_steps", 0)
    return settings


def _refuse_unused(given: Given, method: FusionMethod) -> None:
    from loraflow.training.learners import learner_of

    idle = [option for name in learner_of(method).idle for option in _SPELLED.get(name, (name,))]
    for flag in given.flags(idle):
        raise LoraflowError(f"The method {method.name!r} has no use for {flag}. Leave it out.")


def _idle_fields(method: FusionMethod, decision: Decision) -> set[str]:
    """What of a recipe had no use: what is saved of it is to be taken as it is."""
    from loraflow.training.learners import learner_of

    idle = set(learner_of(method).idle)
    if decision.search:
        idle |= {"learning_rate", "batch_size"}
    if decision.dev_metric == "loss":
        idle.add("score_max_new_tokens")
    return idle


def _refuse_idle(given: Given, decision: Decision, steps: Steps, *, find_learning_rate: bool) -> None:
    """Refuse options that others make idle."""
    no_dev = "" if decision.examples.dev is not None else "there is no --dev"
    reasons = {
        "learning_rate": "--search tries rates of its own" if decision.search else "",
        # How many forwards a step of the search's sizes has is another matter.
        "batch_size": "--search tries sizes of its own" if decision.search and steps.batch_size != "auto" else "",
        **(dict.fromkeys(_NOT_FOR_FINDING, _FINDING) if find_learning_rate else {}),
        "early_stopping": no_dev,
        "dev_prompt_field": no_dev,
        "dev_completion_field": no_dev,
        "allow_code": "" if decision.dev_metric == "code-tests" else "--dev-metric is not code-tests",
        "score_max_new_tokens": ""
        if decision.dev_metric != "loss"
        else "--dev-metric is the loss, which generates nothing",
    }
    for name, reason in reasons.items():
        if reason and name in given:
            raise LoraflowError(f"`{given.flag(name)}` has no effect: {reason}. Leave it out.")


def _report_rates(console: Console, found: RateTest, output: Path) -> None:
    from rich.table import Table

    make_folder(output)
    write_atomically(output / RATES_FILE, (json.dumps(dataclasses.asdict(found), indent=2) + "\n").encode())
    table = Table("learning rate", "loss", "smoothed", "", box=None)
    highest = max(found.smoothed)
    for rate, loss, smoothed in zip(found.rates, found.losses, found.smoothed, strict=True):
        table.add_row(f"{rate:.1e}", f"{loss:.4f}", f"{smoothed:.4f}", "█" * round(30 * smoothed / highest))
    console.print(table)
    console.print(f"suggestion: --learning-rate {found.suggestion:g} (a tenth of that with the lowest smoothed loss)")


def _report(console: Console, model: FusedModel, result: FitResult, output: Path, count: int) -> None:
    from loraflow.training.learners import learner_of

    start = ", ".join(f"{name} {weight:g}" for name, weight in result.start.items())
    parts = [f"started at {start}"] if start else []
    learner = learner_of(model.method)
    parts.append(
        f"{result.steps} {learner.step} in {result.seconds:.0f} s" if result.steps else f"{result.seconds:.0f} s"
    )
    if result.train_loss is not None:
        parts.append(f"train loss {result.train_loss:.4f}")
    console.print("; ".join(parts))
    if model.method.level == "task" and model.method.place == "model":
        weights = next(iter(model.state_dict().values())).tolist()
        shown = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(model.adapter_names, weights, strict=True))
        console.print(f"weights: {shown}")
    if result.dev_loss is not None:
        score = f", score {result.dev_score:.3f}" if result.dev_score is not None else ""
        kept = f"kept step {result.kept_step}: " if learner.has_grid else ""
        console.print(f"{kept}dev loss {result.dev_loss:.4f}{score}")
    print_cut(console, result.truncated, count)
    console.print(f"saved to {output}; try: loraflow generate {output} --prompt '...'", soft_wrap=True)

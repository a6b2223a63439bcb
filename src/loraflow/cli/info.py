"""`loraflow info`: what fits, how many parameters, how much memory, before anything heavy; and how a fusion weighs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.groups import Given, options_of, panel, with_groups
from loraflow.cli.sources import DTYPES, FusionSource, MethodChoice
from loraflow.cli.texts import FieldNames
from loraflow.errors import LoraflowError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import GenerationConfig

    from loraflow.adapters import Adapter, AdapterSource
    from loraflow.analysis.weights import WeightStatistics, WeightSummary
    from loraflow.bases import BaseOptions

_stat = panel("How it weighs (--stats, which loads the base)")
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "bnb-8bit": 1.0, "bnb-4bit": 0.55}


@dataclass(frozen=True)
class StatsFields(FieldNames):
    """The fields of the examples that are weighed."""

    prompt_field: Annotated[str | None, _stat("--prompt-field", help="Field that is the prompt.")] = None
    completion_field: Annotated[str | None, _stat("--completion-field", help="Field that is the completion.")] = None


@dataclass(frozen=True)
class Statistics:
    """How a fusion weighs its adapters on examples: which, and what is shown."""

    data: Annotated[str | None, _stat("--data", help="Prompts and completions, from where `fit` has them.")] = None
    examples: Annotated[int | None, _stat("--examples", min=1, help="Only the first so many.  [default: all]")] = None
    modules: Annotated[bool, _stat("--modules", help="Every module's gate, where each has one.")] = False
    json_file: Annotated[Path | None, _stat("--json", help="Write the numbers there.")] = None
    names: StatsFields = field(default_factory=StatsFields)
    batch_size: Annotated[int, _stat(min=1, help="Examples in a forward.")] = 8

    def read(self) -> list[Any]:
        """The examples.

        Raises:
            LoraflowError: if there is no file of them.
        """
        from loraflow.examples import read_examples

        if self.data is None:
            raise LoraflowError("`--stats` reads examples. Give --data, prompts and completions as for fit.")
        return read_examples(self.data, self.names.fields(), limit=self.examples)


@with_groups
def info(
    *,
    given: Given,
    stats: Annotated[bool, _stat("--stats", help="Report the weights on --data, and gates that collapsed.")] = False,
    statistics: Statistics,
    source: FusionSource,
) -> None:
    """Check which adapters fit a base, and count parameters and memory, without loading the base's weights.

    With --stats, also report how the fusion weighs its adapters on your examples: mean weights, who leads and how
    often, whether weights vary at all. The given completions are read in one forward each, nothing is generated.

    Examples: `loraflow info zh-math`; `loraflow info --base B --lora-modules zh=path math=path`;
    `loraflow info zh-math --stats --data dev.jsonl`
    """  # noqa: DOC501 (it is the --help text)
    idle = () if stats else (*options_of(Statistics), *options_of(MethodChoice), "device")
    for flag in given.flags(idle):
        raise LoraflowError(f"`{flag}` belongs to --stats. Say --stats too.")
    examples = statistics.read() if stats else []
    _describe(source)
    if stats:
        _show_statistics(source.open(), examples, statistics)


def _describe(opened: FusionSource) -> None:
    """Print what can be said without the base's weights.

    Raises:
        LoraflowError: if there is neither a fusion nor base and adapters.
        Exit: if an adapter does not fit.
    """
    from rich.console import Console

    from loraflow.adapters import AdapterBank, AdapterSource, outlines
    from loraflow.errors import AdapterError

    console = Console()
    fusion, asked = opened.fusion, opened.sources
    options = asked.placement.options()
    if fusion is not None:
        base, sources = _describe_fusion(fusion, asked.base, asked.paths(), console)
    else:
        if asked.base is None or not asked.adapters():
            raise LoraflowError("Give a saved fusion, or --base and --lora-modules name=path ..., or --adapters FOLDER")
        base, sources = asked.base, {name: AdapterSource.parse(path) for name, path in asked.paths().items()}

    from loraflow.bases import BaseOptions, load_empty_base
    from loraflow.core.architecture import check_inside_layers, find_decoder_layers

    model = load_empty_base(base, BaseOptions(revision=options.revision))
    layers = find_decoder_layers(model)
    fitting: list[Adapter] = []
    refused: list[str] = []
    bank = asked.adapters() if fusion is None else None
    reads = outlines(bank.stored(), model) if isinstance(bank, AdapterBank) else _whole(sources, model)
    for read in reads:
        try:
            adapter = read()
            check_inside_layers(adapter, layers)
            fitting.append(adapter)
        except AdapterError as error:
            refused.append(str(error))
    console.print(
        f"base: {base} ({type(model).__name__}, {len(layers.layers)} layers, hidden size {layers.hidden_size})"
    )
    _adapter_table(fitting, console)
    refused += _describe_prompts(opened, base, {one.name: one.source for one in fitting}, model, console)
    for message in refused:
        console.print("[bold red]does not fit:[/] ", end="")
        print(message)
    for note in _notes(fitting, base, model):
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
    if fitting:
        _count(model, layers, fitting, options, console)
    if refused:
        raise typer.Exit(1)


def _describe_fusion(
    fusion: str, base: str | None, moved: dict[str, str], console: Console
) -> tuple[str, dict[str, Any]]:
    from loraflow.adapters import AdapterSource
    from loraflow.saved.fusion import SavedFusion

    saved = SavedFusion.open(fusion)
    config = saved.config
    learned = sum(tensor.numel() for tensor in saved.tensors.values())
    console.print(
        f"fusion: {fusion}, method {_method_text(config.method.name, config.method.parameters)}, "
        f"{learned:,} learned values",
        soft_wrap=True,
        markup=False,
    )
    if config.training:
        shown = ("examples", "dev_examples", "steps", "train_loss", "dev_loss", "dev_score")
        summary = ", ".join(
            f"{key} {_value_text(config.training[key], '.4f')}" for key in shown if config.training.get(key) is not None
        )
        experts = {name: record["examples"] for name, record in config.training.get("experts", {}).items()}
        own = config.training.get("samples") or experts
        if own:
            summary = "on each adapter's own data, " + ", ".join(f"{name} {count}" for name, count in own.items())
        console.print(f"trained: {summary}")
    return base or saved.base, saved.sources({name: AdapterSource.parse(path) for name, path in moved.items()})


def _describe_prompts(
    source: FusionSource, base: str, adapters: Mapping[str, AdapterSource], model: Any, console: Console
) -> list[str]:
    """Print how the fusion is asked, where its answers end, and what its adapters bring for that; gives refusals."""
    from loraflow.bases import BaseOptions, choose, find_tokenizer, read_beside, with_tokens
    from loraflow.cli.texts import manner_line
    from loraflow.endings import Endings
    from loraflow.errors import DataError
    from loraflow.saved.fusion import SavedFusion

    tokenizer = find_tokenizer(base, BaseOptions(revision=source.sources.placement.revision))
    if tokenizer is None:
        return []
    for name, found in ((name, read_beside(place)) for name, place in adapters.items()):
        new = [text for text, token in found.tokens.items() if tokenizer.get_vocab().get(text) != token.id]
        brings = [f"a chat template ({_lines(text)} lines)" for text in found.templates.values()]
        brings += [f"tokens that the base's tokenizer lacks: {', '.join(map(repr, new))}"] if new else []
        if brings:
            console.print(f"{name} brings {'; '.join(brings)}", soft_wrap=True, markup=False, highlight=False)
    try:
        given = source.prompt.format()
        if source.fusion is not None:
            config = SavedFusion.open(source.fusion).config
            prompt, origin = source.prompt.over(config.prompt), "the fusion's own format"
            tokenizer, endings = with_tokens(tokenizer, config.added_tokens), config.endings
            endings = endings if prompt == config.prompt else None
        else:
            choice = choose(given, tokenizer, adapters, model.config.get_text_config(decoder=True).vocab_size)
            tokenizer, prompt, origin = with_tokens(tokenizer, choice.tokens), choice.prompt, choice.origin
            endings = None
        prompt = prompt.resolve(tokenizer)
    except DataError as error:
        return [str(error)]
    endings = endings or Endings.find(prompt, tokenizer, _generation_config(base, source, model))
    console.print(manner_line(origin, endings, tokenizer), soft_wrap=True, markup=False, highlight=False)
    return []


def _generation_config(base: str, source: FusionSource, model: Any) -> GenerationConfig:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base, revision=source.sources.placement.revision or "main")
    except OSError:
        return model.generation_config


def _lines(text: str) -> int:
    return text.count("\n") + 1


def _method_text(name: str, parameters: Mapping[str, Any]) -> str:
    """A method as `lora-flow (granularity layer, start average)`, without what is not set."""
    shown = ", ".join(f"{key} {_value_text(value, 'g')}" for key, value in parameters.items() if value is not None)
    return f"{name} ({shown})" if shown else name


def _value_text(value: Any, precision: str) -> str:
    if isinstance(value, float):
        return format(value, precision)
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_value_text(item, precision)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(_value_text(item, precision) for item in value) or "none"
    return str(value)


def _whole(sources: Mapping[str, AdapterSource], model: Any) -> Iterator[Callable[[], Adapter]]:
    """Reads each adapter and checks it against the base."""
    return (functools.partial(_read, name, source, model) for name, source in sources.items())


def _read(name: str, source: AdapterSource, model: Any) -> Adapter:
    from loraflow.adapters import load_adapter, match_adapter

    return match_adapter(load_adapter(name, source), model)


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


def _notes(adapters: Sequence[Adapter], base: str, model: Any) -> list[str]:
    """What may be as it should be with adapters that fit, or not."""
    from loraflow.adapters import uncompared_copies

    notes = []
    for adapter in adapters:
        trained_on = adapter.config.base_model_name_or_path
        if trained_on and _model_name(trained_on) != _model_name(base):
            notes.append(f"{adapter.name} was trained on {trained_on!r} by its own account; the base here is {base!r}.")
        copies = uncompared_copies(adapter, model)
        if copies:
            notes.append(
                f"{adapter.name} brings its own {' and '.join(copies)}; it is fused only with a base that has the "
                "same, which shows when that is loaded."
            )
    return notes


def _model_name(path: str) -> str:
    """What a model is called, wherever it lies: the last part of its id or path, or of the id in a cache folder's."""
    parts = [part for part in re.split(r"[/\\]", path) if part]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or parts or [path])[-1].lower()


def _count(model: Any, layers: Any, adapters: list[Adapter], options: BaseOptions, console: Console) -> None:
    import torch

    from loraflow.cli.planning import print_plan
    from loraflow.core.attach import attach
    from loraflow.methods import LoraFlow
    from loraflow.training.plan import size_text

    total = sum(parameter.numel() for parameter in model.parameters())
    stored = str(model.config.dtype or torch.float32).removeprefix("torch.")
    precision = stored if options.dtype == "auto" else str(options.dtype)
    if precision not in _BYTES:
        raise LoraflowError(f"`--dtype` is unknown: {precision!r}. {did_you_mean(precision, DTYPES)}")
    quantization = None if options.quantization == "none" else options.quantization
    names = [adapter.name for adapter in adapters]
    if any(adapter.uses_dora for adapter in adapters):
        # DoRA needs the base's real weights, which are not here; its gates are counted without it.
        console.print("gates: not counted for DoRA adapters before the base is loaded, and no fit is planned")
        attachment = None
    else:
        attachment = attach(model.to(getattr(torch, precision)), layers, adapters)
        for granularity in ("step", "layer", "module"):
            gates = attachment.make_gates(LoraFlow(granularity=granularity, start="average"))
            count = sum(parameter.numel() for gate in gates.values() for parameter in gate.parameters())
            console.print(f"gates, {granularity:6} ({len(names)} adapters): {count:,} values in {len(gates)}")
    base_bytes = total * _BYTES[quantization or precision]
    adapter_bytes = sum(adapter.parameters for adapter in adapters) * _BYTES[precision]
    label = f"{quantization} base" if quantization else precision
    console.print(f"memory for weights ({label}): base {size_text(base_bytes)}, adapters {size_text(adapter_bytes)}")
    if attachment is not None:
        print_plan(attachment, base_bytes + adapter_bytes, console)


def _show_statistics(model: Any, examples: list[Any], asked: Statistics) -> None:
    """Print how a fusion weighs its adapters on examples, and write the numbers.

    Raises:
        LoraflowError: if gates of single modules are asked for where there are none.
    """
    import json

    from rich.console import Console
    from rich.progress import Progress

    from loraflow.analysis.findings import findings, report_json
    from loraflow.analysis.weights import weight_statistics
    from loraflow.files import write_atomically

    if asked.modules and model.method.place != "module":
        raise LoraflowError(
            f"`--modules` shows gates of single modules, and those of {model.method.name!r} stand at each "
            f"{model.method.place}. Leave it out."
        )
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=len(examples))
        found = weight_statistics(
            model, examples, batch_size=asked.batch_size, on_batch=lambda count: progress.advance(task, count)
        )
    console = Console()
    for line in _introduction(found):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(_weight_table(found, modules=asked.modules))
    if found.prompts is not None:
        means = zip(found.adapters, found.prompts.mean.mean(dim=0).tolist(), strict=True)
        shown = ", ".join(f"{name} {mean:+.2f}" for name, mean in means)
        tokens = int(found.prompts.count[0])
        line = f"on the prompts' {tokens:,} tokens, mean of all layers: {shown}"
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    for finding in findings(found):
        loud = finding.kind in ("constant", "collapsed", "unused")
        console.print(f"- {finding.text}", style="bold red" if loud else None, soft_wrap=True, markup=False)
    if asked.json_file is not None:
        write_atomically(asked.json_file, json.dumps(report_json(found), ensure_ascii=False).encode())


def _introduction(found: WeightStatistics) -> list[str]:
    whole = found.level == "query"
    count = int(found.overall.count[0])
    counted = f"{count:,} prompts" if whole else f"{count:,} tokens of {found.examples:,} given answers"
    lines = [
        "",
        f"weights of {found.method} over {counted}: mean ± standard deviation, and the share of {found.counted} "
        "where an adapter has the largest weight",
        "entropy of the positive weights: 0 one adapter speaks, 1 all speak alike",
    ]
    silent = found.answers.silent.max().item()
    if silent > 0:
        lines.append(f"up to {silent:.0%} of the {found.counted} of a layer have no positive weight, and no entropy")
    if found.truncated:
        lines.append(f"{len(found.truncated)} of {found.examples} examples were cut to the longest length")
    return lines


def _weight_table(found: WeightStatistics, *, modules: bool) -> Any:
    from rich.table import Column, Table
    from rich.text import Text

    right = [Column(Text(name), justify="right") for name in found.adapters]
    table = Table("gates" if modules else "layer", *right, Column("entropy", justify="right"), box=None)
    if modules and found.module_answers is not None:
        _add_rows(table, found.modules, found.module_answers)
    else:
        _add_rows(table, [str(layer) for layer in found.layers], found.answers)
    _add_rows(table, ["all layers"], found.overall)
    return table


def _add_rows(table: Any, names: Sequence[str], summary: WeightSummary) -> None:
    for site, name in enumerate(names):
        numbers = zip(
            summary.mean[site].tolist(), summary.std[site].tolist(), summary.largest[site].tolist(), strict=True
        )
        cells = [f"{mean:+.2f} ± {std:.2f} {share:>6.1%}" for mean, std, share in numbers]
        table.add_row(name, *cells, _entropy_text(summary.entropy[site].item()))


def _entropy_text(entropy: float) -> str:
    return "-" if entropy != entropy else f"{entropy:.2f}"

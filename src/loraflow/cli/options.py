"""Options that several subcommands share, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.errors import LoraflowError, MethodError, did_you_mean

if TYPE_CHECKING:
    from loraflow.bases import BaseOptions
    from loraflow.methods import Method as FusionMethod
    from loraflow.model import FusedModel
    from loraflow.prompts import PromptFormat

# Options that take several values after one flag, as in `--lora-modules zh=path math=path`.
_SEVERAL = (
    "--adapter-data",
    "--compare",
    "--fusions",
    "--lora-modules",
    "--method-option",
    "--methods",
    "--seeds",
    "--tasks",
)
# Of these, those whose values are bare words, so that an argument after them would be taken for one.
_WORDS = ("--compare", "--fusions", "--methods", "--seeds", "--tasks")

DTYPES = ("auto", "float32", "bfloat16", "float16")

_SOURCES = "Base and adapters"
_READING = "How text is read"

Fusion = Annotated[
    str | None,
    typer.Argument(
        help="A saved fusion: its directory or Hub id; --base and --lora-modules say where those are that moved. "
        "Without a fusion, give both."
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Base model: Hub id or directory.", rich_help_panel=_SOURCES, show_default=False),
]
LoraModules = Annotated[
    list[str],
    typer.Option(
        "--lora-modules",
        help="Adapters, as `name=path`, several after one flag. A path is a directory, `user/repo` or "
        "`user/repo/subfolder`, a Hub id optionally with `@revision`.",
        rich_help_panel=_SOURCES,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Revision of the base on the Hub.", rich_help_panel=_SOURCES)
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Precision of the base: auto, float32, bfloat16, float16.", rich_help_panel=_SOURCES),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1, ..., or auto (over all GPUs).  [default: cuda if there is one]",
        rich_help_panel=_SOURCES,
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", help="Quantise the base: bnb-4bit or bnb-8bit.", rich_help_panel=_SOURCES),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="base, average, static, learned-static, lorahub, qa-flora, logo, centroid, arrow, phatgoose, lora-flow, "
        "one of another package, or an adapter's name (that one alone).",
    ),
]
MethodOptions = Annotated[
    list[str],
    typer.Option(
        "--method-option",
        help="Parameters of the method, as `key=value`, values as JSON or text: for lora-flow `granularity=module`, "
        'for static `weights={"zh": 0.3, "math": 0.7}`, for qa-flora `distance=cosine`; docs/methods lists them.',
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older result in --output.")]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        "--system-prompt", help="Put before every conversation; saved with the fusion.", rich_help_panel=_READING
    ),
]
PromptTemplate = Annotated[
    str | None,
    typer.Option(
        "--prompt-template",
        help="Plain prompt text with {prompt} and {system}; \\n is a new line.",
        rich_help_panel=_READING,
    ),
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        "--chat-template", help="File with a Jinja chat template, instead of the tokenizer's.", rich_help_panel=_READING
    ),
]


@dataclass(frozen=True)
class Placement:
    """How the base is to be loaded, as the command line says it.

    Attributes:
        revision: `--revision`.
        dtype: `--dtype`.
        device: `--device`; None is a GPU if there is one.
        quantization: `--quantization`.
    """

    revision: str | None
    dtype: str
    device: str | None
    quantization: str | None

    def options(self) -> BaseOptions:
        """The same as the library takes it.

        Raises:
            LoraflowError: if the dtype is unknown.
        """
        import torch

        from loraflow.bases import BaseOptions

        if self.dtype not in DTYPES:
            raise LoraflowError(f"`--dtype` is unknown: {self.dtype!r}. {did_you_mean(self.dtype, DTYPES)}")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return BaseOptions(self.revision, self.dtype, device, self.quantization)


def spread_values(arguments: Sequence[str]) -> list[str]:
    """`--lora-modules a=1 b=2` as `--lora-modules a=1 --lora-modules b=2`, which is what the parser knows."""
    spread: list[str] = []
    flag: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            flag = argument if argument in _SEVERAL else None
            spread.append(argument)
        elif flag is not None and ("=" in argument or flag in _WORDS) and spread[-1] != flag:
            spread += [flag, argument]
        else:
            spread.append(argument)
    return spread


def parse_adapters(modules: Sequence[str], flag: str = "--lora-modules") -> dict[str, str]:
    """`name=path` pairs by name, in order.

    Raises:
        LoraflowError: if one has another form, or a name comes twice.
    """
    adapters: dict[str, str] = {}
    for module in modules:
        name, separator, path = module.partition("=")
        if not (name and separator and path):
            raise LoraflowError(f"`{flag}` takes name=path, found {module!r}.")
        if name in adapters:
            raise LoraflowError(f"`{flag}` names {name!r} twice. Give each adapter its own.")
        adapters[name] = path
    return adapters


def parse_method_options(options: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs; a value is JSON where it can be, else text.

    Raises:
        MethodError: if one has another form.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not (key and separator):
            raise MethodError(f"`--method-option` takes key=value, found {option!r}.")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed


def prompt_format(system: str | None, template: str | None, chat_template: Path | None) -> PromptFormat:
    """The prompt format that the options describe.

    Raises:
        LoraflowError: if the chat template's file cannot be read.
    """
    from loraflow.prompts import PromptFormat

    try:
        chat = chat_template.read_text(encoding="utf-8") if chat_template is not None else None
    except OSError as error:
        raise LoraflowError(f"`--chat-template`: {error}") from error
    plain = template.replace("\\n", "\n") if template is not None else None
    return PromptFormat(system_prompt=system, template=plain, chat_template=chat)


def check_output(output: Path, *, overwrite: bool, makes: str) -> None:
    """Check that what a command writes replaces nothing unasked.

    Args:
        output: the directory that it writes to.
        overwrite: whether it may replace what is of its own kind there.
        makes: "fusion" or "adapter".

    Raises:
        LoraflowError: if there is a file, another fusion, or an adapter.
    """
    marks = {"fusion": ("fusion.safetensors", "fusion_config.json"), "adapter": ("adapter_config.json",)}
    if output.is_file():
        raise LoraflowError(f"`--output` (={str(output)!r}) is a file. Give a directory.")
    for kind, names in marks.items():
        if not any((output / name).exists() for name in names):
            continue
        if kind != makes:
            raise LoraflowError(f"`--output` (={str(output)!r}) holds a LoRA {kind}. Give another directory.")
        if not overwrite:
            raise LoraflowError(
                f"`--output` (={str(output)!r}) holds a finished {kind}. Give another directory, or say --overwrite."
            )


def resolve_method(method: str, adapters: Sequence[str], options: Sequence[str]) -> FusionMethod:
    """The method that `--method` and `--method-option` describe, checked against the adapters."""
    from loraflow.methods import get_method

    return get_method(method, adapters, parse_method_options(options))


def build_model(
    base: str | None,
    lora_modules: Sequence[str],
    method: FusionMethod,
    prompt: PromptFormat,
    placement: Placement,
) -> FusedModel:
    """A fused model from `--base` and `--lora-modules`.

    Raises:
        LoraflowError: if one of the two is missing.
    """
    if base is None or not lora_modules:
        missing = "--base" if base is None else "--lora-modules"
        raise LoraflowError(f"`{missing}` is missing. Give --base and --lora-modules name=path ...")
    from loraflow.model import FusedModel

    return FusedModel.from_adapters(
        base, parse_adapters(lora_modules), method, prompt=prompt, options=placement.options()
    )


def open_model(
    fusion: str | None,
    base: str | None,
    lora_modules: Sequence[str],
    method: str | None,
    method_options: Sequence[str],
    placement: Placement,
) -> FusedModel:
    """A saved fusion, or one made now from `--base` and `--lora-modules`; with `--method`, another method on it.

    Raises:
        LoraflowError: if the method would learn, but nothing has been learned.
    """
    from loraflow.model import FusedModel

    if fusion is not None:
        model = FusedModel.from_pretrained(
            fusion, base=base, adapters=parse_adapters(lora_modules) or None, options=placement.options()
        )
        if method is not None or method_options:
            _use(model, method or model.method.name, method_options)
    else:
        from loraflow.prompts import PromptFormat

        resolved = resolve_method(method or "average", list(parse_adapters(lora_modules)), method_options)
        model = build_model(base, lora_modules, resolved, PromptFormat(), placement)
    if model.method.learns and fusion is None:
        raise LoraflowError(
            f"The method {model.method.name!r} must be fitted first. "
            "Run `loraflow fit`, and give the directory it writes."
        )
    return model


def _use(model: FusedModel, name: str, options: Sequence[str]) -> None:
    """Use another method on a saved fusion; its own keeps what it learned, and may take other parameters with it.

    Raises:
        LoraflowError: if the method would learn, and is not the fusion's own.
    """
    own, learned, record = model.method, model.state_dict(), model.training_record
    parameters = parse_method_options(options)
    if name == own.name:
        from loraflow.methods import make_method

        model.set_method(make_method(name, {**own.parameters(), **parameters}))
        model.load_state_dict(learned)
        model.training_record = record
        return
    chosen = resolve_method(name, model.adapter_names, options)
    if chosen.learns:
        raise LoraflowError(
            f"The method {name!r} must be fitted first, and this fusion was fitted by {own.name!r}. "
            "Run `loraflow fit`, and give the directory it writes."
        )
    model.set_method(chosen)

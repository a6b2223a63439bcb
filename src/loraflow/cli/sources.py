"""Options that say where a model comes from: base, adapters, a saved fusion, the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from loraflow.cli.devices import own_device
from loraflow.cli.groups import panel
from loraflow.cli.texts import PromptOptions
from loraflow.cli.values import parse_adapters, parse_method_options
from loraflow.errors import LoraflowError, did_you_mean

if TYPE_CHECKING:
    from loraflow.bases import BaseOptions
    from loraflow.methods import Method as FusionMethod
    from loraflow.model import FusedModel
    from loraflow.prompts import PromptFormat

DTYPES = ("auto", "float32", "bfloat16", "float16")

_source = panel("Base and adapters")

Base = Annotated[str | None, _source("--base", help="Base model: Hub id or directory.", show_default=False)]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="base, average, static, learned-static, lorahub, qa-flora, logo, centroid, lora-retriever, arrow, "
        "phatgoose, lora-flow, adapter-core, one of another package, or an adapter's name (that one alone).",
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
CopyAdapters = Annotated[
    bool, typer.Option("--copy-adapters", help="Copy local adapters into --output, so that it can be moved as it is.")
]


@dataclass(frozen=True)
class Placement:
    """How the base is to be loaded."""

    revision: Annotated[str | None, _source("--revision", help="Revision of the base on the Hub.")] = None
    dtype: Annotated[str, _source("--dtype", help="Precision of the base: auto, float32, bfloat16, float16.")] = "auto"
    device: Annotated[
        str | None,
        _source("--device", help="cpu, cuda, cuda:1, ..., or auto (over all GPUs).  [default: cuda if there is one]"),
    ] = None
    quantization: Annotated[str | None, _source("--quantization", help="Quantise the base: bnb-4bit or bnb-8bit.")] = (
        None
    )

    def options(self) -> BaseOptions:
        """The same as the library takes it.

        Raises:
            LoraflowError: if the dtype is unknown.
        """
        from loraflow.bases import BaseOptions

        if self.dtype not in DTYPES:
            raise LoraflowError(f"`--dtype` is unknown: {self.dtype!r}. {did_you_mean(self.dtype, DTYPES)}")
        return BaseOptions(self.revision, self.dtype, own_device(self.device), self.quantization)


@dataclass(frozen=True)
class Sources:
    """A base and adapters for it."""

    base: Base = None
    lora_modules: Annotated[
        list[str],
        _source(
            "--lora-modules",
            help="Adapters, as `name=path`, several after one flag. A path is a directory, `user/repo` or "
            "`user/repo/subfolder`, a Hub id optionally with `@revision`.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    placement: Placement = field(default_factory=Placement)

    def adapters(self) -> dict[str, str]:
        """The adapters' paths by name, in order."""
        return parse_adapters(self.lora_modules)

    def both(self, form: str = "name=path ...") -> tuple[str, dict[str, str]]:
        """The base and the adapters.

        Raises:
            LoraflowError: if one of the two is missing.
        """
        adapters = self.adapters()
        if self.base is None or not adapters:
            missing = "--base" if self.base is None else "--lora-modules"
            raise LoraflowError(f"`{missing}` is missing. Give --base and --lora-modules {form}")
        return self.base, adapters

    def build(
        self,
        method: FusionMethod,
        prompt: PromptFormat,
        stop_strings: Sequence[str] = (),
        options: BaseOptions | None = None,
    ) -> FusedModel:
        """A fused model of them, placed as they say or as other options do."""
        base, adapters = self.both()
        from loraflow.model import FusedModel

        return FusedModel.from_adapters(
            base,
            adapters,
            method,
            prompt=prompt,
            stop_strings=stop_strings,
            options=options or self.placement.options(),
        )


@dataclass(frozen=True)
class MethodChoice:
    """A method and its parameters."""

    method: Method = None
    method_option: MethodOptions = field(default_factory=list)

    def resolve(self, default: str, adapters: Sequence[str]) -> FusionMethod:
        """The method, checked against the adapters; another one where none is named."""
        from loraflow.methods import get_method

        return get_method(self.method or default, adapters, parse_method_options(self.method_option))


@dataclass(frozen=True)
class FusionSource:
    """A saved fusion, or base and adapters for one made now; with another method on it, if one is named."""

    fusion: Annotated[
        str | None,
        typer.Argument(
            help="A saved fusion: its directory or Hub id; --base and --lora-modules say where those are that moved. "
            "Without a fusion, give both."
        ),
    ] = None
    choice: MethodChoice = field(default_factory=MethodChoice)
    sources: Sources = field(default_factory=Sources)
    prompt: PromptOptions = field(default_factory=PromptOptions)

    def open(self, stop_strings: Sequence[str] = ()) -> FusedModel:
        """The model, whose answers end before these texts too.

        Raises:
            LoraflowError: if the method would learn, but nothing has been learned.
        """
        from loraflow.model import FusedModel

        if self.fusion is None:
            method = self.choice.resolve("average", list(self.sources.adapters()))
            model = self.sources.build(method, self.prompt.format(), stop_strings)
            if model.method.learns:
                raise LoraflowError(
                    f"The method {model.method.name!r} must be fitted first. "
                    "Run `loraflow fit`, and give the directory it writes."
                )
            return model
        model = FusedModel.from_pretrained(
            self.fusion,
            base=self.sources.base,
            adapters=self.sources.adapters() or None,
            stop_strings=stop_strings,
            options=self.sources.placement.options(),
        )
        prompt = self.prompt.over(model.prompt)
        if prompt != model.prompt:
            model.prompt = prompt
        if self.choice.method is not None or self.choice.method_option:
            self._use_choice(model)
        return model

    def _use_choice(self, model: FusedModel) -> None:
        """Use the method on a saved fusion; its own keeps what it learned, and may take other parameters with it.

        Raises:
            LoraflowError: if the method would learn, and is not the fusion's own.
        """
        own, learned, record = model.method, model.state_dict(), model.training_record
        name = self.choice.method or own.name
        if name == own.name:
            from loraflow.methods import make_method

            parameters = parse_method_options(self.choice.method_option)
            model.set_method(make_method(name, {**own.parameters(), **parameters}))
            model.load_state_dict(learned)
            model.training_record = record
            return
        chosen = self.choice.resolve(name, model.adapter_names)
        if chosen.learns:
            raise LoraflowError(
                f"The method {name!r} must be fitted first, and this fusion was fitted by {own.name!r}. "
                "Run `loraflow fit`, and give the directory it writes."
            )
        model.set_method(chosen)

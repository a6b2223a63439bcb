"""Options that say where a model comes from: base, adapters, a saved fusion, the method."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.devices import own_device
from loraflow.cli.groups import panel
from loraflow.cli.texts import PromptOptions
from loraflow.cli.values import parse_adapters, parse_method_options
from loraflow.errors import LoraflowError, did_you_mean

if TYPE_CHECKING:
    from loraflow.adapters import AdapterBank
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
        help="base, average, static, learned-static, lorahub, qa-flora, logo, centroid, lora-retriever, arrow, spectr, "
        "norm-max, lag, phatgoose, ramole, lora-flow, adapter-core, one of another package, or an adapter's name (that "
        "one alone).",
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
class BankOptions:
    """A folder of adapters, of which those that are used are loaded."""

    folder: Annotated[
        Path | None,
        _source(
            "--adapters",
            help="A folder with adapters in it, named by their folders, in place of --lora-modules: any number, loaded "
            "as they are used.",
        ),
    ] = None
    skip_broken: Annotated[
        bool, _source("--skip-broken", help="Leave adapters of --adapters out that cannot be read; they are named.")
    ] = False
    host_memory: Annotated[
        float | None,
        _source("--host-memory", help="Weights of --adapters that are kept in memory, in GiB.  [default: 4]"),
    ] = None
    device_memory: Annotated[
        float | None,
        _source("--device-memory", help="Those kept in the model, on its devices, in GiB.  [default: 4]"),
    ] = None

    def check_idle(self) -> None:
        """Check that nothing is said of a bank where there is none.

        Raises:
            LoraflowError: if something is.
        """
        said = {
            "--skip-broken": self.skip_broken,
            "--host-memory": self.host_memory is not None,
            "--device-memory": self.device_memory is not None,
        }
        for flag in (flag for flag, given in said.items() if given):
            raise LoraflowError(f"`{flag}` belongs to --adapters. Give a folder of adapters with --adapters.")

    def open(self, folder: Path) -> AdapterBank:
        """The bank of a folder; what is left out is named on standard error."""
        from loraflow.adapters import AdapterBank

        sizes = {
            name: _bytes(value, flag)
            for name, value, flag in (
                ("host_bytes", self.host_memory, "--host-memory"),
                ("device_bytes", self.device_memory, "--device-memory"),
            )
            if value is not None
        }
        bank = AdapterBank(folder, skip_broken=self.skip_broken, **sizes)
        for name, why in bank.left_out.items():
            print(f"left out {name}: {why}", file=sys.stderr)
        return bank


def _bytes(gib: float, flag: str) -> int:
    if not 2**-30 <= gib < float("inf"):
        raise LoraflowError(f"`{flag}` (={gib}) must be a number of GiB above 0.")
    return int(gib * 2**30)


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
    bank: BankOptions = field(default_factory=BankOptions)
    placement: Placement = field(default_factory=Placement)

    @cached_property
    def _opened(self) -> Mapping[str, Any]:
        if self.bank.folder is None:
            self.bank.check_idle()
            return parse_adapters(self.lora_modules)
        if self.lora_modules:
            raise LoraflowError("`--adapters` and `--lora-modules` exclude each other. Give one of them.")
        return self.bank.open(self.bank.folder)

    def adapters(self) -> Mapping[str, Any]:
        """The adapters by name, in order: their paths, or a bank.

        Raises:
            LoraflowError: if a folder and single ones are given, or something is said of a folder that is not.
        """
        return self._opened

    def paths(self) -> dict[str, str]:
        """Where each adapter is, by name; those of a bank one by one."""
        if self.bank.folder is None:
            return dict(self.adapters())
        return {name: entry.source.path for name, entry in self.adapters().items()}

    def both(self, form: str = "name=path ...") -> tuple[str, Mapping[str, Any]]:
        """The base and the adapters.

        Raises:
            LoraflowError: if one of the two is missing.
        """
        adapters = self.adapters()
        if self.base is None or not adapters:
            missing = "--base" if self.base is None else "--lora-modules"
            raise LoraflowError(f"`{missing}` is missing. Give --base and --lora-modules {form}, or --adapters FOLDER")
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
            help="A saved fusion: its directory or Hub id; --base and --lora-modules (or --adapters) say where those "
            "are that moved. Without a fusion, give both."
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

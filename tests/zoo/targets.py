"""What adapters of an architecture can adapt, and what of it reads other rows than its layer's tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraflow.core.architecture import DecoderLayers
from tests.zoo.bases import Base
from tests.zoo.replay import Abilities, Reader, random_words

ALL_LINEAR = "all-linear"
# Where kernels read the weight of `out_proj` past its module, PEFT refuses to adapt it.
_MAMBAS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


@dataclass(frozen=True)
class Targets:
    """What the adapters adapt.

    Attributes:
        name: what the table calls it.
        modules: names of linear modules, or "all-linear".
        parameters: names of parameters that belong to no linear.
    """

    name: str
    modules: tuple[str, ...] | str
    parameters: tuple[str, ...] = ()

    def config(self, rank: int) -> LoraConfig:
        """PEFT's configuration of a random adapter."""
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=self.modules if isinstance(self.modules, str) else list(self.modules),
            target_parameters=list(self.parameters) or None,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class OtherRows:
    """Linears that do not read their layer's tokens.

    Attributes:
        names: all of them.
        uncalled: those whose module was never called.
    """

    names: tuple[str, ...]
    uncalled: tuple[str, ...]


def targets_of(base: Base, layers: DecoderLayers, reader: Reader) -> Iterator[Targets]:
    """All linears; those without the ones that read other rows than their layer's tokens; the experts' parameters.

    Where PEFT adapts parameters of experts though it is asked for linears, there is what it makes of "all-linear" too.

    Yields:
        Targets, those of linears first.
    """
    linears = [name for name in linears_of(base.model, layers) if _is_adapted_as_module(base, name)]
    if linears:
        yield Targets("linears", tuple(linears))
    others = other_rows(base, layers, linears, reader).names
    plain = tuple(name for name in linears if name not in others)
    if others and plain:
        yield Targets("without " + ", ".join(sorted({_leaf(name) for name in others})), plain)
    experts = [
        name
        for name, parameter in base.model.named_parameters()
        if parameter.dim() == 3 and layers.split(name) and "expert" in name
    ]
    if experts:
        yield Targets("experts", (), tuple(experts))
    if _becomes_parameter(base, Targets(ALL_LINEAR, ALL_LINEAR)):
        yield Targets(ALL_LINEAR, ALL_LINEAR)


def targets_of_images(base: Base, layers: DecoderLayers) -> Iterator[Targets]:
    """All linears of the text, and those of the tower that reads the image too.

    Yields:
        Targets of both.
    """
    text = tuple(name for name in linears_of(base.model, layers) if _is_adapted_as_module(base, name))
    tower = [
        name
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and layers.split(name) is None and re.search("visi|visual|image", name)
    ]
    yield Targets("linears, image", text)
    if tower:
        yield Targets("linears and tower, image", (*text, *tower))


def linears_of(model: nn.Module, layers: DecoderLayers) -> list[str]:
    """The linear modules of the decoder layers.

    Not grouped ones, whose shapes PEFT does not know.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "Grouped" not in type(module).__name__ and layers.split(name)
    ]


def other_rows(base: Base, layers: DecoderLayers, linears: Sequence[str], reader: Reader) -> OtherRows:
    """Linears that are called with another number of rows than their layer has tokens, with a cache or without."""
    counts: dict[str, set[bool]] = {name: set() for name in linears}
    tokens = [0]

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens[0] = (args[0] if args else kwargs["hidden_states"]).shape[:-1].numel()

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[name].add(args[0].shape[:-1].numel() == tokens[0])

        return hook

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers.layers]
    handles += [base.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in linears]
    try:
        reader.at_once(base.model, random_words(2))
        if Abilities.of(base, reader).caches:
            reader.step_by_step(base.model, random_words(2))
    finally:
        for handle in handles:
            handle.remove()
    names = tuple(name for name, seen in counts.items() if seen != {True})
    return OtherRows(names, tuple(name for name in names if not counts[name]))


def _is_adapted_as_module(base: Base, name: str) -> bool:
    refused = base.model.config.model_type in _MAMBAS and _leaf(name) == "out_proj"
    return not refused and not _becomes_parameter(base, Targets(name, (name,)))


def _becomes_parameter(base: Base, targets: Targets) -> bool:
    """Whether PEFT adapts parameters of experts where it is asked for these modules."""
    config = targets.config(1)
    try:
        convert_peft_config_for_transformers(config, base.model, None)
    except ValueError:
        # One of two modules that experts have as one parameter.
        return True
    return bool(config.target_parameters)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]

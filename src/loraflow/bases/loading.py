"""Base models and tokenizers, from an id, a path, or as they already are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from loraflow.bases.precision import settled_dtype
from loraflow.errors import ArchitectureError, LoraflowError, did_you_mean

QUANTIZATIONS = ("none", "bnb-4bit", "bnb-8bit")


@dataclass(frozen=True)
class BaseOptions:
    """How a base model is loaded.

    Attributes:
        revision: branch, tag or commit on the Hub.
        dtype: precision of its weights; "auto" is that of its files, or float32 where these are in bfloat16 and the
            base runs on a CPU without instructions for it.
        device_map: as transformers takes it: None (the CPU), "auto", a device, or a map of modules.
        quantization: "bnb-4bit" (NF4, double quantisation) or "bnb-8bit", by bitsandbytes; "none" says that a fusion's
            base is not to be quantised, whatever it was when the fusion was made.
        trust_remote_code: whether code that comes with the base may run.
        model_kwargs: anything else for the model's `from_pretrained`.
    """

    revision: str | None = None
    dtype: str | torch.dtype = "auto"
    device_map: str | Mapping[str, Any] | None = None
    quantization: str | None = None
    trust_remote_code: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise LoraflowError(
                f"`quantization` is unknown: {self.quantization!r}. {did_you_mean(self.quantization, QUANTIZATIONS)}"
            )


def load_base(base: str | Path, options: BaseOptions) -> PreTrainedModel:
    """Load a base model for generation, in evaluation mode.

    Raises:
        ArchitectureError: if transformers has no causal language model of its kind.
        LoraflowError: if it cannot be found or read.
    """
    kwargs = dict(options.model_kwargs)
    if options.quantization not in (None, "none"):
        kwargs["quantization_config"] = _bitsandbytes_config(options)
    config = read_base_config(base, options)
    dtype = options.dtype
    own = config.dtype or config.get_text_config().dtype
    if dtype == "auto" and own is not None:
        dtype = settled_dtype(own, options)
    try:
        with bar_for_people():
            return (
                _auto_class(config)
                .from_pretrained(
                    base,
                    config=config,
                    revision=options.revision,
                    dtype=dtype,
                    device_map=options.device_map,
                    trust_remote_code=options.trust_remote_code,
                    **kwargs,
                )
                .eval()
            )
    except OSError as error:
        raise LoraflowError(f"The base model {str(base)!r} cannot be loaded: {error}") from error


@contextlib.contextmanager
def bar_for_people() -> Iterator[None]:
    """transformers' progress bar on a terminal only: in a log it is noise."""
    shown = sys.stderr.isatty() or not logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if not shown:
            logging.enable_progress_bar()


def load_empty_base(base: str | Path, options: BaseOptions) -> PreTrainedModel:
    """The base model without its weights (on the meta device): its modules and shapes, in no memory.

    Raises:
        ArchitectureError: if transformers has no causal language model of its kind.
        LoraflowError: if it cannot be found or read.
    """
    config = read_base_config(base, options)
    with torch.device("meta"):
        return _auto_class(config).from_config(config, trust_remote_code=options.trust_remote_code)


def read_base_config(base: str | Path, options: BaseOptions) -> PreTrainedConfig:
    """The configuration of a base model, which is quick to read, and wrong where the base is.

    Raises:
        ArchitectureError: if transformers has no causal language model of its kind.
        LoraflowError: if it cannot be found or read.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            base, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError) as error:
        # The first lines of transformers' messages name the cause; the rest is general advice.
        reason = str(error).strip().partition("\n")[0]
        raise LoraflowError(
            f"The base model {str(base)!r} cannot be read: {reason} Give a Hub id, or a directory with a config.json."
        ) from error
    if _auto_class(config) is None:
        raise ArchitectureError(
            f"{str(base)!r} is a {config.model_type!r} model, for which transformers has no causal language model. "
            "Only decoder-only models can be fused."
        )
    return config


def _auto_class(config: PreTrainedConfig) -> Any:
    """What loads such a base: as a causal language model, or as one that reads images too; None for any other."""
    remote = getattr(config, "auto_map", None) or {}
    found = [
        auto_class
        for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
        if type(config) in auto_class._model_mapping or auto_class.__name__ in remote
    ]
    # Of some there is a class that leaves the images out too; the files are of the one that they name.
    of_files = [one for one in found if _class_name(one, config) in (config.architectures or ())]
    return next(iter([*of_files, *found]), None)


def _class_name(auto_class: Any, config: PreTrainedConfig) -> str | None:
    mapped = auto_class._model_mapping
    return mapped[type(config)].__name__ if type(config) in mapped else None


def load_tokenizer(base: str | Path, options: BaseOptions) -> PreTrainedTokenizerBase:
    """Load a base model's tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(
        base, revision=options.revision, trust_remote_code=options.trust_remote_code
    )


def find_tokenizer(base: str | Path, options: BaseOptions) -> PreTrainedTokenizerBase | None:
    """A base model's tokenizer, or None where there are no files of one.

    Such a base is whole for callers that bring token ids; text needs `tokenizer=`, and says so.
    """
    try:
        return load_tokenizer(base, options)
    except (OSError, ValueError):
        return None


def _bitsandbytes_config(options: BaseOptions) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise LoraflowError(
            f"`quantization` (={options.quantization!r}) needs bitsandbytes: pip install 'loraflow[quantization]'."
        ) from error
    from transformers import BitsAndBytesConfig

    if options.quantization == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = options.dtype if isinstance(options.dtype, torch.dtype) else getattr(torch, options.dtype, torch.bfloat16)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )

"""A recipe as transformers' `TrainingArguments`, and these as a recipe."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from loraflow.errors import LoraflowError, did_you_mean
from loraflow.training.recipes import SCHEDULES

# Arguments that could change what is learned, and that no recipe has. Every other one is of folders, logging,
# evaluation, the Hub, data loading or devices.
_FOREIGN = (
    "lr_scheduler_kwargs",
    "optim_args",
    "optim_target_modules",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "neftune_noise_alpha",
    "auto_find_batch_size",
    "use_liger_kernel",
    "data_seed",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "torch_compile",
    "fsdp",
    "deepspeed",
    "parallelism_config",
)
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def training_arguments(config: Any, output_dir: str | Path, overrides: Mapping[str, Any]) -> TrainingArguments:
    """A recipe, a `FitConfig`, as transformers' `Trainer` takes it.

    Raises:
        LoraflowError: if transformers has no argument of an override's name.
    """
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in overrides:
        if name not in known:
            raise LoraflowError(f"`TrainingArguments` has no {name!r}. {did_you_mean(name, known)}")
    of_recipe: dict[str, Any] = {
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size // config.gradient_accumulation,
        "per_device_eval_batch_size": config.batch_size // config.gradient_accumulation,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": SCHEDULES[config.schedule],
        # Below 1 this is a share of all steps.
        "warmup_steps": config.warmup,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "adam_epsilon": config.epsilon,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "seed": config.seed,
        "save_strategy": "epoch" if config.checkpoint_steps is None else "steps",
        "save_steps": config.checkpoint_steps or 500,
        "save_total_limit": config.keep_last,
        "report_to": list(config.report_to) or "none",
    }
    return TrainingArguments(**{"output_dir": str(output_dir), **of_recipe, **overrides})


def settings_of(arguments: TrainingArguments) -> dict[str, Any]:
    """The fields of a recipe that `TrainingArguments` have.

    Raises:
        LoraflowError: if one changes what is learned in a way that a recipe cannot say.
    """
    _refuse_foreign(arguments)
    schedule = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    names = {theirs: ours for ours, theirs in SCHEDULES.items()} | {"constant": "constant"}
    optimizer = getattr(arguments.optim, "value", arguments.optim)
    for name, value, known in (("lr_scheduler_type", schedule, names), ("optim", optimizer, _OPTIMIZERS)):
        if value not in known:
            raise LoraflowError(f"`{name}` (={value!r}) is none that a fit has: {', '.join(known)}. Give one of these.")
    if arguments.warmup_steps >= 1:
        raise LoraflowError(
            f"`warmup_steps` (={arguments.warmup_steps}) is a number of steps, and a recipe has a share of them. Give "
            "one below 1, such as 0.1."
        )
    strategy = getattr(arguments.save_strategy, "value", arguments.save_strategy)
    epochs = arguments.num_train_epochs
    return {
        "epochs": int(epochs) if epochs == int(epochs) else epochs,
        "max_steps": arguments.max_steps if arguments.max_steps > 0 else None,
        "learning_rate": arguments.learning_rate,
        "batch_size": arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
        "gradient_accumulation": arguments.gradient_accumulation_steps,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "epsilon": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        # transformers' own "constant" has no rise.
        "warmup": 0.0 if schedule == "constant" else arguments.warmup_steps,
        "schedule": names[schedule],
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "seed": arguments.seed,
        "checkpoint_steps": int(arguments.save_steps) if strategy == "steps" else None,
        **({"keep_last": arguments.save_total_limit} if arguments.save_total_limit else {}),
        "report_to": tuple(arguments.report_to or ()),
    }


def _refuse_foreign(arguments: TrainingArguments) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = TrainingArguments(output_dir=str(arguments.output_dir), use_cpu=arguments.use_cpu)
    for name in _FOREIGN:
        value = getattr(arguments, name, None)
        if value != getattr(usual, name, None):
            raise LoraflowError(
                f"`{name}` (={value!r}) has no counterpart in a recipe, and would change what is learned. Leave it "
                f"at {getattr(usual, name, None)!r}."
            )

"""One training run: transformers' `Trainer`, with whole checkpoints and resume; a score may decide, not the loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from loraflow.answers import padding_id, require_tokenizer
from loraflow.files import write_atomically
from loraflow.training.batches import ByLength, Packed, check_packing
from loraflow.training.capacity import announce, settle
from loraflow.training.checkpoints import (
    COMPLETE,
    RUN_FILE,
    complete_checkpoints,
    remove_checkpoints,
    resumable_checkpoint,
)
from loraflow.training.config import FitConfig, FitResult, Run
from loraflow.training.data import Collator, FitData
from loraflow.training.loss import mean_score
from loraflow.training.progress import RichProgress

_KEEP = 2
_FORWARDS = "forwards of a step"


def train(
    model: Any,
    data: FitData,
    run: Run,
    identity: Mapping[str, Any],
    label: str,
    start: Callable[[FitConfig], Mapping[str, Any]] = lambda config: {},
) -> tuple[FitResult, dict[str, Any]]:
    """Train what a model's `state_dict` holds, or go on with a training that was interrupted.

    Args:
        model: a module with the base's `forward`, `tokenizer` and `prompt`, whose `state_dict` is what is learned.
        data: its examples.
        run: the recipe, and where it is run.
        identity: what makes two runs the same one, as JSON values.
        label: what the progress bar says.
        start: brings the model to where training starts, by a recipe whose forwards are settled; what it gives is kept
            with the run, and given back.
    """
    if run.config.packing:
        check_packing(model)
    checkpoint = resumable_checkpoint(identity, run.directory) if run.resume else None
    if checkpoint is None:
        remove_checkpoints(run.directory)
        settled = settle(model, data.train, run.config)
        begun = {**identity, **start(settled), _FORWARDS: settled.gradient_accumulation}
        write_atomically(run.directory / RUN_FILE, json.dumps(begun).encode())
    recorded = json.loads((run.directory / RUN_FILE).read_text())
    # A resumed run goes on with the forwards that it began with, whatever fits now.
    config = dataclasses.replace(run.config, gradient_accumulation=recorded[_FORWARDS])
    announce(model, data.train, config, run.console)
    run = dataclasses.replace(run, config=config)
    trainer = make_trainer(model, data, run, label)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return outcome_of(trainer, has_dev=data.dev is not None), recorded


@contextlib.contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Give back, after the block, what the Trainer changes of a model: its mode, cache, and checkpointing."""
    base: Any = getattr(model, "base_model", model)
    training, checkpointing = model.training, base.is_gradient_checkpointing
    use_cache = getattr(base.config, "use_cache", None)
    try:
        yield
    finally:
        if use_cache is not None:
            base.config.use_cache = use_cache
        if base.is_gradient_checkpointing and not checkpointing:
            base.gradient_checkpointing_disable()
        model.train(training)


def make_trainer(model: Any, data: FitData, run: Run, label: str) -> WholeCheckpointTrainer:
    """transformers' trainer, set to a recipe."""
    score = None
    if run.score is not None:
        score = functools.partial(mean_score, model, data.dev_examples, run.config.score_max_new_tokens, run.score)
    padded = Collator(padding_id(require_tokenizer(model.tokenizer)))
    trainer = WholeCheckpointTrainer(
        model=model,
        args=_arguments(model, run.config, run.directory, has_dev=data.dev is not None, scored=score is not None),
        train_dataset=data.train,
        eval_dataset=data.dev,
        data_collator=Packed() if run.config.packing else padded,
        dev_collator=padded,
        sampler=ByLength(data.train, run.config.batch_size, run.config.seed) if run.config.group_by_length else None,
        callbacks=[RichProgress(run.console, label)],
        score=score,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def _arguments(model: Any, config: FitConfig, directory: Path, *, has_dev: bool, scored: bool) -> TrainingArguments:
    strategy = "epoch" if config.checkpoint_steps is None else "steps"
    on_cpu = model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.forward_size,
        gradient_accumulation_steps=config.batch_size // config.forward_size,
        per_device_eval_batch_size=config.forward_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        # Below 1 this is a share of all steps.
        warmup_steps=config.warmup,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        logging_steps=1,
        save_strategy=strategy,
        save_steps=config.checkpoint_steps or 500,
        eval_strategy=strategy if has_dev else "no",
        eval_steps=config.checkpoint_steps or 500,
        load_best_model_at_end=has_dev,
        metric_for_best_model="eval_score" if scored else "eval_loss",
        greater_is_better=scored,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
    )
    # One process, one replica: several GPUs hold the layers of one model (device_map), not copies of it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class WholeCheckpointTrainer(Trainer):
    """Trains what a model's `state_dict` holds.

    A checkpoint holds that (a fusion's gates, or an adapter) and the trainer's state, never the base. It counts only
    once its `COMPLETE` file stands: a crash while writing costs one checkpoint.

    The order of the examples may be another sampler's. Dev examples are always in padded batches: their loss is a mean
    over rows, which packed ones no longer are.
    """

    def __init__(
        self,
        *args: Any,
        dev_collator: Collator,
        sampler: Sampler | None = None,
        score: Callable[[], float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._dev_collator = dev_collator
        self._sampler = sampler
        self._score = score

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        return self._sampler or super()._get_train_sampler(*args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Trainer's, with dev examples in padded batches."""
        collator, self.data_collator = self.data_collator, self._dev_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's loss on the dev examples, and their score where one is asked for."""
        metrics = super().evaluate(*args, **kwargs)
        if self._score is not None:
            assert self.model is not None
            self.model.eval()
            metrics["eval_score"] = self._score()
            self.log({"eval_score": metrics["eval_score"]})
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        # What a crash left there may be half of a checkpoint.
        shutil.rmtree(checkpoint, ignore_errors=True)
        super()._save_checkpoint(model, trial)
        (checkpoint / COMPLETE).touch()
        self._drop_old_checkpoints(checkpoint.parent)

    def _drop_old_checkpoints(self, directory: Path) -> None:
        best = self.state.best_model_checkpoint
        for old in complete_checkpoints(directory)[:-_KEEP]:
            if best is None or old != Path(best):
                # First the mark, so that a crash in between leaves no checkpoint that counts and is not whole.
                (old / COMPLETE).unlink()
                shutil.rmtree(old, ignore_errors=True)


def outcome_of(trainer: Trainer, *, has_dev: bool) -> FitResult:
    """Read the log of a finished training, whose every step was logged."""
    state = trainer.state
    losses = logged(state.log_history, "loss")
    last_epoch = losses[-max(1, round(len(losses) / max(1.0, state.epoch or 1.0))) :]
    kept = (state.best_global_step if has_dev else None) or state.global_step
    return FitResult(
        steps=state.global_step,
        train_loss=sum(loss for _, loss in last_epoch) / len(last_epoch),
        dev_loss=dict(logged(state.log_history, "eval_loss")).get(kept),
        dev_score=dict(logged(state.log_history, "eval_score")).get(kept),
        kept_step=kept,
        log=losses,
    )


def logged(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """All values of a key in the trainer's log, as (step, value)."""
    return [(int(entry["step"]), float(entry[key])) for entry in history if key in entry]

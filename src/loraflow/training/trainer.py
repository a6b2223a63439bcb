"""One training run: transformers' `Trainer`, with whole checkpoints and resume; a score may decide, not the loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from loraflow.answers import padding_id, require_tokenizer
from loraflow.errors import LoraflowError, TrainingError
from loraflow.files import make_folder, write_atomically
from loraflow.training.batches import ByLength, Packed, check_packing
from loraflow.training.capacity import announce, settle
from loraflow.training.checkpoints import (
    COMPLETE,
    LAST_GOOD,
    RUN_FILE,
    complete_checkpoints,
    remove_checkpoints,
    resumable_checkpoint,
)
from loraflow.training.config import FitConfig, FitResult, Run
from loraflow.training.data import IGNORED, Collator, FitData, Shared, TokenExamples
from loraflow.training.guard import Guard
from loraflow.training.loss import mean_score
from loraflow.training.prefix import read_prefix
from loraflow.training.processes import ALONE, Processes
from loraflow.training.progress import RichProgress
from loraflow.training.reporting import WatchedWeights, reporting
from loraflow.training.state_files import (
    load_optimizer,
    load_random_state,
    load_scheduler,
    save_optimizer,
    save_random_state,
    save_scheduler,
)

_FORWARDS = "forwards of a step"
_RANDOM_FILE = "rng_state_{}.safetensors"


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

    Raises:
        LoraflowError: if it is to stop early and there are no dev examples.
        TrainingError: if it diverges.
    """
    if run.config.early_stopping is not None and data.dev is None:
        raise LoraflowError(
            f"`early_stopping` (={run.config.early_stopping}) needs dev examples to decide on. Give `dev`."
        )
    processes = run.processes
    processes.check_batches(run.config.batch_size, run.config.gradient_accumulation)
    if run.config.packing:
        check_packing(model)
    processes.agree(identity, "run: recipe, data, base or adapters")
    checkpoint = processes.ask(lambda: resumable_checkpoint(identity, run.directory) if run.resume else None)
    if checkpoint is None:
        processes.ask(lambda: remove_checkpoints(run.directory))
        settled = settle(model, data.train, run.config)
        begun = json.dumps({**identity, **start(settled), _FORWARDS: settled.gradient_accumulation})
        processes.ask(lambda: write_atomically(run.directory / RUN_FILE, begun.encode()))
    processes.check_sees(run.directory / RUN_FILE)
    recorded = json.loads((run.directory / RUN_FILE).read_text())
    if run.config.gradient_accumulation == "auto":
        # A resumed run goes on with the forwards that it began with, whatever fits now.
        run = dataclasses.replace(
            run, config=dataclasses.replace(run.config, gradient_accumulation=recorded[_FORWARDS])
        )
    # Of a search, the first setting has said it; a sharded base wants all processes in a forward, and whole ones only.
    if processes.first and not processes.sharded and not run.label:
        announce(model, data.train, run.config, run.console)
    with reporting(model, data, run) as (callbacks, watch):
        trainer = make_trainer(model, data, run, label, callbacks, watch)
        processes.spread(model.state_dict().values())
        _carry_out(trainer, model, run, checkpoint)
    return outcome_of(trainer, has_dev=data.dev is not None), recorded


def _carry_out(trainer: WholeCheckpointTrainer, model: Any, run: Run, checkpoint: Path | None) -> None:
    """Train to the end, or as far as what is learned stays good.

    Raises:
        TrainingError: if the training diverges.
    """
    if checkpoint is not None and trainer.has_stopped(checkpoint):
        trainer.take_best(run.directory)
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.args.load_best_model_at_end:
            # Trainer goes by the path that the best one had, and a run may have been moved since.
            trainer.take_best(run.directory)
    except TrainingError as error:
        model.load_state_dict(trainer.guard.good)
        if run.lasting:
            trainer.save_model(str(run.directory / LAST_GOOD))
            raise TrainingError(f"{error} It is saved in {run.directory / LAST_GOOD}.") from None
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, RichProgress):
                callback.close()


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


def make_trainer(
    model: Any,
    data: FitData,
    run: Run,
    label: str,
    callbacks: Sequence[TrainerCallback] = (),
    watch: Callable[[], WatchedWeights] | None = None,
) -> WholeCheckpointTrainer:
    """transformers' trainer, set to a recipe."""
    score = None
    if run.score is not None:
        score = functools.partial(
            mean_score, model, data.dev_examples, run.config.score_max_new_tokens, run.score, run.processes.apart
        )
    padded = Collator(padding_id(require_tokenizer(model.tokenizer)))
    trainer = WholeCheckpointTrainer(
        model=model,
        args=_arguments(model, data, run, scored=score is not None),
        train_dataset=data.train,
        eval_dataset=data.dev,
        data_collator=Shared(Packed() if run.config.packing else padded, run.processes),
        dev_collator=Shared(padded, run.processes),
        sampler=ByLength(data.train, run.config.batch_size, run.config.seed) if run.config.group_by_length else None,
        callbacks=[RichProgress(run.console, label), *callbacks],
        score=score,
        guard=Guard(model, data),
        patience=run.config.early_stopping,
        keep=run.config.keep_last,
        watch=watch,
        processes=run.processes,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def _arguments(model: Any, data: FitData, run: Run, *, scored: bool) -> TrainingArguments:
    on_cpu, has_dev, config = model.device.type == "cpu", data.dev is not None, run.config
    arguments = config.training_arguments(
        run.directory,
        num_train_epochs=config.epochs_over(len(data.train)),
        # Whole checkpoints are counted here: transformers would count halves.
        save_total_limit=None,
        # Ours knows the epoch, and transformers' would sort dev examples too.
        train_sampling_strategy="random",
        eval_strategy=("epoch" if config.checkpoint_steps is None else "steps") if has_dev else "no",
        eval_steps=config.checkpoint_steps or 500,
        load_best_model_at_end=has_dev,
        metric_for_best_model="eval_score" if scored else "eval_loss",
        greater_is_better=scored,
        logging_steps=1,
        # A loss that is not finite is to be seen.
        logging_nan_inf_filter=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        # Trackers come as callbacks: the picture of the weights is to be drawn before they close.
        report_to="none",
        disable_tqdm=True,
        # What an example is added to a batch for, to make it even, would have it in the loss twice.
        accelerator_config={"even_batches": False},
    )
    # One process, one replica: several GPUs hold the layers of one model (device_map), not copies of it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class WholeCheckpointTrainer(Trainer):
    """Trains what a model's `state_dict` holds.

    A checkpoint holds that (a fusion's gates, or an adapter) and the trainer's state, never the base, and no pickle. It
    counts only once its `COMPLETE` file stands: a crash while writing costs one checkpoint.

    With FSDP and DeepSpeed, the optimizer's and the schedule's state is as these write it.

    The order of the examples may be another sampler's. Dev examples are always in padded batches: their loss is a mean
    over rows, which packed ones no longer are.
    """

    def __init__(
        self,
        *args: Any,
        guard: Guard,
        dev_collator: Shared,
        sampler: Sampler | None = None,
        score: Callable[[], float] | None = None,
        patience: int | None = None,
        keep: int = FitConfig.keep_last,
        watch: Callable[[], WatchedWeights] | None = None,
        processes: Processes = ALONE,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.guard = guard
        self._dev_collator, self._sampler = dev_collator, sampler
        self._score, self._patience, self._keep, self._watch = score, patience, keep, watch
        self._processes = processes
        if processes.count > 1 and not self.model_accepts_loss_kwargs:
            raise LoraflowError(
                f"{processes.count} processes cannot fit this base: the loss that its forward gives is a mean over the "
                "answers of each, not over those of all. Fit it with one process."
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's accelerator, which wraps no model: of one, the processes exchange the gradients of the gates."""
        super().create_accelerator_and_postprocess()
        prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        vars(self.accelerator)["prepare_model"] = prepare_model

    def get_train_dataloader(self) -> DataLoader:
        """Whole batches in each process, in the same order; the collator takes its rows."""
        return _whole_batches(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Whole batches in each process, as for training, but with dev examples in padded ones."""
        collator, self.data_collator = self.data_collator, self._dev_collator
        try:
            return _whole_batches(super().get_eval_dataloader(*args, **kwargs))
        finally:
            self.data_collator = collator

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next step, which the guard has seen."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.guard.begin(batches)
        return batches, count

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward, the last of a step with the gradients of all processes; stops if not finite."""
        loss = super().training_step(*args, **kwargs)
        if self._processes.count == 1:
            # Of several, one may be alone with it: the norm of all gradients says it to each of them.
            self.guard.check(self.state.global_step + 1, "loss", loss)
        if self.accelerator.sync_gradients:
            self._processes.average_gradients(cast(nn.Module, self.model).parameters())
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None:
            self.guard.check(self.state.global_step + 1, "gradient's norm", norm)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log; a loss that has exploded ends the training."""
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            losses = [loss for _, loss in logged(self.state.log_history, "loss")]
            self.guard.note(self.state.global_step, losses)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        return self._sampler or super()._get_train_sampler(*args, **kwargs)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The mean loss of all response tokens, however batches and processes divide them."""
        model = cast(nn.Module, self.model).eval()
        prefix = None if self._processes.sharded else read_prefix(model, cast(TokenExamples, dataloader.dataset).rows)
        total, tokens = 0.0, 0
        for inputs in dataloader:
            count = int((inputs["labels"][:, 1:] != IGNORED).sum())
            inputs = self._prepare_inputs(inputs)
            loss = cast(Tensor, self.compute_loss(model, inputs if prefix is None else prefix.rest(inputs)))
            # A process that has no rows of a batch has no mean of them.
            total += loss.item() * count if count else 0.0
            tokens += count
        total, all_tokens = self._processes.total(total, tokens)
        metrics = {f"{metric_key_prefix}_loss": total / all_tokens}
        return EvalLoopOutput(cast(Any, None), None, metrics, num_samples=self.num_examples(dataloader))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's loss on the dev examples, and their score where one is asked for."""
        metrics = super().evaluate(*args, **kwargs)
        if self._score is not None:
            assert self.model is not None
            self.model.eval()
            metrics["eval_score"] = self._score()
            self.log({"eval_score": metrics["eval_score"]})
        if self._out_of_patience(self.state):
            self.control.should_training_stop = True
        return metrics

    def _out_of_patience(self, state: TrainerState) -> bool:
        """Whether the last evaluations have found nothing better; the log knows, also after a resume."""
        found = [value for _, value in logged(state.log_history, str(self.args.metric_for_best_model))]
        if self._patience is None or not found:
            return False
        sign = 1 if self.args.greater_is_better else -1
        # What is not finite is never better.
        merits = [sign * value if math.isfinite(value) else -math.inf for value in found]
        return len(merits) - 1 - merits.index(max(merits)) >= self._patience

    def has_stopped(self, checkpoint: Path) -> bool:
        """Whether the run of a checkpoint had stopped early with it."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        stopped = self._out_of_patience(state)
        if stopped:
            self.state = state
        return stopped

    def take_best(self, directory: Path) -> None:
        """Take what the run had learned at its best checkpoint, wherever its directory is now."""
        if self.state.best_global_step:
            best = directory / f"checkpoint-{self.state.best_global_step}"
            assert self.model is not None
            self.model.load_state_dict(load_file(best / SAFE_WEIGHTS_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads: the recipe stands with the run.
        (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_optimizer(self.optimizer, Path(output_dir))
            save_scheduler(self.lr_scheduler, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.optimizer, Path(checkpoint))
        load_scheduler(self.lr_scheduler, Path(checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        make_folder(Path(output_dir))
        save_random_state(Path(output_dir) / self._random_file(), every_device=self.args.world_size <= 1)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            own, first = Path(checkpoint) / self._random_file(), Path(checkpoint) / _RANDOM_FILE.format(0)
            # Of fewer processes than there are now, some have left no state.
            load_random_state(own if own.is_file() else first, every_device=self.args.world_size <= 1)

    def _random_file(self) -> str:
        return _RANDOM_FILE.format(self.args.process_index)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        # What a crash left there may be half of a checkpoint.
        self._processes.ask(lambda: shutil.rmtree(checkpoint, ignore_errors=True))
        if self._watch is not None:
            self.log(self._watch().curves())
        super()._save_checkpoint(model, trial)
        # Every process writes the state of its random numbers.
        self._processes.gather(None)
        self._processes.ask((checkpoint / COMPLETE).touch)
        self._processes.ask(lambda: self._drop_old_checkpoints(checkpoint.parent))

    def _drop_old_checkpoints(self, directory: Path) -> None:
        for old in complete_checkpoints(directory)[: -self._keep]:
            if old.name != f"checkpoint-{self.state.best_global_step}":
                # First the mark, so that a crash in between leaves no checkpoint that counts and is not whole.
                (old / COMPLETE).unlink()
                shutil.rmtree(old, ignore_errors=True)


def _whole_batches(loader: DataLoader) -> DataLoader:
    """Undo accelerate's division of a loader's batches among the processes, as Trainer does for its own samplers."""
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard):
        shard.num_processes, shard.process_index = 1, 0
    return loader


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

"""Learning a method's gates from a few examples, by the paper's recipe, with resume and grid search."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from loraflow.answers import generate_answers, padding_id, require_tokenizer
from loraflow.errors import LoraflowError, MethodError
from loraflow.examples import Example, parse_examples
from loraflow.storage import write_atomically
from loraflow.training.config import SEARCH_GRID, FitConfig, FitResult
from loraflow.training.data import Collator, TokenExamples, tokenize
from loraflow.training.progress import RichProgress
from loraflow.training.trainer import GateTrainer, complete_checkpoints, logged

if TYPE_CHECKING:
    from loraflow.model import FusedModel

Score = Callable[[str, Mapping[str, Any]], float]
"""Scores a generated answer against its example's record."""

_RUN_FILE = "run.json"
_RESULT_FILE = "result.json"
_GATES_FILE = "gates.safetensors"


@dataclasses.dataclass(frozen=True)
class _Data:
    train: TokenExamples
    dev: TokenExamples | None
    dev_examples: Sequence[Example]
    digest: str


def fit(
    model: FusedModel,
    examples: Sequence[Mapping[str, Any] | Example],
    *,
    dev: Sequence[Mapping[str, Any] | Example] | None = None,
    config: FitConfig | None = None,
    score: Score | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> FitResult:
    """Learn the gates of a fused model's method; base and adapters stay as they are.

    Args:
        model: the fused model; its gates are changed in place.
        examples: training examples, `{"prompt", "completion"}` or `{"messages"}`.
        dev: examples on which the best checkpoint is chosen; without them, the last one is kept.
        config: the recipe; by default the paper's.
        score: choose by the mean of this over generated answers to the dev examples, not by their loss.
        checkpoints: directory for checkpoints; a temporary one by default.
        resume: go on from the newest whole checkpoint there, if there is one.
        console: where progress is shown; standard error by default.

    Returns:
        Losses, time, and which examples were cut.

    Raises:
        LoraflowError: if `score` comes without `dev`, or a resumed run differs from the interrupted one.
        MethodError: if the method learns nothing.
    """
    config = config or FitConfig()
    if not model.method.learns:
        raise MethodError(f"The method {model.method.name!r} learns nothing: there is nothing to fit. Use it as it is.")
    if score is not None and dev is None:
        raise LoraflowError("Choosing by a score needs dev examples. Give `dev`.")
    data = _prepare(model, examples, dev, config)
    console = console or Console(stderr=True)
    with contextlib.ExitStack() as stack:
        directory = Path(checkpoints or stack.enter_context(tempfile.TemporaryDirectory()))
        result = _run(model, data, config, score, directory, resume, console, "fitting gates")
    model.training_record = _record(config, data, result)
    return result


def search(
    model: FusedModel,
    examples: Sequence[Mapping[str, Any] | Example],
    *,
    dev: Sequence[Mapping[str, Any] | Example],
    config: FitConfig | None = None,
    grid: Sequence[Mapping[str, Any]] = SEARCH_GRID,
    score: Score | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> FitResult:
    """Fit once for each setting of a grid (by default the paper's); keep the gates that are best on the dev examples.

    Args:
        model: the fused model; its gates are changed in place.
        examples: training examples.
        dev: the examples that decide.
        config: the recipe that the grid's settings change.
        grid: settings, as fields of `FitConfig`.
        score: decide by the mean of this over generated answers, not by the loss.
        checkpoints: directory for checkpoints and finished settings; a temporary one by default.
        resume: keep finished settings there, and go on with the interrupted one.
        console: where progress is shown; standard error by default.

    Returns:
        The best setting's result, with all settings' dev results in `search`.
    """
    config = config or FitConfig()
    console = console or Console(stderr=True)
    table: list[dict[str, Any]] = []
    best: tuple[float, FitResult, dict[str, torch.Tensor], dict[str, Any]] | None = None
    with contextlib.ExitStack() as stack:
        root = Path(checkpoints or stack.enter_context(tempfile.TemporaryDirectory()))
        for number, setting in enumerate(grid, start=1):
            cell = dataclasses.replace(config, **setting)
            directory = root / "-".join(f"{key}={value}" for key, value in setting.items())
            data = _prepare(model, examples, dev, cell)
            label = f"search {number}/{len(grid)}, " + ", ".join(f"{key} {value}" for key, value in setting.items())
            identity = _identity(model, data, cell, score)
            result = _finished(model, identity, directory) if resume else None
            if result is None:
                result = _run(model, data, cell, score, directory, resume, console, label)
                _finish(model, identity, result, directory)
            merit = result.dev_score if score is not None else -_known(result.dev_loss)
            console.print(
                f"{label}: dev loss {_known(result.dev_loss):.4f}" + (f", score {merit:.4f}" if score else "")
            )
            table.append({**setting, "dev_loss": result.dev_loss, "dev_score": result.dev_score})
            if best is None or _known(merit) > best[0]:
                gates = {name: value.clone() for name, value in model.state_dict().items()}
                best = (_known(merit), result, gates, _record(cell, data, result))
    assert best is not None
    model.load_state_dict(best[2])
    model.training_record = {**best[3], "search": table}
    return dataclasses.replace(best[1], search=table)


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _prepare(model: FusedModel, examples: Any, dev: Any, config: FitConfig) -> _Data:
    tokenizer = require_tokenizer(model.tokenizer)
    max_length = config.max_length or min(
        2048, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    )
    train = tokenize(parse_examples(examples), tokenizer, model.prompt, max_length)
    dev_examples = parse_examples(dev) if dev is not None else []
    dev_rows = tokenize(dev_examples, tokenizer, model.prompt, max_length) if dev_examples else None
    rows = [[dataclasses.astuple(row) for row in split.rows] for split in (train, dev_rows) if split is not None]
    return _Data(train, dev_rows, dev_examples, hashlib.sha256(json.dumps(rows).encode()).hexdigest())


def _run(
    model: FusedModel,
    data: _Data,
    config: FitConfig,
    score: Score | None,
    directory: Path,
    resume: bool,
    console: Console,
    label: str,
) -> FitResult:
    started = time.perf_counter()
    identity = _identity(model, data, config, score)
    checkpoint = _checkpoint(identity, directory) if resume else None
    model.training_record = None
    if checkpoint is None:
        remove_checkpoints(directory)
        directory.mkdir(parents=True, exist_ok=True)
        start_losses = _set_start(model, data.train, config)
        write_atomically(directory / _RUN_FILE, json.dumps({**identity, "start_losses": start_losses}).encode())
    run = json.loads((directory / _RUN_FILE).read_text())
    with _training_state(model, config):
        trainer = _trainer(model, data, config, score, directory, console, label)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = trainer.state.log_history
    losses = logged(history, "loss")
    last_epoch = losses[-max(1, len(losses) // config.epochs) :]
    kept = trainer.state.best_global_step if data.dev is not None else None
    kept = kept or trainer.state.global_step
    return FitResult(
        start=_start_weights(model, run["start_losses"]),
        start_losses=run["start_losses"],
        steps=trainer.state.global_step,
        train_loss=sum(loss for _, loss in last_epoch) / len(last_epoch),
        dev_loss=dict(logged(history, "eval_loss")).get(kept),
        dev_score=dict(logged(history, "eval_score")).get(kept),
        kept_step=kept,
        seconds=time.perf_counter() - started,
        truncated=data.train.truncated,
        log=losses,
    )


def _trainer(
    model: FusedModel,
    data: _Data,
    config: FitConfig,
    score: Score | None,
    directory: Path,
    console: Console,
    label: str,
) -> GateTrainer:
    strategy = "epoch" if config.checkpoint_steps is None else "steps"
    has_dev = data.dev is not None
    on_cpu = model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // config.gradient_accumulation,
        gradient_accumulation_steps=config.gradient_accumulation,
        per_device_eval_batch_size=config.batch_size // config.gradient_accumulation,
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
        metric_for_best_model="eval_score" if score is not None else "eval_loss",
        greater_is_better=score is not None,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
    )
    # One process, one replica: several GPUs hold the layers of one model (device_map), not copies of it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = GateTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.dev,
        data_collator=Collator(padding_id(require_tokenizer(model.tokenizer))),
        callbacks=[RichProgress(console, label)],
        score=_scorer(model, data.dev_examples, config, score) if score is not None else None,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def _scorer(model: FusedModel, examples: Sequence[Example], config: FitConfig, score: Score) -> Callable[[], float]:
    def mean_score() -> float:
        answers = generate_answers(
            model,
            [example.messages for example in examples],
            tokenizer=require_tokenizer(model.tokenizer),
            prompt=model.prompt,
            max_new_tokens=config.score_max_new_tokens,
        )
        scores = [score(answer, record) for answer, record in zip(answers, records, strict=True)]
        return sum(scores) / len(scores)

    # Wherever the completion came from, scorers find it under one name.
    records = [{**example.record, "completion": example.completion} for example in examples]
    for record in records:
        # One that lacks what the scorer reads should say so now, not after the first epoch.
        score("", record)
    return mean_score


def _set_start(model: FusedModel, train: TokenExamples, config: FitConfig) -> dict[str, float]:
    """Bring the gates to where training starts; gives each adapter's loss where those decide."""
    losses: dict[str, float] = {}
    if model.method.starts_at_best:
        for name in model.adapter_names:
            with model.using(name):
                losses[name] = mean_loss(model, train, config.batch_size // config.gradient_accumulation)
    model.set_method(model.method)
    start = _start_weights(model, losses)
    for gate in model.gates.values() if start else ():
        cast(Any, gate).start_at(list(start.values()))
    return losses


def _start_weights(model: FusedModel, losses: Mapping[str, float]) -> dict[str, float]:
    best = min(losses, key=losses.__getitem__) if losses else None
    weights = model.method.start_weights(model.adapter_names, best)
    return {} if weights is None else dict(zip(model.adapter_names, weights, strict=True))


@torch.no_grad()
def mean_loss(model: FusedModel, data: TokenExamples, batch_size: int) -> float:
    """Mean negative log-likelihood of the response tokens, in nats a token."""
    collate = Collator(0)
    total, tokens = 0.0, 0
    model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data[i].input_ids))
    for start in range(0, len(order), batch_size):
        batch = {
            key: value.to(model.device)
            for key, value in collate([data[i] for i in order[start : start + batch_size]]).items()
        }
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        tokens += int((labels != -100).sum())
    return total / tokens


@contextlib.contextmanager
def _training_state(model: FusedModel, config: FitConfig) -> Iterator[None]:
    """Adapter dropout inside the block, and afterwards what the Trainer changed of the base as it was before."""
    fusions, use_cache = model._attachment.fusions, getattr(model.config, "use_cache", None)
    checkpointing = model.is_gradient_checkpointing
    try:
        for fusion in fusions:
            fusion.set_dropout(config.adapter_dropout)
        yield
    finally:
        for fusion in fusions:
            fusion.set_dropout(0.0)
        if use_cache is not None:
            model.config.use_cache = use_cache
        if config.gradient_checkpointing and not checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()


def _identity(model: FusedModel, data: _Data, config: FitConfig, score: Score | None) -> dict[str, Any]:
    """What makes two runs the same one, as JSON values."""
    identity = {
        "method": {"name": model.method.name, **model.method.parameters()},
        "base": model._base.model_dump(exclude={"path", "revision"}),
        "adapters": {adapter.name: adapter.digest for adapter in model.adapters},
        "data": data.digest,
        "dev metric": "loss" if score is None else getattr(score, "__name__", type(score).__name__),
        "config": dataclasses.asdict(config),
    }
    return json.loads(json.dumps(identity))


def _checkpoint(identity: Mapping[str, Any], directory: Path) -> Path | None:
    """The newest whole checkpoint of this very run; None where there is none yet.

    Raises:
        LoraflowError: if the checkpoints are another run's.
    """
    found = complete_checkpoints(directory)
    if not found or not (directory / _RUN_FILE).is_file():
        return None
    recorded = json.loads((directory / _RUN_FILE).read_text())
    for key, value in identity.items():
        if recorded.get(key) != value:
            raise LoraflowError(
                f"Cannot resume from {found[-1]}: its run had another `{key}`. Give the same arguments and data as "
                "then, or start afresh without --resume."
            )
    return found[-1]


def remove_checkpoints(directory: Path) -> None:
    """Remove what a run left in its checkpoint directory, those of a search included, and nothing else.

    Raises:
        LoraflowError: if there are checkpoints that no run of this library made.
    """
    for cell in directory.glob(f"*/{_RUN_FILE}"):
        remove_checkpoints(cell.parent)
    checkpoints = list(directory.glob("checkpoint-*"))
    if checkpoints and not (directory / _RUN_FILE).is_file():
        raise LoraflowError(f"{checkpoints[0]} is no checkpoint of this library. Give another directory.")
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    for name in (_RESULT_FILE, _GATES_FILE, _RUN_FILE):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _finish(model: FusedModel, identity: Mapping[str, Any], result: FitResult, directory: Path) -> None:
    """Keep a finished setting of a search; its result is written last, and counts once it is there."""
    from safetensors.torch import save

    write_atomically(directory / _GATES_FILE, save({k: v.cpu().contiguous() for k, v in model.state_dict().items()}))
    text = json.dumps({"identity": identity, "result": dataclasses.asdict(result)})
    write_atomically(directory / _RESULT_FILE, text.encode())


def _finished(model: FusedModel, identity: Mapping[str, Any], directory: Path) -> FitResult | None:
    """A finished setting of this very search, its gates loaded; None where it is not finished."""
    from safetensors.torch import load

    if not (directory / _RESULT_FILE).is_file():
        return None
    saved = json.loads((directory / _RESULT_FILE).read_text())
    if saved["identity"] != identity:
        return None
    model.load_state_dict(load((directory / _GATES_FILE).read_bytes()))
    return FitResult(**saved["result"])


def _record(config: FitConfig, data: _Data, result: FitResult) -> dict[str, Any]:
    """What a fusion's configuration and model card say of its training."""
    return {
        "examples": len(data.train),
        "dev_examples": len(data.dev) if data.dev is not None else None,
        "data_sha256": data.digest,
        "truncated_examples": len(result.truncated),
        "started_at": dict(result.start),
        "steps": result.steps,
        "kept_step": result.kept_step,
        "train_loss": result.train_loss,
        "dev_loss": result.dev_loss,
        "dev_score": result.dev_score,
        "recipe": dataclasses.asdict(config),
    }

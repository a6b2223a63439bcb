"""One run of the trainer over a fused model's gates: from checked examples to whole checkpoints, with resume."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from loraflow.answers import generate_answers, padding_id, require_tokenizer
from loraflow.errors import LoraflowError
from loraflow.examples import Example, parse_examples
from loraflow.files import write_atomically
from loraflow.training.config import FitConfig, FitResult
from loraflow.training.data import Collator, TokenExamples, longest_example, tokenize
from loraflow.training.loss import mean_loss
from loraflow.training.progress import RichProgress
from loraflow.training.trainer import GateTrainer, complete_checkpoints, outcome_of

if TYPE_CHECKING:
    from loraflow.model import FusedModel

Examples = Sequence[Mapping[str, Any] | Example]
Score = Callable[[str, Mapping[str, Any]], float]
"""Scores a generated answer against its example's record."""

RUN_FILE = "run.json"
SEARCH_FILE = "search.jsonl"
_RESULT_FILE = "result.json"
_GATES_FILE = "gates.safetensors"


@dataclasses.dataclass(frozen=True)
class RunData:
    """The examples of a run.

    Attributes:
        train: training examples as token ids.
        dev: dev examples as token ids, where there are some.
        dev_examples: the same as they were given.
        digest: SHA-256 of all token ids.
    """

    train: TokenExamples
    dev: TokenExamples | None
    dev_examples: Sequence[Example]
    digest: str


def prepare(model: FusedModel, examples: Any, dev: Any, config: FitConfig) -> RunData:
    """Check examples and turn them into token ids."""
    tokenizer = require_tokenizer(model.tokenizer)
    max_length = config.max_length or longest_example(model)
    train = tokenize(parse_examples(examples), tokenizer, model.prompt, max_length)
    dev_examples = parse_examples(dev) if dev is not None else []
    dev_rows = tokenize(dev_examples, tokenizer, model.prompt, max_length) if dev_examples else None
    rows = [[dataclasses.astuple(row) for row in split.rows] for split in (train, dev_rows) if split is not None]
    return RunData(train, dev_rows, dev_examples, hashlib.sha256(json.dumps(rows).encode()).hexdigest())


def run_trainer(
    model: FusedModel,
    data: RunData,
    config: FitConfig,
    score: Score | None,
    directory: Path,
    resume: bool,
    console: Console,
    label: str,
    *,
    fresh: bool = True,
) -> FitResult:
    """One run of the trainer; a fresh one starts from the method's start, others from the gates as they are."""
    started = time.perf_counter()
    identity = identity_of(model, data, config, score)
    checkpoint = resumable_checkpoint(identity, directory) if resume else None
    model.training_record = None
    if checkpoint is None:
        remove_checkpoints(directory)
        start_losses = _set_start(model, data.train, config) if fresh else {}
        write_atomically(directory / RUN_FILE, json.dumps({**identity, "start_losses": start_losses}).encode())
    run = json.loads((directory / RUN_FILE).read_text())
    with _training_state(model, config):
        trainer = make_trainer(model, data, config, score, directory, console, label)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    outcome = outcome_of(trainer, has_dev=data.dev is not None)
    return FitResult(
        start=_start_weights(model, run["start_losses"]),
        start_losses=run["start_losses"],
        seconds=time.perf_counter() - started,
        truncated=data.train.truncated,
        **dataclasses.asdict(outcome),
    )


def make_trainer(
    model: FusedModel,
    data: RunData,
    config: FitConfig,
    score: Score | None,
    directory: Path,
    console: Console,
    label: str,
) -> GateTrainer:
    """transformers' trainer, set to a recipe."""
    strategy = "epoch" if config.checkpoint_steps is None else "steps"
    has_dev = data.dev is not None
    on_cpu = model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
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
        score=make_scorer(model, data.dev_examples, config, score) if score is not None else None,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def make_scorer(model: FusedModel, examples: Sequence[Example], config: FitConfig, score: Score) -> Callable[[], float]:
    """What scores a model's answers to the dev examples, as they are when it is called."""

    def mean_score() -> float:
        answers = generate_answers(
            model,
            [example.messages for example in examples],
            tokenizer=require_tokenizer(model.tokenizer),
            prompt=model.prompt,
            max_new_tokens=config.score_max_new_tokens,
        )
        scores = [score(answer.text, record) for answer, record in zip(answers, records, strict=True)]
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
    # Gates with random parts start from the seed too.
    set_seed(config.seed)
    model.set_method(model.method)
    start = _start_weights(model, losses)
    for gate in model.gates.values() if start else ():
        cast(Any, gate).start_at(list(start.values()))
    return losses


def _start_weights(model: FusedModel, losses: Mapping[str, float]) -> dict[str, float]:
    best = min(losses, key=losses.__getitem__) if losses else None
    weights = model.method.start_weights(model.adapter_names, best)
    return {} if weights is None else dict(zip(model.adapter_names, weights, strict=True))


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


def identity_of(model: FusedModel, data: RunData, config: FitConfig, score: Score | None) -> dict[str, Any]:
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


def resumable_checkpoint(identity: Mapping[str, Any], directory: Path) -> Path | None:
    """The newest whole checkpoint of this very run; None where there is none yet.

    Raises:
        LoraflowError: if the checkpoints are another run's.
    """
    found = complete_checkpoints(directory)
    if not found or not (directory / RUN_FILE).is_file():
        return None
    recorded = json.loads((directory / RUN_FILE).read_text())
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
    for cell in directory.glob(f"*/{RUN_FILE}"):
        remove_checkpoints(cell.parent)
    (directory / SEARCH_FILE).unlink(missing_ok=True)
    checkpoints = list(directory.glob("checkpoint-*"))
    if checkpoints and not (directory / RUN_FILE).is_file():
        raise LoraflowError(f"{checkpoints[0]} is no checkpoint of this library. Give another directory.")
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    for name in (_RESULT_FILE, _GATES_FILE, RUN_FILE):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def keep_finished(model: FusedModel, identity: Mapping[str, Any], result: FitResult, directory: Path) -> None:
    """Keep a finished setting of a search; its result is written last, and counts once it is there."""
    from safetensors.torch import save

    write_atomically(directory / _GATES_FILE, save({k: v.cpu().contiguous() for k, v in model.state_dict().items()}))
    text = json.dumps({"identity": identity, "result": dataclasses.asdict(result)})
    write_atomically(directory / _RESULT_FILE, text.encode())


def load_finished(model: FusedModel, identity: Mapping[str, Any], directory: Path) -> FitResult | None:
    """A finished setting of this very search, its gates loaded; None where it is not finished."""
    from safetensors.torch import load

    if not (directory / _RESULT_FILE).is_file():
        return None
    saved = json.loads((directory / _RESULT_FILE).read_text())
    if saved["identity"] != identity:
        return None
    model.load_state_dict(load((directory / _GATES_FILE).read_bytes()))
    return FitResult(**saved["result"])


def training_record(config: FitConfig, data: RunData, result: FitResult) -> dict[str, Any]:
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

"""What each of several processes runs in the tests: cases of `test_processes.py`, by their names."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from transformers.distributed import DistributedConfig

from loraflow import BaseOptions, FitConfig, FusedModel
from loraflow.errors import LoraflowError
from loraflow.methods import LoraHub
from loraflow.training import finetune, fit, search
from loraflow.training.checkpoints import COMPLETE, complete_checkpoints
from loraflow.training.config import LoraSettings
from loraflow.training.trainer import WholeCheckpointTrainer
from tests.tiny import number_tokenizer
from tests.training.test_fit import reversals

RANK = int(os.environ.get("RANK", "0"))
STEPS = FitConfig(epochs=2, learning_rate=1e-2, checkpoint_steps=2)
DEV = reversals(5, seed=1)


def model_of(root, method="lora-flow", quantization=None, names=("a", "b"), **parts):
    """A fused model; of several processes, each may hold a part of its base."""
    parts = {"distributed_config": DistributedConfig(**parts)} if parts and dist.is_initialized() else {}
    options = BaseOptions(dtype=torch.float32, quantization=quantization, model_kwargs=parts)
    adapters = {name: root / name for name in names}
    return FusedModel.from_adapters(root / "base", adapters, method, tokenizer=number_tokenizer(), options=options)


def fitted(root, model, run, count=19, config=STEPS, **settings):
    console = Console(file=sys.stdout)
    return fit(model, reversals(count), config=config, checkpoints=run, console=console, **settings), model


def plain(root, run):
    return fitted(root, model_of(root), run, dev=DEV)


def accumulated(root, run):
    return fitted(root, model_of(root), run, config=FitConfig(epochs=1, learning_rate=1e-2, gradient_accumulation=2))


def resumed(root, run):
    """A run whose newest checkpoint was not finished goes on from the one before it."""
    plain(root, run)
    everybody_waits()
    if RANK == 0:
        (complete_checkpoints(run)[-1] / COMPLETE).unlink()
    everybody_waits()
    return continued(root, run)


def continued(root, run):
    return fitted(root, model_of(root), run, dev=DEV, resume=True)


def everybody_waits():
    if dist.is_initialized():
        dist.barrier()


def scored(root, run):
    def score(answer, record):
        return float(len(answer)) + len(record["prompt"])

    config = FitConfig(epochs=1, learning_rate=1e-2, score_max_new_tokens=3)
    return fitted(root, model_of(root), run, count=6, config=config, dev=DEV, score=score)


def four_bit(root, run):
    return fitted(root, model_of(root, quantization="bnb-4bit"), run, count=9)


def grid(root, run):
    settings = [{"learning_rate": 1e-2, "batch_size": 4}, {"learning_rate": 1e-3, "batch_size": 2}]
    model = model_of(root)
    config = FitConfig(epochs=1)
    console = Console(file=sys.stdout)
    return search(model, reversals(7), dev=DEV, config=config, grid=settings, checkpoints=run, console=console), model


def without_gradients(root, run):
    return fitted(root, model_of(root, LoraHub(budget=6)), run, count=7, dev=DEV)


def experts(root, run):
    model = model_of(root, "phatgoose")
    data = {name: reversals(5, seed=seed) for seed, name in enumerate("ab")}
    config = FitConfig(max_steps=3, learning_rate=1e-2)
    return fit(model, data, config=config, checkpoints=run, console=Console(file=sys.stdout)), model


def tuned(root, run, **parts):
    parts = {"distributed_config": DistributedConfig(**parts)} if parts and dist.is_initialized() else {}
    lora = LoraSettings(r=4, dropout=0.0)
    result = finetune(
        root / "base",
        reversals(9),
        run / "adapter",
        lora=lora,
        config=FitConfig(epochs=1, learning_rate=1e-2),
        tokenizer=number_tokenizer(),
        console=Console(file=sys.stdout),
        options=BaseOptions(dtype=torch.float32, model_kwargs=parts),
    )
    return result, None


def dying(root, run):
    """Process 1 is gone in the middle of a step, after a checkpoint was made."""
    step = WholeCheckpointTrainer.training_step

    def die(self, *args, **kwargs):
        if RANK == 1 and self.state.global_step == 5:
            os._exit(9)
        return step(self, *args, **kwargs)

    WholeCheckpointTrainer.training_step = die
    return plain(root, run)


def sharded(root, run):
    """FSDP2, with an adapter that is fused by the norms of whole weights, a score, and an interruption."""

    def score(answer, record):
        return float(len(answer))

    settings = {"count": 7, "dev": DEV, "score": score, "config": replace(STEPS, score_max_new_tokens=3)}
    fitted(root, model_of(root, names=("a", "dora"), fsdp_size=2), run, **settings)
    everybody_waits()
    if RANK == 0:
        (complete_checkpoints(run)[-1] / COMPLETE).unlink()
    everybody_waits()
    return fitted(root, model_of(root, names=("a", "dora"), fsdp_size=2), run, **settings, resume=True)


def sharded_tuned(root, run):
    return tuned(root, run, fsdp_size=2)


def split(root, run):
    return fitted(root, model_of(root, tp_size=2), run)


def uneven(root, run):
    return fitted(root, model_of(root), run, config=FitConfig(batch_size=3))


def other_data(root, run):
    return fitted(root, model_of(root), run, count=5 + RANK)


def foreign(root, run):
    """A folder with checkpoints that are not the library's: process 0 finds it out."""
    (run / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    return fitted(root, model_of(root), run, count=4)


def play(case, root, folder):
    """Run a case, and note what it gave."""
    try:
        result, model = globals()[case](root, folder / "run")
    except LoraflowError as error:
        (folder / f"error-{RANK}.txt").write_text(f"{type(error).__name__}: {error}")
        return
    learned = {} if model is None else {name: value.tolist() for name, value in model.state_dict().items()}
    seen = {"log": result.log, "learned": learned}
    for name in ("steps", "start_losses", "train_loss", "dev_loss", "dev_score", "kept_step", "search"):
        seen[name] = getattr(result, name)
    (folder / f"result-{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    for chosen in sys.argv[3:]:
        place = Path(sys.argv[2]) / chosen
        place.mkdir(parents=True, exist_ok=True)
        print(f"case {chosen}", flush=True)
        play(chosen, Path(sys.argv[1]), place)

"""The curves of a fit for trackers, by transformers' own integrations, with the fusion weights among them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import default_logdir

from loraflow.core.fusion import Fusion
from loraflow.errors import LoraflowError
from loraflow.files import is_first_process, make_folder
from loraflow.training.config import Run
from loraflow.training.data import FitData, TokenExamples, split_batches
from loraflow.training.weights import normalized_entropy, weights_of_rows
from loraflow.visual.figures import layers_figure, require_matplotlib, save_figure

WATCHED = 8
"""So many examples, dev examples where there are some, tell at each checkpoint what the weights are like."""
COLLAPSED = 0.99
"""A token has collapsed in a layer where one adapter has at least this share of the positive weights."""
PICTURE = "fusion-weights.png"
_NAME = "fusion_weights"


def check_trackers(names: Sequence[str], *, weights: bool) -> None:
    """Check before anything is loaded that trackers are installed; and matplotlib, where weights are to be drawn.

    Raises:
        LoraflowError: if one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise LoraflowError(f"`report_to` (={name!r}) needs the package {name}. Run: pip install {name}")
    if names and weights:
        require_matplotlib()


@dataclass(frozen=True)
class Spread:
    """Mean, 10th and 90th percentile of fusion weights, by layer."""

    mean: Float[Tensor, "layers adapters"]
    low: Float[Tensor, "layers adapters"]
    high: Float[Tensor, "layers adapters"]


@dataclass(frozen=True)
class WatchedWeights:
    """What the weights of a few answers' tokens are like.

    Attributes:
        adapters: their names, in the order of the last axes.
        layers: indices of the fused decoder layers.
        answers: the weights by layer.
        entropy: mean normalised entropy, of tokens and layers with a positive weight.
        collapsed: share of tokens and layers where one adapter has `COLLAPSED` of the positive weights or more.
        counted: what is counted.
    """

    adapters: tuple[str, ...]
    layers: tuple[int, ...]
    answers: Spread
    entropy: float
    collapsed: float
    counted: str = "tokens"

    def curves(self) -> dict[str, float]:
        """The numbers by the names of their curves."""
        curves = {f"{_NAME}/entropy": self.entropy, f"{_NAME}/collapsed": self.collapsed}
        for index, adapter in enumerate(self.adapters):
            # Not every tracker takes every sign.
            name = f"{_NAME}/" + re.sub(r"[^\w.-]", "_", adapter)
            means = self.answers.mean[:, index].tolist()
            curves[name] = sum(means) / len(means)
            curves |= {f"{name}/layer_{layer}": mean for layer, mean in zip(self.layers, means, strict=True)}
        return curves


@torch.no_grad()
def watch_weights(fusion: Fusion, rows: TokenExamples, batch_size: int) -> WatchedWeights:
    """What a fusion's weights are like on examples, read with their answers; modules stay in their modes."""
    layers = tuple(sorted({site.layer for site in fusion.attachment.sites["module"].values()}))
    with fusion.evaluating():
        found = [
            answer
            for batch in split_batches(rows, batch_size)
            for answer, _ in weights_of_rows(fusion, batch, layers, ())
        ]
    weights = torch.cat(found)
    positive = weights.clamp(min=0)
    shares = positive / positive.sum(dim=-1, keepdim=True)
    percentiles = torch.tensor([0.1, 0.9], dtype=weights.dtype)
    low, high = weights.quantile(percentiles, dim=0)
    return WatchedWeights(
        adapters=tuple(fusion.adapter_names),
        layers=layers,
        answers=Spread(weights.mean(dim=0), low, high),
        entropy=normalized_entropy(weights).nanmean().item(),
        collapsed=(shares.amax(dim=-1) >= COLLAPSED).double().mean().item(),
    )


class Picture(TrainerCallback):
    """Draws the weights that a fit has ended with, for its trackers and as a file beside theirs."""

    def __init__(self, watch: Callable[[], WatchedWeights], trackers: Sequence[Any], names: Sequence[str], place: Path):
        self._watch, self._trackers, self._names = watch, trackers, names
        self._file = place / PICTURE

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw, before the trackers close their runs."""
        weights = self._watch()
        if not state.is_world_process_zero:
            return
        figure = layers_figure(weights)
        save_figure(figure, self._file)
        for name, tracker in zip(self._names, self._trackers, strict=True):
            _SHOW[name](tracker, figure, self._file, state.global_step)


def _show_in_tensorboard(tracker: Any, figure: Any, file: Path, step: int) -> None:
    tracker.tb_writer.add_figure(_NAME, figure, step)


def _show_in_mlflow(tracker: Any, figure: Any, file: Path, step: int) -> None:
    importlib.import_module("mlflow").log_artifact(str(file))


def _show_in(package: str) -> Callable[[Any, Any, Path, int], None]:
    def show(tracker: Any, figure: Any, file: Path, step: int) -> None:
        module = importlib.import_module(package)
        module.log({_NAME: module.Image(str(file))})

    return show


_SHOW = {
    "tensorboard": _show_in_tensorboard,
    "mlflow": _show_in_mlflow,
    "wandb": _show_in("wandb"),
    "trackio": _show_in("trackio"),
}


@contextlib.contextmanager
def reporting(model: Any, data: FitData, run: Run) -> Iterator[tuple[list[TrainerCallback], Callable[[], Any] | None]]:
    """What reports a run: callbacks for its trainer, and what measures the curves of the weights, if there are any.

    Yields:
        Both; nothing where there are no trackers.
    """
    names = run.config.report_to
    if not names:
        yield [], None
        return
    place = run.reports or Path(default_logdir())
    trackers = [_tracker(name, kind, place) for name, kind in _kinds(names)]
    watch = None
    if isinstance(model, Fusion):
        rows = TokenExamples((data.dev or data.train).rows[:WATCHED], [])
        size = run.config.forward_size

        def watch() -> WatchedWeights:
            return watch_weights(model, rows, size)

    first = [] if watch is None else [Picture(watch, trackers, list(names), place)]
    # A run of its own for each training; one that the caller has begun goes on.
    wandb = importlib.import_module("wandb") if "wandb" in names else None
    ours = wandb is not None and wandb.run is None
    try:
        yield [*first, *trackers], watch
    finally:
        # Where a training ends before its end, nobody else closes them.
        for writer in (getattr(tracker, "tb_writer", None) for tracker in trackers):
            if writer is not None:
                writer.close()
        if wandb is not None and ours:
            wandb.finish()


def _kinds(names: Sequence[str]) -> list[tuple[str, Any]]:
    return list(zip(names, get_reporting_integration_callbacks(list(names)), strict=True))


def _tracker(name: str, kind: Any, place: Path) -> TrainerCallback:
    if name != "tensorboard" or not is_first_process():
        return kind()
    from torch.utils.tensorboard import SummaryWriter

    make_folder(place)
    return kind(SummaryWriter(log_dir=str(place)))

"""What a step of a training takes of memory and time, before it is made.

The model itself says it: it reads three short rows, forward and backward, while the bytes of all tensors that come and
go are counted, and its operations. Both grow with the length of a row as a polynomial of the second degree, linears by
the token and attention by the pair of tokens, and with the number of rows; so three lengths say what longer ones take.
On the meta device, where nothing is computed, a base is planned that no machine here could hold.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loraflow.core.architecture import DecoderLayers
from loraflow.core.fusion import Fusion
from loraflow.core.head import LOGITS_A_CHUNK, reads_answers_only
from loraflow.errors import LoraflowError
from loraflow.training.batches import in_forwards
from loraflow.training.config import FitConfig
from loraflow.training.data import IGNORED, TokenExamples

_LENGTHS = (8, 16, 32)
# Decoder layers of a model without weights that are tried.
_FEW = (2, 4)
# A measurement of time grows until it takes so long: less is overhead.
_LONG_ENOUGH_S = 0.1


@dataclass(frozen=True)
class Shape:
    """The size of a forward.

    Attributes:
        rows: examples in it, or 1 where they are packed.
        width: tokens of each, padding included.
        answers: tokens of all of them that are learned.
    """

    rows: int
    width: int
    answers: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return self.rows * self.width


@dataclass(frozen=True)
class Head:
    """The output layer of a model, as far as its cost goes.

    Attributes:
        words: size of the vocabulary.
        width: of the hidden states that it reads.
        capped: whether logits go through a tanh, as Gemma's.
        wide: whether they are in float32 as they are.
        cut: whether it reads only the positions that predict an answer's token, in chunks (`core.head`).
    """

    words: int
    width: int
    capped: bool
    wide: bool
    cut: bool

    def cost(self, shape: Shape) -> tuple[int, int]:
        """What head and loss take of a forward and its backward: bytes at their peak, and operations.

        Of a chunk there are the logits, in float32 too, and their gradient; a tanh keeps its output, and has gradients
        before and behind it. Of all answers
        there are the states that the head reads, and their gradient. Where all positions are read, there are in the
        backward of transformers' softmax, in float32, the logarithms of the probabilities, and the gradients of those
        and of the logits.
        """
        seen = shape.answers if self.cut else shape.tokens
        operations = 4 * seen * self.words * self.width
        if not self.cut:
            return (16 if self.capped else 12) * seen * self.words, operations
        chunk = min(seen, max(1, LOGITS_A_CHUNK // self.words))
        a_logit = (8 if self.wide else 12) + (12 if self.capped else 0)
        return a_logit * chunk * self.words + 8 * seen * self.width, operations


@dataclass(frozen=True)
class Growth:
    """How something grows with the tokens of a row, by its coefficients from the highest power on."""

    coefficients: tuple[float, float, float]

    def at(self, rows: int, width: int) -> float:
        """The value for rows of so many tokens."""
        square, linear, constant = self.coefficients
        return constant + rows * (linear * width + square * width**2)


@dataclass(frozen=True)
class Footprint:
    """What a model takes in a forward and its backward, without the head, in bytes and operations.

    Attributes:
        weights: bytes of base and adapters.
        learned: bytes of what is learned, its gradients and AdamW's two moments.
        head: the output layer.
        kept: bytes that are kept for the backward when the forward ends.
        highest: the most bytes that there are at a time, in forward and backward.
        operations: floating point operations of both.
        pace: seconds for each operation; None where nothing was measured.
    """

    weights: int
    learned: int
    head: Head
    kept: Growth
    highest: Growth
    operations: Growth
    pace: float | None = None

    def peak(self, shape: Shape) -> float:
        """The most bytes above the weights that a step takes."""
        logits, _ = self.head.cost(shape)
        kept, highest = (growth.at(shape.rows, shape.width) for growth in (self.kept, self.highest))
        return self.learned + max(kept + logits, highest)

    def seconds(self, shapes: Sequence[Shape]) -> float | None:
        """The time of forwards and their backwards; None where none was measured."""
        if self.pace is None:
            return None
        return self.pace * sum(self.operations.at(s.rows, s.width) + self.head.cost(s)[1] for s in shapes)


class _Tensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the block while they live, and the operations.

    Attributes:
        now: bytes of those that live.
        peak: the most there were.
        operations: floating point operations, as torch counts them.
    """

    now: int
    peak: int
    operations: int

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._living: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in given and id(storage) not in self._living:
                self._living.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        if func.overloadpacket in flop_registry:
            self.operations += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    def _forget(self, which: int, size: int) -> None:
        self._living.discard(which)
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def footprint(model: Any, *, checkpointing: bool = False, packed: bool = False, timed: bool = False) -> Footprint:
    """What a step of a model takes, found by short ones in training mode; the model stays as it is.

    Args:
        model: with transformers' `get_decoder`, some of whose parameters are learned.
        checkpointing: whether activations are recomputed in the backward.
        packed: whether examples are packed into one row.
        timed: whether a longer step is made whose time counts.

    Raises:
        LoraflowError: if the model cannot be tried.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors: dict[int, Tensor] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    weights = sum(tensor.nbytes for tensor in tensors.values()) - sum(parameter.nbytes for parameter in learned)
    try:
        with as_trained(model, checkpointing=checkpointing):
            # The first forward of a process may prepare what later ones share.
            _step(model, 1, _LENGTHS[0], packed)
            found = [_count(model, length, packed) for length in _LENGTHS]
            kept, highest, operations = (_growth([each[index] for each in found]) for index in range(3))
            pace = _pace(model, operations, packed) if timed else None
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LoraflowError(f"What a step takes cannot be planned: {type(error).__name__}: {reason}") from error
    text = model.config.get_text_config()
    # A fusion's, a PEFT model's, or the base itself.
    base = model.base_model if isinstance(model, Fusion) else getattr(model, "get_base_model", lambda: model)()
    head = Head(
        text.vocab_size,
        text.hidden_size,
        capped=getattr(text, "final_logit_softcapping", None) is not None,
        wide=model.dtype.itemsize >= torch.float32.itemsize,
        cut=reads_answers_only(base),
    )
    size = sum(parameter.nbytes for parameter in learned)
    return Footprint(weights, 4 * size, head, kept, highest, operations, pace)


def footprints_of_empty(model: Any, layers: DecoderLayers) -> tuple[Footprint, Footprint]:
    """What a step of a model without weights takes, without and with gradient checkpointing.

    Its last layers are tried; each further one takes what those take.

    Args:
        model: on the meta device, with its gates; of no other use afterwards.
        layers: its decoder layers.

    Raises:
        LoraflowError: if the model cannot be tried.
    """
    count, whole = len(layers.layers), layers.layers
    tried = (count,) if count <= _FEW[1] else _FEW
    kinds = (False, True) if model.supports_gradient_checkpointing else (False, False)
    found = []
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            # Not on the meta device: transformers' models ask for the values of masks there.
            model.to_empty(device="cpu")
            for few in tried:
                model.set_submodule(layers.prefix, nn.ModuleList(whole[-few:]))
                found.append([footprint(model, checkpointing=kind) for kind in kinds])
    finally:
        model.set_submodule(layers.prefix, whole)
    times = (count - tried[0]) / (tried[-1] - tried[0]) if len(tried) > 1 else 0
    plain, frugal = (_further(less, more, times) for less, more in zip(found[0], found[-1], strict=True))
    return plain, frugal


def _further(less: Footprint, more: Footprint, times: float) -> Footprint:
    """The footprint of a model that has so many times the layers more that one has more than another."""

    def growth(first: Growth, second: Growth) -> Growth:
        pairs = zip(first.coefficients, second.coefficients, strict=True)
        square, linear, constant = (a + times * (b - a) for a, b in pairs)
        return Growth((square, linear, constant))

    return Footprint(
        weights=round(less.weights + times * (more.weights - less.weights)),
        learned=round(less.learned + times * (more.learned - less.learned)),
        head=less.head,
        kept=growth(less.kept, more.kept),
        highest=growth(less.highest, more.highest),
        operations=growth(less.operations, more.operations),
    )


@contextlib.contextmanager
def as_trained(model: Any, *, checkpointing: bool) -> Iterator[None]:
    """A model inside the block as it is in a training step, its gradients there; then it is as before.

    Random numbers go on afterwards as if nothing had been.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training, enable = model.training, checkpointing and not model.is_gradient_checkpointing
    device = model.device
    devices, kind = ([], {}) if device.type in ("cpu", "meta") else ([device], {"device_type": device.type})
    with torch.random.fork_rng(devices, **kind), torch.enable_grad():
        try:
            model.train()
            if enable:
                model.gradient_checkpointing_enable()
            for parameter in learned:
                parameter.grad = torch.zeros_like(parameter)
            yield
        finally:
            for parameter in learned:
                parameter.grad = None
            if enable:
                model.gradient_checkpointing_disable()
            model.train(training)


def _step(model: Any, rows: int, length: int, packed: bool, between: Callable[[], object] = lambda: None) -> None:
    """A forward without the head, and its backward; `between` is called between the two."""
    ids = torch.ones(rows, length, dtype=torch.long, device=model.device)
    positions = torch.arange(length, device=model.device).expand(rows, -1)
    inputs: Mapping[str, Tensor]
    if packed:
        inputs = {"position_ids": positions % (length - 1)}
    else:
        # A batch has padding, and with it a mask.
        inputs = {"attention_mask": (positions < length - 1).long()}
    hidden = model.get_decoder()(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    between()
    hidden.backward(torch.ones_like(hidden))


def _count(model: Any, length: int, packed: bool) -> tuple[float, float, float]:
    """Bytes at the end of the forward, the most bytes, and the operations, of one row."""
    kept: list[int] = []
    with _Tensors() as tensors:
        _step(model, 1, length, packed, lambda: kept.append(tensors.now))
    return kept[0], tensors.peak, tensors.operations


def _growth(values: Sequence[float]) -> Growth:
    square, linear, constant = np.polyfit(_LENGTHS, values, 2)
    return Growth((float(square), float(linear), float(constant)))


def _pace(model: Any, operations: Growth, packed: bool) -> float:
    rows = 1
    while True:
        _wait(model.device)
        started = time.perf_counter()
        _step(model, rows, _LENGTHS[-1], packed)
        _wait(model.device)
        seconds = time.perf_counter() - started
        if seconds >= _LONG_ENOUGH_S or rows >= 64:
            return seconds / operations.at(rows, _LENGTHS[-1])
        rows *= 2


def _wait(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def largest_forward(data: TokenExamples, size: int, *, packed: bool) -> Shape:
    """The largest forward of so many examples that an epoch can have."""
    lengths = sorted((len(row.input_ids) for row in data.rows), reverse=True)[:size]
    answers = sorted((sum(label != IGNORED for label in row.labels) for row in data.rows), reverse=True)[:size]
    return _shape(lengths, sum(answers), packed=packed)


def _shape(lengths: Sequence[int], answers: int, *, packed: bool) -> Shape:
    return Shape(1, sum(lengths), answers) if packed else Shape(len(lengths), max(lengths), answers)


@dataclass(frozen=True)
class Plan:
    """What a fit takes.

    Attributes:
        footprint: of its model.
        shape: its largest forward.
        steps: how many there are.
        forwards: forwards in a step.
        seconds: about how long all of them take; None where no time was measured.
        free: bytes that are free beside the model's weights.
    """

    footprint: Footprint
    shape: Shape
    steps: int
    forwards: int
    seconds: float | None
    free: int

    @classmethod
    def make(cls, footprint: Footprint, data: TokenExamples, config: FitConfig, free: int) -> Plan:
        """The plan of a fit on these examples, whose forwards are settled."""
        size = config.forward_size
        forwards = in_forwards(data, size, by_length=config.group_by_length)
        answers = sum(label != IGNORED for row in data.rows for label in row.labels) // len(forwards)
        shapes = [_shape(lengths, answers, packed=config.packing) for lengths in forwards]
        in_epoch = math.ceil(len(data) / config.batch_size)
        steps = config.max_steps or config.epochs_over(len(data)) * in_epoch
        epoch = footprint.seconds(shapes)
        return cls(
            footprint=footprint,
            shape=largest_forward(data, size, packed=config.packing),
            steps=steps,
            forwards=config.batch_size // size,
            seconds=None if epoch is None else epoch * steps / in_epoch,
            free=free,
        )

    @property
    def fits(self) -> bool:
        """Whether there is room for its largest step."""
        return self.footprint.peak(self.shape) <= self.free

    def lines(self) -> list[str]:
        """The plan for people."""
        footprint, shape = self.footprint, self.shape
        logits, _ = footprint.head.cost(shape)
        peak = footprint.weights + footprint.peak(shape)
        forwards = f"in {self.forwards} forwards of at most" if self.forwards > 1 else "of at most"
        lines = [
            f"a step {forwards} {shape.rows} x {shape.width} tokens takes {size_text(peak)} at its peak: "
            f"weights {size_text(footprint.weights)}, learned and optimizer {size_text(footprint.learned)}, "
            f"activations {size_text(footprint.kept.at(shape.rows, shape.width))}, logits {size_text(logits)}; "
            f"{size_text(self.free)} are free beside the weights"
        ]
        if self.seconds is not None:
            lines.append(f"{self.steps} steps of about {self.seconds / self.steps:.2g} s: {time_text(self.seconds)}")
        return lines


def size_text(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def time_text(seconds: float) -> str:
    """A time for people."""
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"

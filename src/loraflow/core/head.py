r"""The loss of answers: a model's own head, at the positions that predict a label and no others.

A language model is a trunk (transformers' `base_model`) and what its `forward` makes of the trunk's last states $h$: a
head, scales and caps of the logits, a loss. Here that forward runs as it is, but between trunk and head all positions
are taken out that predict no label, and its loss function gets the others a chunk at a time:

$$L = \frac{1}{n} \sum_{p\,:\,y_{p+1} \neq -100} \Big(\log \sum_v e^{z_{p,v}} - z_{p,\,y_{p+1}}\Big),
\qquad z_p = \mathrm{head}(h_p)$$

in float32 at least, as transformers' `ForCausalLMLoss` does, with $n$ the number of such positions or
`num_items_in_batch`. Each chunk's $\partial L / \partial h$ is computed with it, so that neither its logits nor their
gradient outlive it, and no product is computed twice; where the head itself learns, chunks are recomputed in the
backward instead. Chunks are of positions only: one position's logits are the smallest piece, and a head in pieces would
no longer be the model's own. `torch.nn.functional.linear_cross_entropy` knows plain heads only, and rounds the logits
of half precision otherwise than the model.

At a model's first loss, logits that were made so are compared with those of its whole forward. A model that has others
for them, that takes no `logits_to_keep` (so that its head cannot be asked for few positions), or that has a loss of its
own computes all logits and its own loss, as ever. So does a graph that is being compiled.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from loraflow.core.lazy import lazy_tensor

IGNORED = -100
LOGITS_A_CHUNK = 2**24
"""Logits in one chunk: 128 positions of 131,072 words, 64 MiB in float32."""
# Other ways to say what of the logits is wanted: then the model has all that it needs to know.
_ASKS_OTHERWISE = ("logits_to_keep", "shift_labels", "return_dict", "ignore_index")

_can_be_cut: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
"""What was found at a model's first loss."""

Turn = Callable[[], contextlib.AbstractContextManager[None]]


def call_with_labels(
    model: nn.Module,
    base: PreTrainedModel,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    turn: Turn = contextlib.nullcontext,
) -> Any:
    """A model's forward; with `labels`, its head sees the positions only that predict one.

    Args:
        model: what is called: the base, or what is around it.
        base: the transformers model in it.
        args: of the forward.
        kwargs: of the forward.
        turn: held while logits are computed later.

    Returns:
        What the forward gives. Its logits are computed when something is done with them.
    """
    labels = kwargs.get("labels")
    if labels is None or torch.compiler.is_compiling() or any(kwargs.get(name) is not None for name in _ASKS_OTHERWISE):
        return model(*args, **kwargs)
    if base not in _can_be_cut and not _has_known_form(base):
        _can_be_cut[base] = False
    predicts = nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    if not _can_be_cut.get(base, True) or not predicts.any():
        return model(*args, **kwargs)
    answers = _Answers(base, args, kwargs, predicts)
    output = answers.run(model)
    if answers.states is None:
        # What came in has other positions than the labels, as with a prompt that is learned: the loss is of all logits.
        return output
    if base not in _can_be_cut:
        _can_be_cut[base] = answers.are_right()
    if not _can_be_cut[base] or answers.logits is None:
        return model(*args, **kwargs)
    some = answers.logits
    shape = (*labels.shape, some.shape[-1])
    output.logits = lazy_tensor(shape, some.device, some.dtype, lambda: answers.all_logits(turn))
    return output


def reads_answers_only(base: PreTrainedModel) -> bool:
    """Whether a model's head is asked for the positions only that predict a label, as far as is known by now."""
    return _can_be_cut.get(base, _has_known_form(base))


def _has_known_form(base: PreTrainedModel) -> bool:
    """Whether a model's forward is a trunk, a head that can be asked for few positions, and the usual loss."""
    forward = inspect.unwrap(type(base).forward)
    return (
        trunk_of(base) is not base
        # The parts of a sharded base meet in each forward, and how often a head is asked differs between processes.
        and not any(hasattr(parameter, "full_tensor") for parameter in base.parameters())
        # Others shift labels on the way in.
        and not base.config.is_encoder_decoder
        and bool(base.config.return_dict)
        and base.loss_function is ForCausalLMLoss
        and "logits_to_keep" in inspect.signature(forward).parameters
        and "loss_function" in forward.__code__.co_names
    )


def trunk_of(base: PreTrainedModel) -> nn.Module:
    """The part of a model that its forward calls for the last states; the model itself where that cannot be told."""
    trunk, decoder = base.base_model, base.get_decoder()
    if trunk is base:
        # Some (Llama 4) name another part than they have.
        inner = [child for child in base.children() if isinstance(child, PreTrainedModel)]
        return inner[0] if len(inner) == 1 else base
    # Some (OPT) go past a trunk that has one decoder in it; models that read images have more than text in theirs.
    of_text = base.config.get_text_config(decoder=True) is base.config
    return decoder if of_text and decoder in set(trunk.modules()) else trunk


class _Answers:
    """One forward whose head sees the positions only that predict a label.

    Attributes:
        states: the trunk's last states there, `[answers, hidden]`; None where it gave those of other positions.
        logits: those of the first and the last of a chunk, `[2, vocabulary]`; None where the loss was asked for that of
            other labels than were given.
    """

    states: Tensor | None
    logits: Tensor | None

    def __init__(
        self, base: PreTrainedModel, args: Sequence[Any], kwargs: Mapping[str, Any], predicts: Bool[Tensor, "batch seq"]
    ) -> None:
        self.states = self.logits = None
        self._base, self._args, self._kwargs = base, args, kwargs
        self._trunk = trunk_of(base)
        self._shape = predicts.shape
        self._index = predicts.flatten().nonzero()[:, 0]
        self._targets = kwargs["labels"].flatten()[self._index + 1]
        self._size = max(1, LOGITS_A_CHUNK // base.config.get_text_config(decoder=True).vocab_size)
        self._learns = torch.is_grad_enabled() and _head_learns(base)
        self._seen: Any = None
        self._first: Tensor | None = None

    def run(self, model: nn.Module) -> Any:
        """The model's forward, with its loss."""
        self._own_loss = self._base.loss_function
        cut = self._trunk.register_forward_hook(self._cut)
        self._base.loss_function = self._loss
        try:
            return model(*self._args, **self._kwargs)
        finally:
            self._base.loss_function = self._own_loss
            cut.remove()

    @torch.no_grad()
    def are_right(self) -> bool:
        """Whether the logits are those that the model itself gives."""
        if self.logits is None:
            return False
        ends = self._index[[0, min(self._size, len(self._index)) - 1]]
        rows, columns = ends // self._shape[1], ends % self._shape[1]
        own = self._head(self._seen, logits_to_keep=columns)[rows, [0, 1]].to(self.logits)
        # Products of other sizes are rounded otherwise; what is left out, such as a scale, is more than that.
        allowed = 16 * torch.finfo(own.dtype).eps * own.abs().max()
        return bool(((own - self.logits).abs() <= allowed).all())

    def all_logits(self, turn: Turn) -> Float[Tensor, "batch seq vocabulary"]:
        """The logits of all positions, as the model gives them."""
        with turn():
            return self._head(self._seen)

    def _cut(self, trunk: nn.Module, args: Any, output: Any) -> Any:
        """Hand on the first chunk of the states that predict a label in place of all."""
        if self._seen is not None or output[0].shape[:2] != self._shape:
            return output
        self._seen = output
        states = output[0].flatten(0, 1)
        self.states = states[self._index.to(states.device)]
        self._first = self._leaf(0)
        return _with_states(output, self._first[None])

    def _leaf(self, start: int) -> Float[Tensor, "chunk hidden"]:
        """A chunk of the states; cut off from what is before, unless the head learns."""
        assert self.states is not None
        chunk = self.states[start : start + self._size]
        return chunk if self._learns else chunk.detach().requires_grad_(chunk.requires_grad)

    def _loss(
        self, logits: Tensor, labels: Tensor, *args: Any, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> Float[Tensor, ""]:
        """What stands in place of the model's own loss function."""
        if self.states is None:
            return self._own_loss(logits, labels, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        if torch.equal(labels.to(self._kwargs["labels"].device), self._kwargs["labels"]):
            self.logits = logits[0, [0, -1]].detach()
        total = self._sum_learning(logits) if self._learns else self._sum(logits)
        count = len(self._targets) if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    def _sum(self, logits: Float[Tensor, "1 chunk vocabulary"]) -> Float[Tensor, ""]:
        """The sum of all positions' losses, and its gradient, where the head stays as it is."""
        states, leaf = self.states, self._first
        assert states is not None
        assert leaf is not None
        wants_gradient = torch.is_grad_enabled() and states.requires_grad
        total = logits.new_zeros((), dtype=_wide(logits.dtype))
        gradients: list[Tensor] = []
        for start in range(0, len(states), self._size):
            if start:
                leaf = self._leaf(start)
                logits = self._head(_with_states(self._seen, leaf[None]))
            targets = self._targets[start : start + self._size].to(logits.device)
            part, of_logits = _nll(logits[0].detach(), targets, wants_gradient)
            total = total + part
            if of_logits is not None:
                gradients += torch.autograd.grad(logits, leaf, of_logits[None].to(logits.dtype))
        if not wants_gradient:
            return total
        return KnownGradient.apply(states, total, torch.cat(gradients))

    def _sum_learning(self, logits: Float[Tensor, "1 chunk vocabulary"]) -> Float[Tensor, ""]:
        """The sum of all positions' losses, where the head learns: chunks after the first are recomputed."""

        def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
            return _plain_nll(self._head(_with_states(self._seen, states[None]))[0], targets)

        assert self.states is not None
        total = _plain_nll(logits[0], self._targets[: self._size])
        for start in range(self._size, len(self.states), self._size):
            part = slice(start, start + self._size)
            total = total + checkpoint(of_chunk, self.states[part], self._targets[part], use_reentrant=False)
        return total

    def _head(self, output: Any, **options: Any) -> Float[Tensor, "batch seq vocabulary"]:
        """The logits that the model's own forward makes of what a trunk gave."""
        kwargs = {key: value for key, value in self._kwargs.items() if key not in ("labels", "num_items_in_batch")}
        own = vars(self._trunk).get("forward")
        self._trunk.forward = lambda *_, **__: output
        try:
            return self._base(*self._args, **kwargs, **options).logits
        finally:
            del self._trunk.forward
            if own is not None:
                # accelerate's device maps put one on the instance.
                self._trunk.forward = own


class KnownGradient(torch.autograd.Function):
    """A number that was computed from states together with its gradient."""

    @staticmethod
    def forward(ctx, states, value, gradient):
        """The number."""
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """The gradient of the states."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.device, gradient.dtype), None, None


def _with_states(output: Any, states: Tensor) -> Any:
    """What a trunk gave, with other last states."""
    if isinstance(output, ModelOutput):
        return type(output)(**{**output, next(iter(output)): states})
    return (states, *output[1:])


def _head_learns(base: PreTrainedModel) -> bool:
    """Whether anything beside the trunk learns, or a head that is the trunk's own embeddings."""
    inside = {id(parameter) for parameter in trunk_of(base).parameters()}
    head = base.get_output_embeddings()
    of_head = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return any(p.requires_grad and (id(p) not in inside or id(p) in of_head) for p in base.parameters())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _nll(
    logits: Float[Tensor, "chunk vocabulary"], targets: Int[Tensor, " chunk"], wants_gradient: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "chunk vocabulary"] | None]:
    """The sum of negative log-likelihoods and, where it is wanted, its gradient, with one tensor of that size."""
    wide = logits.to(_wide(logits.dtype))
    log_sums = wide.logsumexp(dim=-1, keepdim=True)
    total = (log_sums - wide.gather(1, targets[:, None])).sum()
    if not wants_gradient:
        return total, None
    gradient = (wide - log_sums).exp_()
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    return total, gradient


def _plain_nll(logits: Float[Tensor, "chunk vocabulary"], targets: Int[Tensor, " chunk"]) -> Float[Tensor, ""]:
    return nn.functional.cross_entropy(logits.to(_wide(logits.dtype)), targets.to(logits.device), reduction="sum")

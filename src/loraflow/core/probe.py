"""Reading a prompt before it is answered: passes through the base alone and with each adapter alone.

The k + 1 passes are one batch in which each row pays only for its own adapter (`FusedLinear` with rows `alone`), split
where it would hold too many tokens; a pass stops as soon as what was asked for has been seen, so the model's head runs
only where a method calls it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from loraflow.answers import require_tokenizer
from loraflow.core.attach import Attachment
from loraflow.errors import ArchitectureError, MethodError
from loraflow.methods.base import Measure

# Tokens in one forward: as many rows as that allows, and one at least.
TOKENS_A_PASS = 16384
# Rows of the head that are widened to float32 at a time.
_HEAD_ROWS = 16384


class Prompt:
    """One request's prompt, as `methods.base.Query` describes it."""

    def __init__(
        self,
        attachment: Attachment,
        input_ids: Int[Tensor, " seq"],
        tokenizer: PreTrainedTokenizerBase | None = None,
        among: Sequence[int] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.beside = dict(beside or {})
        self.layers = len(attachment.layers.layers)
        self._positions = list(range(len(attachment.adapters)) if among is None else among)
        self.adapters = tuple(attachment.adapters[position].name for position in self._positions)
        self.vocabulary = attachment.model.config.get_text_config(decoder=True).vocab_size
        self._attachment = attachment
        self._tokenizer = tokenizer

    @property
    def text(self) -> str:
        """The prompt as text, without special tokens.

        Raises:
            LoraflowError: if there is no tokenizer.
            MethodError: if there is more to the prompt than its text.
        """
        more = [name for name, value in self.beside.items() if value.shape != (1, len(self.input_ids))]
        if more:
            raise MethodError(
                f"The method reads a prompt's text, and this prompt has `{more[0]}` beside it. Take a method that "
                "reads it through the base."
            )
        return str(require_tokenizer(self._tokenizer).decode(self.input_ids.tolist(), skip_special_tokens=True))

    def compare(self, measure: Measure, tokens: Literal["last", "all"]) -> Float[Tensor, "layers adapters"]:
        """Pass the prompt through the base alone and with each adapter alone, and compare every layer."""
        found = torch.zeros(self.layers, len(self.adapters), dtype=torch.float64)
        waiting: list[int | None] = [None, *self._positions]
        column = {position: index for index, position in enumerate(self._positions)}
        # Rows that no one can be told the owner of are those of a pass of one.
        together = all(group.rows != "unknown" for group in self._attachment.groups)
        rows = max(1, TOKENS_A_PASS // len(self.input_ids)) if together else 1
        # The base's states are wanted again by later passes only.
        base: dict[int, Tensor] = {}

        def read(owners: Sequence[int | None], layer: int, states: Float[Tensor, "rows seq hidden"]) -> None:
            states = states[:, -1:] if tokens == "last" else states
            if owners[0] is None:
                # As part of the pass's output it would keep all of that in memory.
                base[layer] = states[0].clone() if waiting else states[0]
                states, owners = states[1:], owners[1:]
            if owners:
                columns = [column[owner] for owner in owners if owner is not None]
                found[layer, columns] = measure(base[layer], states).double().cpu()
            if not waiting:
                del base[layer]

        while waiting:
            owners, waiting[:] = waiting[:rows], waiting[rows:]
            self._pass(owners, functools.partial(read, owners))
        return found

    def logits(self, states: Float[Tensor, "*rows hidden"], *, norm: bool) -> Float[Tensor, "*rows vocabulary"]:
        """The logit lens: the model's head on states of any layer, after its final norm or not; in float64."""
        model = self._attachment.model
        if norm:
            states = _apply_norm(_final_norm(model, self._attachment.layers.prefix), states)
        config = model.config.get_text_config(decoder=True)
        logits = _apply_head(model, states) * _logit_scale(config)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def layer_output(self, layer: int) -> Float[Tensor, "seq hidden"]:
        """The output of a decoder layer (-1 is the last) in a pass through the base alone."""
        seen: list[Tensor] = []
        self._pass([None], lambda _, states: seen.append(states[0]), [range(self.layers)[layer]])
        return seen[0]

    def module_input(self, name: str) -> Float[Tensor, "seq features"]:
        """The input of a linear (`layers.3.self_attn.q_proj`) in a pass through the base alone."""
        layers = self._attachment.layers
        # A router's weight is a parameter of its module.
        linear = layers.layers.get_submodule(name.removeprefix("layers.").removesuffix(".weight"))
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].flatten(0, -2))
            raise _Seen

        with self._attachment.alone([None]), _hooked(linear.register_forward_pre_hook(hook)):
            self._forward(1)
        return seen[0]

    def _pass(
        self, owners: Sequence[int | None], read: Callable[[int, Tensor], None], wanted: Sequence[int] | None = None
    ) -> None:
        """One forward, each row with one adapter or none; the outputs of the wanted layers (all) are read.

        Raises:
            ArchitectureError: if the layers hand on more than one state of each token.
        """
        wanted = range(self.layers) if wanted is None else wanted
        if any(context.rows.streams for context in self._attachment.contexts):
            raise ArchitectureError(
                f"The decoder layers of {type(self._attachment.model).__name__} hand on several streams, so there "
                "is no one state of each token to compare. Take a method that does not look at the layers' outputs."
            )

        def hook_of(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
                read(index, output[0] if isinstance(output, tuple) else output)
                if index == max(wanted):
                    raise _Seen

            return hook

        layers = self._attachment.layers.layers
        with self._attachment.alone(owners), _hooked(*(layers[i].register_forward_hook(hook_of(i)) for i in wanted)):
            self._forward(len(owners))

    def _forward(self, rows: int) -> None:
        model = self._attachment.model
        ids = self.input_ids.to(model.device).expand(rows, -1)
        with contextlib.suppress(_Seen):
            # Rows are all the same prompt, whatever way its images are laid out.
            beside = {name: torch.cat([value] * rows) for name, value in self.beside.items()}
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **beside)


class _Seen(Exception):  # noqa: N818 (not an error: what was to be read has been read)
    pass


@contextlib.contextmanager
def _hooked(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _final_norm(model: PreTrainedModel, prefix: str) -> nn.Module:
    """The norm between the last decoder layer and the head.

    Raises:
        ArchitectureError: if it cannot be told which one it is.
    """
    decoder = model.get_submodule(prefix.rpartition(".")[0])
    children = dict(decoder.named_children())
    after = list(children)[list(children).index(prefix.rpartition(".")[2]) + 1 :]
    norms = [name for name, child in children.items() if "norm" in type(child).__name__.lower()]
    # Some models have a norm of the embeddings too, before their layers.
    found = [name for name in norms if name in after] or [name for name in norms if name.startswith("final")]
    if len(found) > 1:
        # Beside norms of embeddings of each layer's own.
        found = [name for name in found if name == "norm" or name.startswith("final")]
    if len(found) != 1:
        raise ArchitectureError(
            f"The final norm of {type(model).__name__} was not found (norms beside its layers: {norms or 'none'}). "
            "Set `final_norm` to false."
        )
    return children[found[0]]


def _apply_norm(norm: nn.Module, states: Tensor) -> Tensor:
    wide = torch.promote_types(states.dtype, torch.float32)
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None:
        return norm(states.to(wide))
    # torch's own norm takes only inputs of its weight's precision, which accelerate may keep away until it is called.
    with align_module_device(norm):
        bias = None if norm.bias is None else norm.bias.to(wide)
        states = states.to(norm.weight.device, wide)
        return F.layer_norm(states, norm.normalized_shape, norm.weight.to(wide), bias, norm.eps)


def _logit_scale(config: PreTrainedConfig) -> float:
    """What some models (Cohere, Falcon-H1, HyperCLOVA X, Granite, MiniCPM) multiply their head's output with."""
    scale = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return scale * divisor if config.model_type.startswith("hyperclovax") else scale / divisor


def _apply_head(model: PreTrainedModel, states: Float[Tensor, "*rows hidden"]) -> Tensor:
    head = model.get_output_embeddings()
    if head is None:
        raise ArchitectureError(
            f"{type(model).__name__} does not tell its head, so inner states have no logits. Take a distance of hidden "
            "states (`cosine`, `euclidean`)."
        )
    if head.weight.is_floating_point() and head.weight.shape[-1] != states.shape[-1]:
        raise ArchitectureError(
            f"{type(model).__name__} projects its states from {states.shape[-1]} to {head.weight.shape[-1]} features "
            "before its head, so inner states have no logits. Take a distance of hidden states (`cosine`, `euclidean`)."
        )
    if head.weight.dtype not in (torch.bfloat16, torch.float16):
        return head(states.to(head.weight.dtype) if head.weight.is_floating_point() else states).double()
    # In half precision nearly equal distributions would be equal; the head is widened a part at a time.
    with align_module_device(head):
        states = states.to(head.weight.device, torch.float32)
        parts = [F.linear(states, rows.float()) for rows in head.weight.split(_HEAD_ROWS)]
        logits = torch.cat(parts, dim=-1).double()
        return logits if head.bias is None else logits + head.bias.double()

"""Batches whose rows are weighed differently: by methods of their own, by given weights, or by their own prompts."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loraflow.core.attach import Attachment
from loraflow.core.lanes import Gates, Lane, Lanes, inform
from loraflow.core.probe import Prompt
from loraflow.errors import LoraflowError, MethodError
from loraflow.methods import Method, QueryMethod
from loraflow.methods.base import Mixing
from loraflow.methods.static import ConstantGate

_OF_TOKENS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels")

RowMethod = str | Method | Mapping[str, float] | None
"""Who weighs a row: a method's or adapter's name, a method, weights by adapter name, or None for the fusion's own."""

RowWeights = Float[Tensor, "batch layers adapters"] | Float[Tensor, "batch adapters"]
"""Weights of each row, for all layers or for each."""

WeighPrompts = Callable[[Method, Gates, list[int]], Float[Tensor, "rows layers adapters"]]
"""Weighs the prompts of these rows, or gives the prior that they are for the weights of their tokens."""


def lanes_of_weights(attachment: Attachment, weights: Tensor, rows: int | None, mixing: Mixing = "outputs") -> Lanes:
    """Rows with given weights, `[rows, adapters]` or `[rows, layers, adapters]`.

    Raises:
        LoraflowError: if they have another shape, or are not finite.
    """
    layers, adapters = attachment.layer_count, len(attachment.adapters)
    weights = torch.as_tensor(weights)
    if weights.dim() == 2:
        weights = weights[:, None].expand(-1, layers, -1)
    if weights.dim() != 3 or tuple(weights.shape[1:]) != (layers, adapters) or rows not in (None, len(weights)):
        batch = "batch" if rows is None else rows
        raise LoraflowError(
            f"`fusion_weights` has the shape {tuple(weights.shape)}. Give ({batch}, {adapters}) or ({batch}, {layers}, "
            f"{adapters}): batch, layers where they differ, and adapters."
        )
    if not torch.isfinite(weights).all():
        raise LoraflowError("`fusion_weights` has values that are not finite. Give finite numbers.")
    return Lanes(len(weights), (attachment.given_lane(range(len(weights)), weights, mixing),))


def lanes_of_methods(
    attachment: Attachment, chosen: Sequence[tuple[Method, Gates]], weigh_prompts: WeighPrompts
) -> Lanes:
    """Rows with methods.

    Constant weights and those of prompts are one lane together, however many different ones there are (two, where some
    mix parameters); every other method is a lane of its own.
    """
    by_gates: dict[int, tuple[Method, Gates, list[int]]] = {}
    for row, (method, gates) in enumerate(chosen):
        by_gates.setdefault(id(gates), (method, gates, []))[2].append(row)
    lanes: list[Lane] = []
    given: dict[Mixing, dict[int, Float[Tensor, "layers adapters"]]] = {}
    for method, gates, requests in by_gates.values():
        if isinstance(method, QueryMethod):
            found = weigh_prompts(method, gates, requests).cpu()
            given.setdefault(method.mixing, {}).update(zip(requests, found, strict=True))
        elif method.reads_prompt:
            # It says the same in every layer.
            prior = weigh_prompts(method, gates, requests)[:, 0]
            lanes.append(attachment.lane(requests, method, inform(gates, prior)))
        elif not gates or is_constant(method, gates):
            none = torch.zeros(attachment.layer_count, len(attachment.adapters))
            constant = layer_weights(gates, attachment.layer_count) if gates else none
            given.setdefault("outputs", {}).update(dict.fromkeys(requests, constant))
        else:
            lanes.append(attachment.lane(requests, method, gates))
    for mixing, weights in given.items():
        rows = sorted(weights)
        lanes.append(attachment.given_lane(rows, torch.stack([weights[row] for row in rows]), mixing))
    return Lanes(len(chosen), tuple(lanes))


def lanes_of_rows(
    attachment: Attachment,
    methods: Sequence[RowMethod] | None,
    fusion_weights: RowWeights | None,
    rows: int | None,
    gates_of: Callable[[RowMethod], tuple[Method, Gates]],
    weigh_prompts: WeighPrompts,
) -> Lanes:
    """Who weighs the rows of a call: a method for each, or given weights; the number of rows may be unknown.

    Raises:
        LoraflowError: if there are not as many methods, or weights, as rows.
    """
    if fusion_weights is not None:
        if methods is not None:
            raise LoraflowError("`methods` and `fusion_weights` exclude each other. Give one of them.")
        return lanes_of_weights(attachment, fusion_weights, rows, mixing_of_weights(gates_of(None)[0]))
    if methods is None or isinstance(methods, str | Method | Mapping) or rows not in (None, len(methods)):
        count = len(methods) if isinstance(methods, Sequence) and not isinstance(methods, str) else "one"
        wanted = "each row" if rows is None else f"each of the {rows} rows"
        raise LoraflowError(f"`methods` names {count}, and must name one for {wanted}. For one method use `using`.")
    # Rows often share a method; each is looked up and made once.
    keys = [json.dumps(dict(m)) if isinstance(m, Mapping) else m if isinstance(m, str) else id(m) for m in methods]
    found = {key: gates_of(method) for key, method in dict(zip(keys, methods, strict=True)).items()}
    return lanes_of_methods(attachment, [found[key] for key in keys], weigh_prompts)


def mixing_of_weights(method: Method) -> Mixing:
    """What weights that are given for each row mix: those that the query-level method in use gave, what it mixes."""
    return method.mixing if isinstance(method, QueryMethod) else "outputs"


def refuse_prompts(method: Method, gates: Gates, rows: list[int]) -> Tensor:
    """Refuse to weigh prompts, in a forward that does not say which tokens they are.

    Raises:
        MethodError: always.
    """
    raise MethodError(
        f"The method {method.name!r} weighs a whole prompt before it is answered, and a bare forward does not say "
        "what the prompt is. Call `generate`, or give `fusion_weights=model.weigh(prompt_ids)`."
        if isinstance(method, QueryMethod)
        else f"The method {method.name!r} reads a whole prompt before it is answered. Give `prompt_mask`, 1 at its "
        "tokens."
    )


def is_constant(method: Method, gates: Gates) -> bool:
    """Whether gates give the same weights always, one for each layer."""
    if method.mixing != "outputs" or method.place == "module":
        return False
    return all(isinstance(gate, ConstantGate) for gate in gates.values())


def layer_weights(gates: Gates, layers: int) -> Float[Tensor, "layers adapters"]:
    """The weights that such gates give each layer; zero where there is none."""
    found = [gates.get(f"layers.{index}", gates.get("model")) for index in range(layers)]
    given = [None if gate is None else cast(ConstantGate, gate).weights.detach().cpu() for gate in found]
    none = torch.zeros_like(next(weights for weights in given if weights is not None))
    return torch.stack([none if weights is None else weights for weights in given])


def weigh_prompts(
    attachment: Attachment,
    method: Method,
    gate: Any,
    input_ids: Int[Tensor, "rows seq"],
    attention_mask: Int[Tensor, "rows seq"] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    among: Sequence[int] | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "rows layers adapters"]:
    """The weights, or the prior of them, that a method gives prompts, each read by itself and without its padding.

    Equal prompts are read once.
    `gate` is what the method has made for the model, for the adapters at the positions `among`, or for all; `beside` is
    what the base takes beside token ids, such as images.

    Raises:
        MethodError: if a prompt is empty, or several have something beside their tokens.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    of_tokens = {name: value for name, value in (beside or {}).items() if value.shape == input_ids.shape}
    of_all = {name: value for name, value in (beside or {}).items() if name not in of_tokens}
    if of_all and len(input_ids) > 1:
        raise MethodError(
            f"The method {method.name!r} reads each prompt by itself, and whose of {len(input_ids)} prompts "
            f"`{next(iter(of_all))}` is cannot be told. Answer them one at a time."
        )
    prompts = [ids[real.bool()] for ids, real in zip(input_ids, mask, strict=True)]
    # What is given for each token (its kind) loses its padding as they do.
    kinds = [
        {name: value[row : row + 1, real.bool()] for name, value in of_tokens.items()} for row, real in enumerate(mask)
    ]
    keys = [
        (tuple(prompt.tolist()), *(tuple(kind.flatten().tolist()) for kind in of_row.values()))
        for prompt, of_row in zip(prompts, kinds, strict=True)
    ]
    empty = next((row for row, prompt in enumerate(prompts) if not len(prompt)), None)
    if empty is not None:
        raise MethodError(f"Row {empty} has no tokens. Give every prompt at least one.")
    layers = attachment.layer_count
    weigh = method.weigh if isinstance(method, QueryMethod) else method.prior
    read = {
        key: weigh(Prompt(attachment, prompts[row], tokenizer, among, {**of_all, **kinds[row]}), gate)
        for key, row in {key: row for row, key in enumerate(keys)}.items()
    }
    dtype = torch.promote_types(attachment.model.dtype, torch.float32)
    return torch.stack([read[key].expand(layers, -1) for key in keys]).to(attachment.model.device, dtype)


def beside_tokens(options: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a prompt has beside its tokens, such as images, among the arguments of a call."""
    return {name: value for name, value in options.items() if isinstance(value, Tensor) and name not in _OF_TOKENS}


def prompt_mask(ids: Int[Tensor, "rows seq"], options: Mapping[str, Any], config: GenerationConfig) -> Tensor | None:
    """1 at real tokens of prompts and 0 at padding, or None where all are real.

    Where the options of `generate` have no mask, that is told as transformers tells it; `config` is the model's own.
    """
    if options.get("attention_mask") is not None:
        return options["attention_mask"]
    # What a call leaves open, in a configuration that it gives too, is filled from the model's own.
    sources = (options, vars(options.get("generation_config") or config), vars(config))
    pad, end = (
        next((source[key] for source in sources if source.get(key) is not None), None)
        for key in ("pad_token_id", "eos_token_id")
    )
    if pad is None or pad in (end if isinstance(end, list) else [end]) or not (ids == pad).any():
        return None
    return (ids != pad).long()


def read_weights(
    attachment: Attachment,
    input_ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    lanes: Lanes | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch seq layers adapters"], dict[str, Float[Tensor, "batch seq adapters"]]]:
    """The fusion weights at every position of a text, in one forward, on the CPU.

    Those of each layer, gates of single modules averaged and zero where there is none; and those of such gates. Without
    lanes, the method in use weighs.
    """
    model = attachment.model
    if not bool(mask.all()) and "position_ids" in inspect.signature(model.forward).parameters:
        # Positions count real tokens only, as `generate` counts them; a bare forward counts padding too.
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with attachment.recording() as recorded, attachment.weighing(lanes or attachment.contexts[0].own):
        model(input_ids=input_ids, attention_mask=mask, use_cache=False, **kwargs)
    none = torch.zeros(*input_ids.shape, len(attachment.adapters))
    layers = [torch.stack(list(found.values())).mean(dim=0).cpu() if found else none for found in recorded]
    modules = {
        f"layers.{index}.{name}": weights.cpu()
        for index, found in enumerate(recorded)
        for name, weights in found.items()
        if name
    }
    return torch.stack(layers, dim=2), modules
